"""Which blocks of the score matrix hold anything, in the order the kernels visit them.

Legend: B rows of the batch, I query blocks, J key blocks, R query heads a key-value head, M items.

A kernel walks a list of items instead of the whole grid of blocks, so that blocks which the causal and the segment
structure leave empty cost nothing. Causal attention over two packed segments (a and b), four blocks a side:

            j=0 1 2 3
    i=0  a    T . . .     T triangle: on the diagonal, half empty, its sub-blocks above the diagonal are not computed
    i=1  a    F T . .     F full: every query sees every key, no mask is computed
    i=2  ab   G G G .     G general: a mask is computed
    i=3  b    . . G T     . not visited

The list is made of array operations: where segment ids or offsets are traced it is computed on the device at run time,
and a change of the packing compiles nothing. It is conservative: a block whose range of segment ids meets that of its
keys is visited.
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
MAX_ITEMS = 60_000  # two words an item, in a scalar memory of 1 MiB

_NO_SEGMENT = np.iinfo(np.int32).max

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """How queries, keys and values lie: [B, N, H, T], tokens in the lanes of a register, or [B, N, T, H].

    Heads of 128 fill the lanes themselves. Of 96 they would leave a quarter of the registers, of the bandwidth and of
    the memory empty; and tokens in the lanes is how XLA's projections come out.
    """

    tokens_in_lanes: bool

    @classmethod
    def of(cls, head_dim: int) -> "Order":
        return cls(head_dim % 128 != 0)

    @property
    def axis(self) -> int:
        """Of tokens, in a block of one head."""
        return 1 if self.tokens_in_lanes else 0

    def pair(self, token: Any, head: Any) -> tuple[Any, Any]:
        """What belongs to the two axes of a block, in order: sizes, or indices."""
        return (head, token) if self.tokens_in_lanes else (token, head)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Tokens and head dim of an array."""
        return shape[-2 + self.axis], shape[-1 - self.axis]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static part of the block structure. Keys are padded to whole blocks; `num_keys` counts the real ones.

    Queries may end inside the last block: what a kernel reads past their end is undefined.
    """

    num_query_blocks: int
    num_key_blocks: int
    block_q: int
    block_kv: int
    num_queries: int  # of the array that the kernel is given
    num_keys: int
    causal: bool
    static_offset: int | None  # position of query 0 among the keys; None where it is traced
    diagonal: int  # keys of a sub-block of a triangle
    order: Order = Order(False)

    @property
    def padded_keys(self) -> int:
        return self.num_key_blocks * self.block_kv

    @property
    def lanes_q(self) -> int:
        """Queries of a block in whole registers."""
        return -(-self.block_q // 128) * 128

    @property
    def is_ragged(self) -> bool:
        """Whether the last key block holds places past the end."""
        return self.num_keys % self.block_kv != 0

    @property
    def has_triangles(self) -> bool:
        aligned = self.static_offset is not None and self.static_offset % self.block_q == 0
        return self.causal and self.block_q == self.block_kv and aligned and self.block_q % self.diagonal == 0

    @property
    def has_general(self) -> bool:
        """Whether blocks can need a mask of their own for another reason than segments."""
        return self.is_ragged or (self.causal and not self.has_triangles)


class Items(NamedTuple):
    """The visits of a kernel, in order; `count` of them, the rest repeats the last.

    where_M packs row << 16 | query block (times heads, in the backward pass); what_M key block << 6 | flags | kind;
    done_M is the query block whose gradient is finished at or next after the item (backward pass only).
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
    """Which blocks are visited and of what kind they are: bool [B, I, J], int32 [B, I, J].

    Segment ids are padded to whole blocks with negative ids, which see and are seen by nothing. Where nothing is traced
    the answer is NumPy's: the list becomes a constant of the program, and the size of the grid a number.
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
    """Lowest and highest id of every block, padding apart, and whether the block is all of one id."""
    ids_BIQ = ids_BT.reshape(ids_BT.shape[0], -1, block)
    real_BIQ = ids_BIQ >= 0
    low_BI = jnp.min(jnp.where(real_BIQ, ids_BIQ, _NO_SEGMENT), axis=-1)
    high_BI = jnp.max(jnp.where(real_BIQ, ids_BIQ, -1), axis=-1)
    return low_BI, high_BI, (low_BI == high_BI) & jnp.all(real_BIQ, axis=-1)


def max_visits(geometry: Geometry) -> int:
    """The most blocks of a row that can be visited, whatever the segments."""
    g = geometry
    if not g.causal or g.static_offset is None:
        return g.num_query_blocks * g.num_key_blocks
    last_key = np.arange(g.num_query_blocks) * g.block_q + g.static_offset + g.block_q - 1
    return int(np.clip(last_key // g.block_kv + 1, 1, g.num_key_blocks).sum())


def forward_items(visited_BIJ: Array, kind_BIJ: Array, limit: int) -> Items:
    """Every query block's keys in a row. A block that sees nothing is visited once, to write its zeros."""
    visited_BIJ = _visit_first(visited_BIJ, axis=2)
    flags_BIJ = _first(visited_BIJ, 2) * FIRST_OF_QUERY + _last(visited_BIJ, 2) * LAST_OF_QUERY
    B, I, J = visited_BIJ.shape
    b, i, j = np.meshgrid(*map(np.arange, (B, I, J)), indexing="ij")
    return _pack(visited_BIJ, b, i, j, kind_BIJ + flags_BIJ, B * limit)


