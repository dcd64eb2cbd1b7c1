"""The TPU kernel: attention of runs of queries over runs of pages, bound by reading the pages.

    items     i0            i1    i2               i0 has 3 blocks of tokens, i1 one, i2 two
    steps     b0  b1  b2    b0    b0  b1           one loop over the blocks of all items
    fetch     --------->                           runs two steps ahead, across items
    attend         --------->                      online softmax; after an item's last block writes its rows

A page is one contiguous copy, with keys and values of all heads. Only pages with tokens are copied, so a step reads
exactly the pages of its items. Page numbers come from scalar memory and are clamped to the pool. Queries and results
stay in vector memory throughout.

A block is processed in chunks, and within a chunk the heads' scores are computed AHEAD passes before use: matrix
products issue in program order, so the matrix unit works on the next heads while the vector units do a softmax. (For
one sequence, 8 heads and 512 tokens, by the static schedule: 1,028 bundles instead of 2,459 on v5e, 1,159 instead of
2,361 on tpu7x.)

On a 256-deep matrix unit (v6e, tpu7x) a pass over one head's 128 features would fill half of it. There we fold two
heads into a pass: their queries are block-diagonal in [2 X, 2 H], their keys and values side by side, and each row of
the [2 X, 2 H] result keeps its own head's half. With the few rows of a decode step, loading the matrix unit dominates.

Axes: K key/value heads, F = K / fold passes, H head width (of the pool), S pages of the pool, T tokens of a page,
Z rows of the page table, M pages of a row, J items, L query tiles, X rows of a tile, Y rows of a pass (its tiles times
X times fold), C tokens of a chunk.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.checks import check

BUFFERS = 3  # one in use, two being fetched
AHEAD = 4
LANES = 128
SMEM_BYTES = 1 << 20  # on every generation since v4
LOG2_E = math.log2(math.e)


class WorkList(NamedTuple):
    """Items in processing order, which is also the order of their tiles. int32; entries past the count are zeros.

    An item is a run of query tiles and the pages that all of them attend to. Items without tokens or queries are
    omitted, so the loop has no empty iterations and its DMA queue no gaps.
    """

    steps_1: jax.Array  # total blocks of all items
    lengths_J: jax.Array  # tokens
    rows_J: jax.Array  # row of the page table
    tiles_J: jax.Array  # first query tile
    buckets_J: jax.Array  # index of the kernel body whose row count fits the item


def attend_pages(
    q_LKXH: jax.Array,
    kv_pages_S2KTH: jax.Array,
    pages_ZM: jax.Array,
    work: WorkList,
    *,
    buckets: tuple[int, ...],
    block: int,
    chunk: int,
    split: int,
    fold: int,
    scale: float,
    interpret: bool | Any,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every item's queries over its pages: (out_LKXH, lse_LKX), float32; rows without an item are unset.

    Args:
      buckets: ascending tile counts for which the kernel has a body; `work.buckets_J` picks one that fits the item. It
        may overwrite tiles after the item's: their own item writes them later, or they are padding.
      block, chunk, split, fold: as in tpu.Tiling.

    Raises:
      ArgumentError: the page table does not fit scalar memory, or the queries vector memory.
    """
    tiles, num_kv_heads, tile_rows, width = q_LKXH.shape
    num_pages, _, _, page_size, _ = kv_pages_S2KTH.shape
    dtype = kv_pages_S2KTH.dtype
    heads = num_kv_heads // split
    passes = heads // fold
    q_LFYH = _fold(q_LKXH, fold)
    pass_rows = fold * tile_rows
    most_rows = buckets[-1] * pass_rows

    scalars = (*work, pages_ZM.reshape(-1).astype(jnp.int32))
    smem = sum(4 * x.size for x in scalars)
    check(
        smem <= SMEM_BYTES - (64 << 10),
        f"the page table {tuple(pages_ZM.shape)} and its work list take {smem >> 10} KiB of scalar memory, which has "
        f"{SMEM_BYTES >> 10} KiB; use pages of more than {page_size} tokens, narrower tables or fewer sequences",
    )
    row_bytes = fold * width * dtype.itemsize + (width + LANES) * 4
    vmem = (1 if split == 1 else 2) * tiles * passes * _sublanes(pass_rows) * row_bytes
    vmem += BUFFERS * block * 2 * heads * width * dtype.itemsize
    vmem += passes * _sublanes(most_rows) * (2 * LANES + width) * 4
    vmem += 8 << 20  # for the compiler's own use
    chip = chips.current_chip()
    check(
        vmem <= chip.vmem_mib << 20,
        f"q_BNH: its {tiles} tiles of {tile_rows} rows take {vmem >> 20} MiB of vector memory, and {chip.name} has "
        f"{chip.vmem_mib} MiB; decode fewer sequences at once",
    )

    def part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((tiles, passes, *shape), lambda i, *_: (0, i, 0, 0))

    tokens = pages_ZM.size * page_size  # upper bound
    query_rows = -(-tiles * tile_rows // pages_ZM.shape[0])
    out_LFYH, lse_LFYL = pl.pallas_call(
        functools.partial(
            _kernel, buckets=buckets, scale=scale, block=block, chunk=chunk, table_width=pages_ZM.shape[1]
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(split,),
            in_specs=[part(pass_rows, fold * width), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[part(pass_rows, width), part(pass_rows, LANES)],
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, block // page_size, 2, heads, page_size, width), dtype),
                pltpu.VMEM((passes, most_rows, LANES), jnp.float32),  # running maximum, equal in all lanes
                pltpu.VMEM((passes, most_rows, LANES), jnp.float32),  # running sum, spread over the lanes
                pltpu.VMEM((passes, most_rows, width), jnp.float32),  # running weighted values
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tiles, num_kv_heads // fold, pass_rows, width), jnp.float32),
            jax.ShapeDtypeStruct((tiles, num_kv_heads // fold, pass_rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=vmem,
            disable_bounds_checks=True,  # page numbers are clamped; checks triple the time to start a copy
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * num_kv_heads * query_rows * width,
            bytes_accessed=2 * tokens * num_kv_heads * width * dtype.itemsize,
            transcendentals=tokens * num_kv_heads * query_rows,
        ),
        interpret=interpret,
        name=name,
    )(*scalars, q_LFYH, kv_pages_S2KTH)
    return out_LFYH.reshape(q_LKXH.shape), lse_LFYL[..., 0].reshape(q_LKXH.shape[:3])


def _fold(q_LKXH: jax.Array, fold: int) -> jax.Array:
    """The queries of every `fold` heads, block-diagonal."""
    if fold == 1:
        return q_LKXH
    tiles, num_kv_heads, tile_rows, width = q_LKXH.shape
    q_LFXH = q_LKXH.reshape(tiles, num_kv_heads // fold, fold, tile_rows, 1, width)
    q_LFXH = jnp.where(jnp.eye(fold, dtype=bool)[:, None, :, None], q_LFXH, jnp.zeros_like(q_LFXH))
    return q_LFXH.reshape(tiles, num_kv_heads // fold, fold * tile_rows, fold * width)


def _kernel(
    steps_ref,
    lengths_ref,
    rows_ref,
    tiles_ref,
    buckets_ref,
    pages_ref,
    q_ref,
    pool_ref,
    out_ref,
    lse_ref,
    kv_ref,
    max_ref,
    sum_ref,
    acc_ref,
    semaphores,
    *,
    buckets: tuple[int, ...],
    scale: float,
    block: int,
    chunk: int,
    table_width: int,
):
    _, pages_a_block, _, heads, page_size, width = kv_ref.shape
    passes, pass_rows = q_ref.shape[1:3]
    fold = heads // passes
    pages_a_chunk = chunk // page_size
    first_head = pl.program_id(0) * heads
    steps = steps_ref[0]

    def pages_of(item, index):
        """The number of pages with tokens in an item's block."""
        return jnp.minimum(pl.cdiv(lengths_ref[item], page_size) - index * pages_a_block, pages_a_block)

    def start_copies(item, index, slot):
        used = pages_of(item, index)
        entry = rows_ref[item] * table_width + index * pages_a_block

        def start_copy(i):
            number = jnp.clip(pages_ref[entry + i], 0, pool_ref.shape[0] - 1)
            source = pool_ref.at[number]
            if heads < pool_ref.shape[2]:
                source = source.at[:, pl.ds(first_head, heads)]
            pltpu.make_async_copy(source, kv_ref.at[slot, i], semaphores.at[slot]).start()

        # A loop with one copy per iteration takes longer than copying a small page.
        pl.when(used == pages_a_block)(lambda: _repeat(pages_a_block, start_copy, unroll=16))
        pl.when(used < pages_a_block)(lambda: _repeat(used, start_copy))

    def wait_for_copies(item, index, slot):
        used = pages_of(item, index)

        def wait(ref):
            pltpu.make_async_copy(ref, ref, semaphores.at[slot]).wait()  # only the size matters

        pl.when(used == pages_a_block)(lambda: wait(kv_ref.at[slot]))
        pl.when(used < pages_a_block)(lambda: _repeat(used, lambda i: wait(kv_ref.at[slot, i])))

    def after(item, index):
        """The next step's block: the item's next or the next item's first. Stays in range after the last item."""
        ends = (index + 1) * block >= lengths_ref[item]
        following = jnp.minimum(item + 1, lengths_ref.shape[0] - 1)
        return jnp.where(ends, following, item), jnp.where(ends, 0, index + 1)

    def fetch(step, item, index):
        pl.when(step < steps)(lambda: start_copies(item, index, step % BUFFERS))
        return after(item, index)

    def attend_step(step, carry):
        item, index, *ahead = carry
        ahead = fetch(step + BUFFERS - 1, *ahead)
        slot = step % BUFFERS
        wait_for_copies(item, index, slot)
        tokens = jnp.minimum(lengths_ref[item] - index * block, block)
        pl.when(tokens < block)(lambda: clear_values(slot, tokens))
        is_last = index * block + tokens == lengths_ref[item]
        for i, num_tiles in enumerate(buckets):
            body = functools.partial(attend_block, num_tiles, slot, tokens, tiles_ref[item], index == 0, is_last)
            if len(buckets) == 1:
                body()
            else:
                pl.when(buckets_ref[item] == i)(body)
        return *after(item, index), *ahead

    def clear_values(slot, tokens):
        """Zero the values after the last token: their weight is 0, but places may hold NaN, and 0 x NaN is NaN."""

        def clear(i, _):
            position = i * page_size + jax.lax.broadcasted_iota(jnp.int32, (1, page_size, 1), 1)
            values = kv_ref[slot, i, 1]
            kv_ref[slot, i, 1] = jnp.where(position < tokens, values, jnp.zeros_like(values))
            return 0

        jax.lax.fori_loop(tokens // page_size, pl.cdiv(tokens, chunk) * pages_a_chunk, clear, 0)

    def attend_block(num_tiles, slot, tokens, tile, is_first, is_last):
        """Attend to a block of an item with `num_tiles` query tiles from `tile` on."""
        rows = num_tiles * pass_rows
        state = [ref.at[:, pl.ds(0, rows)] for ref in (max_ref, sum_ref, acc_ref)]

        @pl.when(is_first)
        def _():
            for ref, value in zip(state, (-jnp.inf, 0, 0), strict=True):
                ref[...] = jnp.full(ref.shape, value, ref.dtype)

        def attend_chunk(c, _):
            valid_C = c * chunk + jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1) < tokens

            def side_by_side(which, f):
                pages = pl.ds(c * pages_a_chunk, pages_a_chunk)
                parts = [kv_ref[slot, pages, which, f * fold + i].reshape(chunk, width) for i in range(fold)]
                return jnp.concatenate(parts, axis=1) if fold > 1 else parts[0]

            def scores(f):
                q_YH = q_ref[pl.ds(tile, num_tiles), f].reshape(rows, fold * width)
                return _scores(q_YH, side_by_side(0, f), valid_C, scale)

            ready = [scores(f) for f in range(min(AHEAD, passes))]
            for f in range(passes):
                if f + AHEAD < passes:
                    ready.append(scores(f + AHEAD))
                _update(ready[f], side_by_side(1, f), pass_rows // fold, *(ref.at[f] for ref in state))
            return 0

        jax.lax.fori_loop(0, pl.cdiv(tokens, chunk), attend_chunk, 0)

        @pl.when(is_last)
        def _():
            for f in range(passes):
                max_YL, sum_YL, acc_YH = (ref[f] for ref in state)
                sum_Y1 = jnp.sum(sum_YL, axis=1, keepdims=True)
                out_YH, lse_YL = acc_YH / sum_Y1, max_YL / LOG2_E + jnp.log(sum_Y1)
                out_ref[pl.ds(tile, num_tiles), f] = out_YH.reshape(num_tiles, pass_rows, width)
                lse_ref[pl.ds(tile, num_tiles), f] = lse_YL.reshape(num_tiles, pass_rows, LANES)

    start = jnp.int32(0), jnp.int32(0)
    ahead = start
    for step in range(BUFFERS - 1):
        ahead = fetch(step, *ahead)
    jax.lax.fori_loop(0, steps, attend_step, (*start, *ahead))


def _repeat(times, do, unroll: int = 1) -> None:
    """`do(i)` for every i below `times`. If `unroll` > 1, it must divide or exceed `times`."""
    if unroll > 1:
        unroll = min(unroll, times)

    def turn(i, _):
        for j in range(unroll):
            do(i * unroll + j)
        return 0

    jax.lax.fori_loop(0, times if unroll == 1 else times // unroll, turn, 0)


def _scores(q_YH: jax.Array, k_CH: jax.Array, valid_C: jax.Array, scale: float) -> jax.Array:
    """Masked scores in log2 units, for the vector unit's exp2."""
    return jnp.where(valid_C, _product(q_YH, k_CH, 1) * (scale * LOG2_E), -jnp.inf)


def _update(scores_YC, v_CH, head_rows: int, max_ref, sum_ref, acc_ref) -> None:
    """One chunk of the online softmax. With folded heads, every `head_rows` rows belong to the next head."""
    width = acc_ref.shape[1]
    max_YL = jnp.maximum(max_ref[...], jnp.max(scores_YC, axis=1, keepdims=True))
    decay_YL = jnp.exp2(max_ref[...] - max_YL)
    weights_YC = jnp.exp2(scores_YC - _to_width(max_YL, scores_YC.shape[1]))
    max_ref[...] = max_YL
    terms = jnp.split(weights_YC, weights_YC.shape[1] // LANES, axis=1)
    sum_ref[...] = decay_YL * sum_ref[...] + functools.reduce(jnp.add, terms)

    update_YH = _product(weights_YC.astype(v_CH.dtype), v_CH, 0)
    own_YH = update_YH[:, :width]
    fold = update_YH.shape[1] // width
    head_YH = jax.lax.broadcasted_iota(jnp.int32, own_YH.shape, 0) // head_rows % fold
    for i in range(1, fold):
        own_YH = jnp.where(head_YH == i, update_YH[:, i * width : (i + 1) * width], own_YH)
    acc_ref[...] = _to_width(decay_YL, width) * acc_ref[...] + own_YH


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """x times y, contracting x's last axis with y's `axis`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, y, contract, precision=precision, preferred_element_type=jnp.float32)


def _to_width(x_YL: jax.Array, width: int) -> jax.Array:
    """A value equal in all 128 lanes, at another width."""
    return jnp.concatenate([x_YL] * (width // LANES), axis=1)


def _sublanes(rows: int) -> int:
    return -(-rows // 8) * 8
