"""What the TPU kernel is told to do: work items in order, and how queries are laid out in tiles for it.

An item is a run of query tiles and the pages they all attend to: for the prefix a group of trajectories, for the suffix
one trajectory. Items without tokens or queries are left out, so the kernel's loop has no empty turns and its DMA queue
no gaps. A tile is what a head's queries are addressed by: TILE_ROWS rows (trajectory, repeat) of a group, its last tile
filled up with nobody's rows; or in the suffix the R rows of one trajectory.

Axes: B trajectories, G groups, K key/value heads, R query heads of one of them, H head width, J items, L tiles,
X rows of a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.shared_prefix_attention.grouping import MAX_GROUP, Groups
from pallas_kernels.shared_prefix_attention.tables import PageTables

TILE_ROWS = 16  # one (16, 128) bfloat16 register


class WorkList(NamedTuple):
    """Items in the order they are done, which is also that of their tiles. int32; entries past the count are zeros."""

    steps_1: jax.Array  # blocks of all items together
    lengths_J: jax.Array  # tokens
    rows_J: jax.Array  # row of the page table
    tiles_J: jax.Array  # first query tile
    buckets_J: jax.Array  # which of the kernel's row counts holds the item's rows


def _compact(
    lengths_J: jax.Array, rows_J: jax.Array, tiles_J: jax.Array, buckets_J: jax.Array, wanted_J: jax.Array, block: int
) -> WorkList:
    """Move the wanted items to the front, order kept."""
    wanted_J &= lengths_J > 0
    place_J = jnp.where(wanted_J, jnp.cumsum(wanted_J) - 1, wanted_J.shape[0])
    columns_4J = jnp.stack([lengths_J, rows_J, tiles_J, buckets_J]).astype(jnp.int32)
    columns_4J = jnp.zeros_like(columns_4J).at[:, place_J].set(columns_4J, mode="drop")
    steps = jnp.sum(-(-columns_4J[0] // block), dtype=jnp.int32)
    return WorkList(steps[None], *columns_4J)


def suffix_work(tables: PageTables, page_size: int, block: int) -> WorkList:
    """An item a trajectory; `block` is the kernel's step in tokens."""
    batch, width = tables.suffix_pages_BM.shape
    lengths_B = jnp.clip(tables.suffix_lengths_B, 0, width * page_size)
    index_B = jnp.arange(batch)
    return _compact(lengths_B, index_B, index_B, jnp.zeros_like(index_B), lengths_B > 0, block)


def row_counts(repeats: int) -> tuple[int, ...]:
    """The row counts, in tiles, that the kernel has a body for: groups of up to 4, 16, 32 and 64 trajectories."""
    return tuple(sorted({-(-trajectories * repeats // TILE_ROWS) for trajectories in (4, 16, 32, MAX_GROUP)}))


def num_tiles(batch: int, num_groups: int, repeats: int) -> int:
    """Tiles that hold every grouped query, and room for the largest body to run over the last group's end."""
    return (batch * repeats + (TILE_ROWS - 1) * num_groups) // TILE_ROWS + row_counts(repeats)[-1]


def prefix_work(
    tables: PageTables, groups: Groups, repeats: int, page_size: int, block: int
) -> tuple[WorkList, jax.Array]:
    """An item a group, and the tile row of each trajectory's first query (out of range where it is in no group)."""
    width = tables.prefix_pages_PM.shape[1]
    tiles_G = -(-groups.count_G * repeats // TILE_ROWS)
    first_G = jnp.cumsum(tiles_G, dtype=jnp.int32) - tiles_G
    lengths_G = jnp.clip(tables.prefix_lengths_P[groups.problem_of_G], 0, width * page_size)
    bucket_G = (tiles_G[:, None] > np.array(row_counts(repeats))).sum(axis=1)
    work = _compact(lengths_G, groups.problem_of_G, first_G, bucket_G, tiles_G > 0, block)

    batch, num_groups = groups.group_of_B.shape[0], groups.count_G.shape[0]
    outside = num_tiles(batch, num_groups, repeats) * TILE_ROWS
    first_B = first_G.at[groups.group_of_B].get(mode="fill", fill_value=0)
    row_B = first_B * TILE_ROWS + groups.member_of_B * repeats
    return work, jnp.where(groups.group_of_B < num_groups, row_B, outside)


def to_tiles(q_BKRH: jax.Array, row_B: jax.Array, tiles: int) -> jax.Array:
    """Each trajectory's queries at its row of [L, K, X, H]; rows of nobody are zeros."""
    batch, num_kv_heads, repeats, width = q_BKRH.shape
    source = jnp.full(tiles * TILE_ROWS, batch * repeats, jnp.int32)
    row_BR = jnp.where(row_B[:, None] < source.shape[0], row_B[:, None] + jnp.arange(repeats), source.shape[0])
    source = source.at[row_BR.reshape(-1)].set(jnp.arange(batch * repeats), mode="drop")
    q_XKH = q_BKRH.swapaxes(1, 2).reshape(batch * repeats, num_kv_heads, width)
    q_XKH = q_XKH.at[source].get(mode="fill", fill_value=0)
    return q_XKH.reshape(tiles, TILE_ROWS, num_kv_heads, width).swapaxes(1, 2)


def from_tiles(x_LKX: jax.Array, row_B: jax.Array, repeats: int) -> jax.Array:
    """The rows of each trajectory, [L, K, X, ...] to [B, K, R, ...]; for one that has none, any rows."""
    flat = x_LKX.swapaxes(1, 2).reshape(-1, x_LKX.shape[1], *x_LKX.shape[3:])
    row_BR = row_B[:, None] + jnp.arange(repeats)
    return flat.at[row_BR].get(mode="clip").swapaxes(1, 2)
