"""Shared-prefix decode attention for TPU: one kernel, run over the prefixes and over the suffixes.

The prefix run attends to each prefix with all queries of a subgroup, the suffix run to each suffix with one sequence's
queries; log-sum-exp merges the two results. The kernel is in paged_kernel.py. This file chooses its sizes and lays out
its work: items in order, and queries in tiles. A tile is the unit that addresses a head's queries: TILE_ROWS rows
(sequence, repeat) of a subgroup, the last tile padded; or, in the suffix run, the R rows of one sequence.

Axes: B sequences, P prefix groups, G subgroups, N query heads, K key/value heads, R = N / K, H head width (of the
pool), S pages, T tokens of a page, M pages of a table's row, J items, L query tiles, X rows of a tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips
from pallas_kernels.shared_prefix_attention.paged_kernel import LANES, WorkList, attend_pages
from pallas_kernels.shared_prefix_attention.tables import (
    SUBGROUP_SIZE,
    PageTables,
    Subgroups,
    make_subgroups,
    merge_by_lse,
)

BLOCK_BYTES = 2 << 20  # takes 2.5 us to read on v5e and 0.6 us on tpu7x, longer than the latency of copies
TWO_CORES_A_DEVICE = ("v5p",)
TILE_ROWS = 16  # one (16, 128) bfloat16 register


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The kernel's sizes. Powers of two; chunk divides block, and a page divides both."""

    block: int  # tokens fetched at a time
    chunk: int  # tokens attended to at a time, a multiple of 128
    split: int  # parts of the key/value heads, spread over a device's cores
    fold: int  # heads per pass through the matrix unit


def choose_tiling(num_kv_heads: int, width: int, itemsize: int, chip: chips.Chip) -> Tiling:
    """Blocks of about BLOCK_BYTES, and chunks that keep the matrix unit busy even with few heads."""
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
) -> jax.Array:
    """out_BNH in q's dtype. `tiling` defaults to the choice for the target chip."""
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

    subgroups = make_subgroups(tables.group_of_B, tables.prefix_lengths_P.shape[0])
    work, row_B = prefix_work(tables, subgroups, repeats, page_size, tiling.block)
    tiles = num_tiles(batch, subgroups.count_G.shape[0], repeats)
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

    # Rows without an item are uninitialised memory.
    empty_G = tables.prefix_lengths_P[subgroups.group_of_G] <= 0
    no_prefix_B = empty_G.at[subgroups.subgroup_of_B].get(mode="fill", fill_value=True)[:, None, None]
    no_suffix_B = (tables.suffix_lengths_B <= 0)[:, None, None]
    out_BKRH = merge_by_lse(
        jnp.where(no_prefix_B[..., None], 0, from_tiles(prefix_LKXH, row_B, repeats)),
        jnp.where(no_prefix_B, -jnp.inf, from_tiles(prefix_lse_LKX, row_B, repeats)),
        jnp.where(no_suffix_B[..., None], 0, suffix_BKRH),
        jnp.where(no_suffix_B, -jnp.inf, suffix_lse_BKR),
    )
    return out_BKRH.reshape(q_BNH.shape).astype(q_BNH.dtype)


def suffix_work(tables: PageTables, page_size: int, block: int) -> WorkList:
    """One item per sequence; `block` is the kernel's step in tokens."""
    batch, width = tables.suffix_pages_BM.shape
    lengths_B = jnp.clip(tables.suffix_lengths_B, 0, width * page_size)
    index_B = jnp.arange(batch)
    return _compact(lengths_B, index_B, index_B, jnp.zeros_like(index_B), lengths_B > 0, block)


