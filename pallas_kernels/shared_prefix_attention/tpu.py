"""Shared-prefix decode attention for TPU: one kernel, run over the prefixes and over the suffixes.

The prefixes' run meets each with all the queries of its group, the suffixes' run each with one trajectory's; the two
results are merged by log-sum-exp. Sizes are chosen here; the kernel is in paged_kernel.py, what it is told to do in
worklist.py.

Axes: B trajectories, P problems, N query heads, K key/value heads, R = N / K, H head width (of the pool), S pages, T
tokens of a page, M pages of a table's row, G groups, L query tiles, X rows of a tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.shared_prefix_attention.grouping import group_trajectories
from pallas_kernels.shared_prefix_attention.merge import merge_by_lse
from pallas_kernels.shared_prefix_attention.paged_kernel import LANES, attend_pages
from pallas_kernels.shared_prefix_attention.tables import PageTables
from pallas_kernels.shared_prefix_attention.worklist import (
    from_tiles,
    num_tiles,
    prefix_work,
    row_counts,
    suffix_work,
    to_tiles,
)

BLOCK_BYTES = 2 << 20  # takes 2.5 us to read on v5e and 0.6 us on tpu7x, longer than the copies' latency
TWO_CORES_A_DEVICE = ("v5p",)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The kernel's sizes. Powers of two; chunk divides block, and a page divides both."""

    block: int  # tokens fetched at a time
    chunk: int  # tokens attended to at a time, a multiple of 128
    split: int  # parts of the key/value heads, spread over the cores of a device
    fold: int  # heads in one pass through the matrix unit


def choose_tiling(num_kv_heads: int, width: int, itemsize: int, chip: chips.Chip) -> Tiling:
    """Blocks of about BLOCK_BYTES, and chunks that keep the matrix unit busy with few heads too."""
    split = 2 if chip.name in TWO_CORES_A_DEVICE and num_kv_heads % 2 == 0 else 1
    heads = num_kv_heads // split
    block = max(512, _floor_power(BLOCK_BYTES // (2 * heads * width * itemsize)))
    fold = 2 if width == LANES and chip.matrix_width == 2 * LANES and heads % 2 == 0 else 1
    return Tiling(block=block, chunk=min(max(512, _floor_power(4096 // heads)), 2048, block), split=split, fold=fold)


def _floor_power(x: int) -> int:
    return 1 << max(x, 1).bit_length() - 1


def shared_prefix_attention(
    q_BNH: jax.Array,
    kv_pages_S2KTH: jax.Array,
    tables: PageTables,
    *,
    scale: float,
    interpret: bool | Any = False,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BNH in q's dtype, lse_BN float32). `tiling` is chosen for the chip compiled for unless it is given."""
    num_kv_heads, page_size = kv_pages_S2KTH.shape[2:4]
    batch, num_heads, width = q_BNH.shape
    repeats = num_heads // num_kv_heads
    tiling = tiling or choose_tiling(num_kv_heads, width, kv_pages_S2KTH.dtype.itemsize, chips.current_chip())
    attend = functools.partial(
        attend_pages,
        block=tiling.block,
        chunk=tiling.chunk,
        split=tiling.split,
        fold=tiling.fold,
        scale=scale,
        interpret=interpret,
    )
    q_BKRH = q_BNH.reshape(batch, num_kv_heads, repeats, width)

    groups = group_trajectories(tables.problem_of_B, tables.prefix_lengths_P.shape[0])
    work, row_B = prefix_work(tables, groups, repeats, page_size, tiling.block)
    tiles = num_tiles(batch, groups.count_G.shape[0], repeats)
    prefix_LKXH, prefix_lse_LKX = attend(
        to_tiles(q_BKRH, row_B, tiles),
        kv_pages_S2KTH,
        tables.prefix_pages_PM,
        work,
        buckets=row_counts(repeats),
        name="shared_prefix_attention_prefix",
    )
    suffix_BKRH, suffix_lse_BKR = attend(
        q_BKRH,
        kv_pages_S2KTH,
        tables.suffix_pages_BM,
        suffix_work(tables, page_size, tiling.block),
        buckets=(1,),
        name="shared_prefix_attention_suffix",
    )

    # Rows that belonged to no item are memory that nobody wrote.
    empty_G = tables.prefix_lengths_P[groups.problem_of_G] <= 0
    no_prefix_B = empty_G.at[groups.group_of_B].get(mode="fill", fill_value=True)[:, None, None]
    no_suffix_B = (tables.suffix_lengths_B <= 0)[:, None, None]
    out_BKRH, lse_BKR = merge_by_lse(
        jnp.where(no_prefix_B[..., None], 0, from_tiles(prefix_LKXH, row_B, repeats)),
        jnp.where(no_prefix_B, -jnp.inf, from_tiles(prefix_lse_LKX, row_B, repeats)),
        jnp.where(no_suffix_B[..., None], 0, suffix_BKRH),
        jnp.where(no_suffix_B, -jnp.inf, suffix_lse_BKR),
    )
    return out_BKRH.reshape(q_BNH.shape).astype(q_BNH.dtype), lse_BKR.reshape(batch, num_heads)
