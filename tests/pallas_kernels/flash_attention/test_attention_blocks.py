"""The lists of blocks against what a dense mask says. Legend: B rows, T queries, S keys, I query blocks, J key
blocks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.reference import visibility

BLOCK_Q, BLOCK_KV = 8, 4


def geometry(T, S, causal, offset, block_kv=BLOCK_KV):
    return blocks.Geometry(-(-T // BLOCK_Q), -(-S // block_kv), BLOCK_Q, block_kv, T, S, causal, offset, diagonal=4)


def padded(ids, block):
    return np.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), constant_values=-1)


def random_ids(rng, rows, length):
    ids = np.sort(rng.integers(0, 4, (rows, length)), axis=1)
    return np.where(np.arange(length) >= length - rng.integers(0, length, (rows, 1)), -1, ids).astype(np.int32)


def dense(T, S, causal, offset, q_ids, kv_ids):
    mask = visibility(T, S, causal=causal, q_offset=offset, q_segment_ids_BT=q_ids, kv_segment_ids_BS=kv_ids)
    return np.ones((1, T, S), bool) if mask is None else np.asarray(mask)


def tiles(mask_BTS, block_kv=BLOCK_KV):
    """Whether anything and whether everything is visible in each tile; what lies past the lengths is not."""
    pad = ((0, 0), (0, -mask_BTS.shape[1] % BLOCK_Q), (0, -mask_BTS.shape[2] % block_kv))
    mask_BTS = np.pad(mask_BTS, pad)
    B, T, S = mask_BTS.shape
    tiled = mask_BTS.reshape(B, T // BLOCK_Q, BLOCK_Q, S // block_kv, block_kv)
    return tiled.any((2, 4)), tiled.all((2, 4))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("segmented", [False, True])
def test_every_visible_block_is_visited_and_full_means_full(seed, segmented):
    rng = np.random.default_rng(seed)
    T, S = rng.integers(1, 50, 2)
    causal, offset = bool(seed % 2), int(rng.integers(-10, 30)) * (seed % 2)
    q_ids, kv_ids = (random_ids(rng, 2, T), random_ids(rng, 2, S)) if segmented else (None, None)
    g = geometry(T, S, causal, None if seed % 3 else offset)
    ids = (jnp.asarray(padded(q_ids, BLOCK_Q)), jnp.asarray(padded(kv_ids, BLOCK_KV))) if segmented else (None, None)
    visited, kind = (np.asarray(x) for x in blocks.structure(g, 2, offset, *ids))
    any_visible, all_visible = tiles(dense(T, S, causal, offset, q_ids, kv_ids))
    assert not np.any(any_visible & ~visited)
    # The padded end of the queries sees nothing in the dense mask; a tile may still be computed without a mask there.
    inner = np.arange(g.num_query_blocks)[:, None] < T // BLOCK_Q
    assert not np.any(visited & (kind == blocks.FULL) & ~all_visible & inner)
    if not segmented:
        np.testing.assert_array_equal((visited & any_visible), np.broadcast_to(any_visible, visited.shape))


def unpack(items):
    count = int(items.count)
    where, what, done = (np.asarray(x)[:count] for x in (items.where_M, items.what_M, items.done_M))
    row, query = blocks.row_and_query(where)
    return list(zip(row.tolist(), query.tolist(), blocks.key(what).tolist(), what.tolist(), done.tolist(), strict=True))


@pytest.mark.parametrize("traced", [False, True])
def test_forward_list_walks_each_query_block_once_and_flags_its_ends(traced):
    g = geometry(40, 40, True, 0)
    visited, kind = blocks.structure(g, 2, 0, None, None)
    if traced:
        visited, kind = jnp.asarray(visited), jnp.asarray(kind)
    listed = functools.partial(blocks.forward_items, limit=blocks.max_visits(g))
    items = unpack((jax.jit(listed) if traced else listed)(visited, kind))
    assert [(b, i, j) for b, i, j, *_ in items] == [
        (b, i, j) for b, i, j in np.ndindex(visited.shape) if visited[b, i, j]
    ]
    for position, (b, i, _, what, _) in enumerate(items):
        before = items[position - 1][:2] if position else None
        after = items[position + 1][:2] if position + 1 < len(items) else None
        assert bool(what & blocks.FIRST_OF_QUERY) == (before != (b, i))
        assert bool(what & blocks.LAST_OF_QUERY) == (after != (b, i))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("heads, chunk", [(1, 5), (3, 5), (3, 4), (2, 10)])
def test_backward_list_visits_all_and_finishes_each_query_once(traced, heads, chunk):
    rng = np.random.default_rng(chunk)
    g = geometry(40, 40, True, 0)
    visited, kind = blocks.structure(g, 2, 0, None, None)
    visited = np.asarray(visited) & rng.integers(0, 2, visited.shape).astype(bool)  # holes, as segments leave them
    visited[1, 3] = visited[0, :, 7] = False  # a query block that sees nothing, a key block that is not seen
    if traced:
        visited, kind = jnp.asarray(visited), jnp.asarray(kind)
    listed = functools.partial(blocks.backward_items, heads=heads, chunk=chunk, limit=blocks.max_visits(g))
    items = unpack((jax.jit(listed) if traced else listed)(visited, kind))
    num_q, J = 5, 10
    assert len({item[:3] for item in items}) == len(items)
    needed = {(b, r * num_q + i, j) for b, i, j in np.ndindex(2, num_q, J) if visited[b, i, j] for r in range(heads)}
    assert needed <= {item[:3] for item in items}
    assert all(what & 3 == blocks.GENERAL for b, q, j, what, _ in items if (b, q, j) not in needed)
    finished = [(b, q) for b, q, _, what, _ in items if what & blocks.LAST_OF_QUERY]
    assert sorted(finished) == [(b, q) for b in range(2) for q in range(heads * num_q)]
    # The output window stays on the next block to be finished, so that it is written back when that has happened.
    expected, following = [], finished[-1]
    for b, q, _, what, _ in reversed(items):
        following = (b, q) if what & blocks.LAST_OF_QUERY else following
        expected.append(following)
    assert [(done >> 16, done & 0xFFFF) for *_, done in items] == expected[::-1]
    # Each chunk's key blocks come in runs, all of them, every run begun and ended by its flags.
    runs = [(b, q // chunk, j) for b, q, j, what, _ in items if what & blocks.FIRST_OF_KEY]
    assert sorted(runs) == [(b, c, j) for b in range(2) for c in range(-(-heads * num_q // chunk)) for j in range(J)]
    assert runs == [(b, q // chunk, j) for b, q, j, what, _ in items if what & blocks.LAST_OF_KEY]


def test_static_structure_is_a_constant_and_a_traced_one_compiles_once():
    g = geometry(40, 40, True, 0)
    assert isinstance(blocks.forward_items(*blocks.structure(g, 1, 0, None, None), 40).count, int)

    @jax.jit
    def visits(offset):
        return blocks.forward_items(*blocks.structure(geometry(40, 40, True, None), 1, offset, None, None), 50).count

    assert [int(visits(offset)) for offset in (0, 8, 100)] == [2 + 4 + 6 + 8 + 10, 4 + 6 + 8 + 10 + 10, 50]
    assert visits._cache_size() == 1