def backward_items(visited_BIJ: Array, kind_BIJ: Array, heads: int, chunk: int, limit: int) -> Items:
    """Every key block's queries in a row, of all `heads` that share it, for one chunk of query blocks after another.

    Query blocks are counted over the heads: number r * I + i, padded to whole chunks. Every query block and, in each
    chunk, every key block is visited at least once, to write its zeros.
    """
    xp = _namespace(visited_BIJ)
    B, I, J = visited_BIJ.shape
    needed_BCQJ = _fold(visited_BIJ, heads, chunk, False)
    exists_CQ1 = (np.arange(needed_BCQJ.shape[1] * chunk) < heads * I).reshape(-1, chunk, 1)
    visited_BCQJ = _visit_first(needed_BCQJ, axis=3) & exists_CQ1
    visited_BCQJ = _visit_first(visited_BCQJ, axis=2)
    # Blocks visited only to write zeros must compute a mask, whatever they would have been.
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
    slack = C * (J + chunk)  # visits forced on blocks that hold nothing
    limit = min(limit * heads + slack, C * chunk * J)
    return _pack(visited_BCJQ, b, c * chunk + q, j, kind_BCJQ + flags_BCJQ, B * limit)


def _namespace(x: Array) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _visit_first(visited: Array, axis: int) -> Array:
    """`visited`, with the first place along `axis` where there was none."""
    xp = _namespace(visited)
    shape = [1] * visited.ndim
    shape[axis] = -1
    return visited | (~xp.any(visited, axis=axis, keepdims=True) & (np.arange(visited.shape[axis]) == 0).reshape(shape))


def _fold(x_BIJ: Array, heads: int, chunk: int, fill: object) -> Array:
    """[B, I, J] to [B, chunks, chunk, J]: the query blocks of all heads, one head after the other."""
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
        f"block_sizes make {size:,} blocks to visit in one call, more than the {MAX_ITEMS:,} the scalar memory holds: "
        "make the blocks larger or split the batch",
    )
    if isinstance(count, int):
        index_M = np.flatnonzero(visited)
    else:
        # A stable sort puts the visited ones first, in order. (jnp.nonzero's scatter goes to the sparse cores of v5p
        # and later, where libtpu 0.0.52 fails to compile it.)
        index_M = jnp.argsort(~visited.ravel(), stable=True)[:size]
        index_M = jnp.where(jnp.arange(size) < count, index_M, index_M[count - 1])
    where_M = xp.asarray((row << _ROW_SHIFT) | query).ravel()[index_M].astype(np.int32)
    what_M = (xp.asarray(key << _KIND_BITS) | what).ravel()[index_M].astype(np.int32)
    # The next item at or after each that finishes a query block; after the last such item, that one.
    position_M = np.arange(size)
    finishes_M = ((what_M & LAST_OF_QUERY) > 0) & (position_M < count)
    # (numpy's minimum.accumulate is a loop of scalar steps in jnp.)
    backwards_minimum = partial(jax.lax.cummin, reverse=True) if xp is jnp else _backwards_minimum
    next_M = backwards_minimum(xp.where(finishes_M, position_M, size).astype(np.int32))
    final = xp.max(xp.where(finishes_M, position_M, 0))
    done_M = where_M[xp.where(next_M < size, next_M, final)]
    return Items(jnp.asarray(where_M), jnp.asarray(what_M), jnp.asarray(done_M), count)


def _backwards_minimum(x_M: np.ndarray) -> np.ndarray:
    return np.flip(np.minimum.accumulate(np.flip(x_M)))
