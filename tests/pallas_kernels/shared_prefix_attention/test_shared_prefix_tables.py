"""How a step's work is laid out for the kernel, and errors that name the argument at fault."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_prefix_cases import Shape, make_step

from pallas_kernels.checks import ArgumentError
from pallas_kernels.shared_prefix_attention import PageTables, Tiling, shared_prefix_attention
from pallas_kernels.shared_prefix_attention.tables import make_subgroups
from pallas_kernels.shared_prefix_attention.tpu import (
    from_tiles,
    num_tiles,
    prefix_work,
    row_counts,
    suffix_work,
    to_tiles,
)

SHAPE = Shape(B=3, P=1, prefix_pages=1, suffix_pages=1)


def arguments(**changes):
    q_BNH, kv, tables = make_step(SHAPE, [(3, [1, 2])])
    values = {"q_BNH": q_BNH, "kv": kv, "implementation": "xla", "interpret": False, **tables._asdict(), **changes}
    tables = PageTables(*(values.pop(name) for name in PageTables._fields))
    return (values.pop("q_BNH"), values.pop("kv"), tables), values


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"implementation": "cuda"}, "implementation is 'cuda'; choose one of 'xla', 'tpu'"),
        ({"interpret": True}, "interpret is True; it is only for implementation='tpu'"),
        ({"q_BNH": jnp.zeros((3, 8))}, r"q_BNH has shape \(3, 8\); it must be \[B, N, H\]"),
        ({"q_BNH": jnp.zeros((3, 9, 128))}, "q_BNH has 9 heads and kv_pages_S2KTW 2"),
        ({"q_BNH": jnp.zeros((3, 8, 128), jnp.float16)}, "q_BNH is float16; cast it to one of float32, bfloat16"),
        ({"kv": jnp.zeros((4, 2, 2, 16, 128), jnp.bfloat16)}, "kv_pages_S2KTW is bfloat16; cast it to one of float32"),
        (
            {"kv": jnp.zeros((4, 1, 2, 16, 128))},
            r"kv_pages_S2KTW has shape .*\[S, 2, K, T, W\] = \[any, 2, any, any, any\]",
        ),
        ({"kv": jnp.zeros((4, 2, 2, 16, 64))}, "kv_pages_S2KTW has width 64; q_BNH has 128"),
        (
            {"kv": jnp.zeros((4, 2, 2, 16, 160)), "implementation": "tpu"},
            "has width 160; .* pad the pool with zeros to a multiple of 128",
        ),
        ({"kv": jnp.zeros((4, 2, 2, 24, 128))}, "the page size, kv_pages_S2KTW.shape.*is 24; choose one of 16"),
        ({"tiling": Tiling(128, 128, 1, 1)}, r"tiling is Tiling\(.*only for implementation='tpu'"),
        ({"group_of_B": jnp.zeros(4, jnp.int32)}, r"tables.group_of_B has shape \(4,\)"),
        ({"suffix_lengths_B": jnp.zeros(3)}, "tables.suffix_lengths_B is float32; cast it to one of int32"),
        ({"suffix_pages_BM": jnp.zeros((3, 0), jnp.int32)}, "tables.suffix_pages_BM has shape .*at least 1"),
        (
            {"suffix_pages_BM": jnp.zeros((3, 90000), jnp.int32), "implementation": "tpu"},
            "KiB of scalar memory, which has 1024 KiB; use pages of more than 16 tokens",
        ),
    ],
)
def test_bad_arguments_are_named(changes, message):
    positional, keywords = arguments(**changes)
    with pytest.raises(ArgumentError, match=message):
        jax.eval_shape(functools.partial(shared_prefix_attention, **keywords), *positional)


def test_a_batch_too_large_for_vector_memory_is_refused():
    q_BNH = jax.ShapeDtypeStruct((8192, 32, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((16, 2, 8, 256, 128), jnp.bfloat16)
    shapes = (1, 1), (1,), (8192,), (8192, 1), (8192,)
    tables = PageTables(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    with pytest.raises(ArgumentError, match="MiB of vector memory, and v5e has 128 MiB; decode fewer sequences"):
        jax.eval_shape(lambda *x: shared_prefix_attention(*x, implementation="tpu"), q_BNH, kv, tables)


def test_subgroups_hold_at_most_64_of_one_group():
    group_of_B = np.array([2] * 70 + [-1, 0, 9] + [2] * 60 + [0])
    subgroups = make_subgroups(jnp.asarray(group_of_B), 3)
    who = {}
    places = zip(subgroups.subgroup_of_B.tolist(), subgroups.member_of_B.tolist(), strict=True)
    for b, (subgroup, member) in enumerate(places):
        if subgroup < len(subgroups.count_G):
            assert who.setdefault((subgroup, member), b) == b, "two sequences in one place"
            assert subgroups.group_of_G[subgroup] == group_of_B[b] and member < subgroups.count_G[subgroup]
        else:
            assert group_of_B[b] in (-1, 9)
    assert len(who) == np.isin(group_of_B, [0, 1, 2]).sum() == subgroups.count_G.sum()
    assert subgroups.count_G.tolist() == [2, 64, 64, 2, 0]


@pytest.mark.parametrize("repeats", [1, 3, 4, 8])
def test_queries_come_back_from_their_tiles(repeats):
    group_of_B = jnp.array([1, -1, 0, 1, 1, 0, 1, 1])
    tables = PageTables(jnp.zeros((2, 2), jnp.int32), jnp.array([16, 20]), group_of_B, jnp.zeros((8, 1)), jnp.zeros(8))
    q_BKRH = jax.random.normal(jax.random.key(0), (8, 2, repeats, 4))

    @jax.jit
    def there_and_back(q_BKRH, tables):
        subgroups = make_subgroups(tables.group_of_B, 2)
        work, row_B = prefix_work(tables, subgroups, repeats, page_size=16, block=16)
        q_LKXH = to_tiles(q_BKRH, row_B, num_tiles(8, subgroups.count_G.shape[0], repeats))
        return work, q_LKXH, from_tiles(q_LKXH, row_B, repeats)

    work, q_LKXH, back_BKRH = there_and_back(q_BKRH, tables)
    has_group_B = np.array(group_of_B) >= 0
    np.testing.assert_array_equal(back_BKRH[has_group_B], q_BKRH[has_group_B])
    assert jnp.count_nonzero(q_LKXH) == q_BKRH[has_group_B].size
    assert (work.steps_1[0], work.lengths_J.tolist(), work.rows_J.tolist()) == (3, [16, 20], [0, 1])


def test_work_lists_leave_out_what_is_empty():
    lengths_B, group_of_B = jnp.array([0, 5, 0, 33, -4, 99]), jnp.array([0, 1, 1, 1, 3, 3])
    tables = PageTables(jnp.zeros((4, 3)), jnp.array([0, 40, 7, 48]), group_of_B, jnp.zeros((6, 3)), lengths_B)
    work = jax.jit(lambda tables: suffix_work(tables, page_size=16, block=32))(tables)
    assert work.steps_1.tolist() == [1 + 2 + 2]
    assert work.rows_J.tolist()[:3] == work.tiles_J.tolist()[:3] == [1, 3, 5]
    assert work.lengths_J.tolist() == [5, 33, 48, 0, 0, 0]
    subgroups = make_subgroups(group_of_B, 4)
    work, _ = jax.jit(lambda *x: prefix_work(*x, repeats=4, page_size=16, block=32))(tables, subgroups)
    assert work.steps_1.tolist() == [2 + 2]
    assert work.rows_J.tolist()[:2] == [1, 3], "group 0 has no prefix, group 2 no sequences"


@pytest.mark.parametrize("repeats", [1, 3, 4, 8])
def test_bodies_stay_inside_the_tiles(repeats):
    """The body that holds a subgroup's rows may run past them, never past the tiles: in full batches too."""
    work_of = jax.jit(lambda tables, subgroups: prefix_work(tables, subgroups, repeats, page_size=16, block=16)[0])
    for first in (0, 1, 4, 5, 16, 17, 32, 33, 50, 64, 69, 70):
        group_of_B = jnp.where(jnp.arange(70) < first, 0, 1)
        tables = PageTables(jnp.zeros((2, 1)), jnp.array([3, 5]), group_of_B, jnp.zeros((70, 1)), jnp.zeros(70))
        subgroups = make_subgroups(group_of_B, 2)
        work = work_of(tables, subgroups)
        used = int(work.steps_1[0])  # items of one step each
        counts = [int(n) for n in subgroups.count_G if n]
        ends = work.tiles_J[:used] + jnp.array(row_counts(repeats))[work.buckets_J[:used]]
        assert ends.max() <= num_tiles(70, len(subgroups.count_G), repeats)
        needed = np.ceil(np.array(counts) * repeats / 16)
        assert used == len(counts) and (ends - work.tiles_J[:used] >= needed).all()
        assert (np.diff(work.tiles_J[:used]) == needed[:-1]).all()
