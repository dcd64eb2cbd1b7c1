"""Operations on a tile of scores shared by the forward and backward kernels: products, masks, rows to columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.blocks import Geometry, Order

MASKED = -1e30  # a masked score; finite, so that differences of two are not NaN


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    # Float32 operands keep their precision; bfloat16 ones need a single pass.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def take(ref: Any, order: Order, start: int | jax.Array, size: int) -> jax.Array:
    """Some tokens of a block."""
    return ref[:, pl.ds(start, size)] if order.tokens_in_lanes else ref[pl.ds(start, size), :]


def scores(a: jax.Array, b: jax.Array, order: Order) -> jax.Array:
    """Dot products of every token of a with every token of b, [tokens of a, tokens of b]."""
    head = 1 - order.axis
    return _dot(a, b, (head, head))


def weighted(x: jax.Array, weights_XY: jax.Array, order: Order) -> jax.Array:
    """Weighted sums over the X tokens of x, for Y sets of weights, [H, Y]."""
    return _dot(x, weights_XY.astype(x.dtype), (order.axis, 0))


def weighted_by_rows(x: jax.Array, weights_YX: jax.Array, order: Order) -> jax.Array:
    """Weighted sums over the X tokens of x, for Y sets of weights, [H, Y] or [Y, H] in the order of x.

    The order decides which operand the matrix unit holds: heads that do not fill the lanes must stream.
    """
    return _dot(x, weights_YX, (1, 1)) if order.tokens_in_lanes else _dot(weights_YX, x, (1, 0))


def column(row_1X: jax.Array, width: int) -> jax.Array:
    """A row [1, X] as `width` equal columns, [X, width]; X is a multiple of 128."""
    block_X128 = jnp.broadcast_to(row_1X, (128, row_1X.shape[1])).T
    return jnp.concatenate([block_X128] * -(-width // 128), axis=1)[:, :width]


def clear_tail(x: jax.Array, geometry: Geometry, query_block: jax.Array) -> jax.Array:
    """A block of queries or their cotangents, with zeros where the last block extends past the end."""
    real = geometry.num_queries % geometry.block_q
    if real == 0:
        return x
    end = geometry.num_queries - query_block * geometry.block_q
    return _fill_from(x, end, at_least=real, axis=geometry.order.axis, value=0.0)


def strike_tail(scores: jax.Array, geometry: Geometry, axis: int) -> jax.Array:
    """The scores of the last key block, keys along `axis`, with the places past the end masked."""
    real = geometry.num_keys % geometry.block_kv
    return _fill_from(scores, real, at_least=real, axis=axis, value=MASKED)


def _fill_from(x: jax.Array, end: int | jax.Array, *, at_least: int, axis: int, value: float) -> jax.Array:
    """x with `value` from `end` on; end >= `at_least`, so whole registers before that are left alone."""
    whole = at_least // 128 * 128
    kept, tail = jax.lax.slice_in_dim(x, 0, whole, axis=axis), jax.lax.slice_in_dim(x, whole, None, axis=axis)
    place = jax.lax.broadcasted_iota(jnp.int32, tail.shape, axis)
    tail = jnp.where(place < end - whole, tail.astype(jnp.float32), value).astype(x.dtype)
    return jnp.concatenate([kept, tail] if whole else [tail], axis=axis)


def visible(
    shape: tuple[int, int],
    *,
    q_axis: int,
    first_query: jax.Array,
    first_key: jax.Array,
    causal: bool,
    num_keys: int | None,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
) -> jax.Array:
    """The mask of a tile with queries along `q_axis`.

    Pass `num_keys` if the tile may include keys past the end. The ids must broadcast to the tile: a row for those along
    axis 1, columns for those along axis 0.
    """
    query = jax.lax.broadcasted_iota(jnp.int32, shape, q_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
    mask = None
    if causal:
        mask = key - query <= first_query - first_key
    if num_keys is not None:
        inside = key < num_keys - first_key
        mask = inside if mask is None else mask & inside
    if q_ids is not None and kv_ids is not None:
        same = (q_ids == kv_ids) & (kv_ids >= 0)
        mask = same if mask is None else mask & same
    return jnp.ones(shape, bool) if mask is None else mask