def row_counts(repeats: int) -> tuple[int, ...]:
    """The row counts, in tiles, with a kernel body: for subgroups of up to 4, 16, 32 and 64 sequences."""
    return tuple(sorted({-(-size * repeats // TILE_ROWS) for size in (4, 16, 32, SUBGROUP_SIZE)}))


def num_tiles(batch: int, num_subgroups: int, repeats: int) -> int:
    """Tiles for every grouped query, and room for the largest body to run past the last subgroup's end."""
    return (batch * repeats + (TILE_ROWS - 1) * num_subgroups) // TILE_ROWS + row_counts(repeats)[-1]


def prefix_work(
    tables: PageTables, subgroups: Subgroups, repeats: int, page_size: int, block: int
) -> tuple[WorkList, jax.Array]:
    """One item per subgroup, and the tile row of each sequence's first query (out of range without a subgroup)."""
    width = tables.prefix_pages_PM.shape[1]
    tiles_G = -(-subgroups.count_G * repeats // TILE_ROWS)
    first_G = jnp.cumsum(tiles_G, dtype=jnp.int32) - tiles_G
    lengths_G = jnp.clip(tables.prefix_lengths_P[subgroups.group_of_G], 0, width * page_size)
    bucket_G = (tiles_G[:, None] > np.array(row_counts(repeats))).sum(axis=1)
    work = _compact(lengths_G, subgroups.group_of_G, first_G, bucket_G, tiles_G > 0, block)

    batch, num_subgroups = subgroups.subgroup_of_B.shape[0], subgroups.count_G.shape[0]
    outside = num_tiles(batch, num_subgroups, repeats) * TILE_ROWS
    first_B = first_G.at[subgroups.subgroup_of_B].get(mode="fill", fill_value=0)
    row_B = first_B * TILE_ROWS + subgroups.member_of_B * repeats
    return work, jnp.where(subgroups.subgroup_of_B < num_subgroups, row_B, outside)


def to_tiles(q_BKRH: jax.Array, row_B: jax.Array, tiles: int) -> jax.Array:
    """Each sequence's queries at its row of [L, K, X, H]; padding rows are zeros."""
    batch, num_kv_heads, repeats, width = q_BKRH.shape
    source = jnp.full(tiles * TILE_ROWS, batch * repeats, jnp.int32)
    row_BR = jnp.where(row_B[:, None] < source.shape[0], row_B[:, None] + jnp.arange(repeats), source.shape[0])
    source = source.at[row_BR.reshape(-1)].set(jnp.arange(batch * repeats), mode="drop")
    q_XKH = q_BKRH.swapaxes(1, 2).reshape(batch * repeats, num_kv_heads, width)
    q_XKH = q_XKH.at[source].get(mode="fill", fill_value=0)
    return q_XKH.reshape(tiles, TILE_ROWS, num_kv_heads, width).swapaxes(1, 2)


def from_tiles(x_LKX: jax.Array, row_B: jax.Array, repeats: int) -> jax.Array:
    """The rows of each sequence, [L, K, X, ...] to [B, K, R, ...]; arbitrary rows for a sequence without any."""
    flat = x_LKX.swapaxes(1, 2).reshape(-1, x_LKX.shape[1], *x_LKX.shape[3:])
    row_BR = row_B[:, None] + jnp.arange(repeats)
    return flat.at[row_BR].get(mode="clip").swapaxes(1, 2)


def _compact(
    lengths_J: jax.Array, rows_J: jax.Array, tiles_J: jax.Array, buckets_J: jax.Array, wanted_J: jax.Array, block: int
) -> WorkList:
    """Move the wanted items to the front, keeping their order."""
    wanted_J &= lengths_J > 0
    place_J = jnp.where(wanted_J, jnp.cumsum(wanted_J) - 1, wanted_J.shape[0])
    columns_4J = jnp.stack([lengths_J, rows_J, tiles_J, buckets_J]).astype(jnp.int32)
    columns_4J = jnp.zeros_like(columns_4J).at[:, place_J].set(columns_4J, mode="drop")
    steps = jnp.sum(-(-columns_4J[0] // block), dtype=jnp.int32)
    return WorkList(steps[None], *columns_4J)
