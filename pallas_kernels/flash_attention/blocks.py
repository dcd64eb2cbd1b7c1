"""The nonempty blocks of the score matrix, in the order the kernels visit them.

Legend: B rows of the batch, I query blocks, J key blocks, R query heads per key-value head, M items.

A kernel walks a list of items instead of the whole grid of blocks, so blocks left empty by the causal and segment
structure cost nothing. Causal attention over two packed segments (a and b), four blocks per side:

            j=0 1 2 3
    i=0  a    T . . .     T triangle: on the diagonal, half empty; skips its sub-blocks above the diagonal
    i=1  a    F T . .     F full: every query sees every key, no mask
    i=2  ab   G G G .     G general: computes a mask
    i=3  b    . . G T     . not visited

Array operations build the list: if segment ids or offsets are traced, it is computed on the device at run time, and a
new packing does not recompile. It is conservative: a block is visited if the id ranges of its queries and keys overlap.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import check

FULL, TRIANGLE, GENERAL = 0, 1, 2  # kinds, in the two lowest bits
FIRST_OF_QUERY, LAST_OF_QUERY, FIRST_OF_KEY, LAST_OF_KEY = 4, 8, 16, 32  # flags above them
_KIND_BITS = 6
_ROW_SHIFT = 16
MAX_ITEMS = 60_000  # two words per item, in a scalar memory of 1 MiB

_NO_SEGMENT = np.iinfo(np.int32).max

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """Layout of queries, keys and values: [B, N, H, T], with tokens in the lanes of a register, or [B, N, T, H].

    Heads of size 128 fill the lanes. Size 96 would waste a quarter of the registers, bandwidth and memory; and XLA's
    projections already produce tokens in the lanes.
    """

    tokens_in_lanes: bool

    @classmethod
    def of(cls, head_dim: int) -> "Order":
        return cls(head_dim % 128 != 0)

    @property
    def axis(self) -> int:
        """The token axis of a one-head block."""
        return 1 if self.tokens_in_lanes else 0

    def pair(self, token: Any, head: Any) -> tuple[Any, Any]:
        """`token` and `head`, sizes or indices, in the order of a block's two axes."""
        return (head, token) if self.tokens_in_lanes else (token, head)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Tokens and head dim of an array."""
        return shape[-2 + self.axis], shape[-1 - self.axis]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static part of the block structure. Keys are padded to whole blocks; `num_keys` counts the real ones.

    Queries may end inside the last block; a kernel reads undefined values past their end.
    """

    num_query_blocks: int
    num_key_blocks: int
    block_q: int
    block_kv: int
    num_queries: int  # of the kernel's query array
    num_keys: int
    causal: bool
    static_offset: int | None  # position of query 0 among the keys; None if traced
    diagonal: int  # keys per sub-block of a triangle
    order: Order = Order(False)

    @property
    def padded_keys(self) -> int:
        return self.num_key_blocks * self.block_kv

    @property
    def lanes_q(self) -> int:
        """Queries of a block, rounded up to whole registers."""
        return -(-self.block_q // 128) * 128

    @property
    def is_ragged(self) -> bool:
        """Whether the last key block extends past the end."""
        return self.num_keys % self.block_kv != 0

    @property
    def has_triangles(self) -> bool:
        aligned = self.static_offset is not None and self.static_offset % self.block_q == 0
        return self.causal and self.block_q == self.block_kv and aligned and self.block_q % self.diagonal == 0

    @property
    def has_general(self) -> bool:
        """Whether blocks can need a mask for reasons other than segments."""
        return self.is_ragged or (self.causal and not self.has_triangles)


class Items(NamedTuple):
    """A kernel's visits in order: `count` of them; the remaining entries repeat the last.

    where_M packs row << 16 | query block (counted over heads in the backward pass); what_M packs
    key block << 6 | flags | kind; done_M is the query block whose gradient is finished at the item, or next after it
    (backward pass only).
    """

    where_M: jax.Array
    what_M: jax.Array
    done_M: jax.Array
    count: jax.Array | int


def row_and_query(where: jax.Array) -> tuple[jax.Array, jax.Array]:
    return where >> _ROW_SHIFT, where & ((1 << _ROW_SHIFT) - 1)


def key(what: jax.Array) -> jax.Array:
    return what >> _KIND_BITS


def kind(what: jax.Array) -> jax.Array:
    return what & 3


def structure(
    geometry: Geometry,
    num_rows: int,
    q_offset: jax.Array | int,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
) -> tuple[Array, Array]:
    """Which blocks are visited and their kinds: bool [B, I, J], int32 [B, I, J].

    Segment ids are padded to whole blocks with negative ids, which neither see nor are seen. Without traced inputs
    the result is NumPy: the list becomes a constant of the program and the grid size static.
    """
    g = geometry
    static = g.static_offset is not None and q_segment_ids_BT is None
    xp, offset = (np, g.static_offset) if static else (jnp, q_offset)
    first_query_I = xp.arange(g.num_query_blocks) * g.block_q + offset
    first_key_J = xp.arange(g.num_key_blocks) * g.block_kv
    visited_IJ = xp.ones((g.num_query_blocks, g.num_key_blocks), bool) & (first_key_J < g.num_keys)
    full_IJ = visited_IJ & (first_key_J + g.block_kv <= g.num_keys)
    if g.causal:
        visited_IJ &= first_key_J <= first_query_I[:, None] + g.block_q - 1
        full_IJ &= first_key_J + g.block_kv - 1 <= first_query_I[:, None]
    kind_IJ = xp.where(full_IJ, FULL, GENERAL)
    if g.has_triangles:
        kind_IJ = xp.where(first_key_J == first_query_I[:, None], TRIANGLE, kind_IJ)
    shape = num_rows, g.num_query_blocks, g.num_key_blocks
    visited_BIJ, kind_BIJ = xp.broadcast_to(visited_IJ, shape), xp.broadcast_to(kind_IJ, shape)
    if q_segment_ids_BT is None or kv_segment_ids_BS is None:
        return visited_BIJ, kind_BIJ

    q_low_BI, q_high_BI, q_pure_BI = _id_range(q_segment_ids_BT, g.block_q)
    kv_low_BJ, kv_high_BJ, kv_pure_BJ = _id_range(kv_segment_ids_BS, g.block_kv)
    meets_BIJ = (q_low_BI[:, :, None] <= kv_high_BJ[:, None]) & (kv_low_BJ[:, None] <= q_high_BI[:, :, None])
    same_BIJ = q_pure_BI[:, :, None] & kv_pure_BJ[:, None] & (q_low_BI[:, :, None] == kv_low_BJ[:, None])
    kind_BIJ = jnp.where((kind_BIJ == FULL) & ~same_BIJ, GENERAL, kind_BIJ)
    return visited_BIJ & meets_BIJ, kind_BIJ


def _id_range(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lowest and highest id of every block, ignoring padding, and whether the whole block has one id."""
    ids_BIQ = ids_BT.reshape(ids_BT.shape[0], -1, block)
    real_BIQ = ids_BIQ >= 0
    low_BI = jnp.min(jnp.where(real_BIQ, ids_BIQ, _NO_SEGMENT), axis=-1)
    high_BI = jnp.max(jnp.where(real_BIQ, ids_BIQ, -1), axis=-1)
    return low_BI, high_BI, (low_BI == high_BI) & jnp.all(real_BIQ, axis=-1)


def max_visits(geometry: Geometry) -> int:
    """The maximum number of visited blocks per row, for any segments."""
    g = geometry
    if not g.causal or g.static_offset is None:
        return g.num_query_blocks * g.num_key_blocks
    last_key = np.arange(g.num_query_blocks) * g.block_q + g.static_offset + g.block_q - 1
    return int(np.clip(last_key // g.block_kv + 1, 1, g.num_key_blocks).sum())


def forward_items(visited_BIJ: Array, kind_BIJ: Array, limit: int) -> Items:
    """The items grouped by query block. A query block that sees nothing is visited once, to write zeros."""
    visited_BIJ = _visit_first(visited_BIJ, axis=2)
    flags_BIJ = _first(visited_BIJ, 2) * FIRST_OF_QUERY + _last(visited_BIJ, 2) * LAST_OF_QUERY
    B, I, J = visited_BIJ.shape
    b, i, j = np.meshgrid(*map(np.arange, (B, I, J)), indexing="ij")
    return _pack(visited_BIJ, b, i, j, kind_BIJ + flags_BIJ, B * limit)


def backward_items(visited_BIJ: Array, kind_BIJ: Array, heads: int, chunk: int, limit: int) -> Items:
    """The items grouped by chunk of query blocks, then by key block, over all `heads` that share it.

    Query blocks are numbered r * I + i over the heads and padded to whole chunks. Every query block and, in each chunk,
    every key block is visited at least once, to write zeros.
    """
    xp = _namespace(visited_BIJ)
    B, I, J = visited_BIJ.shape
    needed_BCQJ = _fold(visited_BIJ, heads, chunk, False)
    exists_CQ1 = (np.arange(needed_BCQJ.shape[1] * chunk) < heads * I).reshape(-1, chunk, 1)
    visited_BCQJ = _visit_first(needed_BCQJ, axis=3) & exists_CQ1
    visited_BCQJ = _visit_first(visited_BCQJ, axis=2)
    # Blocks visited only to write zeros must compute a mask.
    kind_BCQJ = xp.where(needed_BCQJ, _fold(kind_BIJ, heads, chunk, GENERAL), GENERAL)

    visited_BCJQ, kind_BCJQ = visited_BCQJ.swapaxes(2, 3), kind_BCQJ.swapaxes(2, 3)
    flags_BCJQ = (
        _first(visited_BCJQ, 2) * FIRST_OF_QUERY
        + _last(visited_BCJQ, 2) * LAST_OF_QUERY
        + _first(visited_BCJQ, 3) * FIRST_OF_KEY
        + _last(visited_BCJQ, 3) * LAST_OF_KEY
    )
    C = visited_BCJQ.shape[1]
    b, c, j, q = np.meshgrid(*map(np.arange, (B, C, J, chunk)), indexing="ij")
    slack = C * (J + chunk)  # forced visits of empty blocks
    limit = min(limit * heads + slack, C * chunk * J)
    return _pack(visited_BCJQ, b, c * chunk + q, j, kind_BCJQ + flags_BCJQ, B * limit)


def _namespace(x: Array) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _visit_first(visited: Array, axis: int) -> Array:
    """`visited`, plus the first place along `axis` wherever none was visited."""
    xp = _namespace(visited)
    shape = [1] * visited.ndim
    shape[axis] = -1
    return visited | (~xp.any(visited, axis=axis, keepdims=True) & (np.arange(visited.shape[axis]) == 0).reshape(shape))


def _fold(x_BIJ: Array, heads: int, chunk: int, fill: object) -> Array:
    """[B, I, J] to [B, chunks, chunk, J]: the query blocks of all heads, head by head."""
    xp = _namespace(x_BIJ)
    B, I, J = x_BIJ.shape
    x_BQJ = xp.tile(x_BIJ, (1, heads, 1))
    x_BQJ = xp.pad(x_BQJ, ((0, 0), (0, -heads * I % chunk), (0, 0)), constant_values=fill)
    return x_BQJ.reshape(B, -1, chunk, J)


def _first(visited: Array, axis: int) -> Array:
    xp = _namespace(visited)
    return (visited & (xp.cumsum(visited, axis) == 1)).astype(np.int32)


def _last(visited: Array, axis: int) -> Array:
    xp = _namespace(visited)
    return xp.flip(_first(xp.flip(visited, axis), axis), axis)


def _pack(visited: Array, row: np.ndarray, query: np.ndarray, key: np.ndarray, what: Array, limit: int) -> Items:
    xp = _namespace(visited)
    count = int(visited.sum()) if xp is np else jnp.sum(visited).astype(jnp.int32)
    size = count if isinstance(count, int) else limit
    check(
        size <= MAX_ITEMS,
        f"block_sizes give {size:,} blocks to visit in one call, more than the {MAX_ITEMS:,} that fit scalar memory: "
        "make the blocks larger or split the batch",
    )
    if isinstance(count, int):
        index_M = np.flatnonzero(visited)
    else:
        # A stable sort puts visited blocks first, in order. (jnp.nonzero's scatter goes to the sparse cores of v5p and
        # later, where libtpu 0.0.52 fails to compile it.)
        index_M = jnp.argsort(~visited.ravel(), stable=True)[:size]
        index_M = jnp.where(jnp.arange(size) < count, index_M, index_M[count - 1])
    where_M = xp.asarray((row << _ROW_SHIFT) | query).ravel()[index_M].astype(np.int32)
    what_M = (xp.asarray(key << _KIND_BITS) | what).ravel()[index_M].astype(np.int32)
    # For each item, the next one (itself included) that finishes a query block; after the last such item, that one.
    position_M = np.arange(size)
    finishes_M = ((what_M & LAST_OF_QUERY) > 0) & (position_M < count)
    # (In jnp, minimum.accumulate is a loop of scalar steps.)
    backwards_minimum = partial(jax.lax.cummin, reverse=True) if xp is jnp else _backwards_minimum
    next_M = backwards_minimum(xp.where(finishes_M, position_M, size).astype(np.int32))
    final = xp.max(xp.where(finishes_M, position_M, 0))
    done_M = where_M[xp.where(next_M < size, next_M, final)]
    return Items(jnp.asarray(where_M), jnp.asarray(what_M), jnp.asarray(done_M), count)


def _backwards_minimum(x_M: np.ndarray) -> np.ndarray:
    return np.flip(np.minimum.accumulate(np.flip(x_M)))
