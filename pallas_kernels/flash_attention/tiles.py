"""What the forward and the backward kernel share inside a tile of scores: products, masks, rows turned into columns."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.blocks import Geometry

MASKED = -1e30  # a score that no query sees; finite, so that differences of two stay numbers


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    # Float32 operands keep their precision; bfloat16 ones need a single pass.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def dot_nn(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b"""
    return _dot(a, b, (1, 0))


def dot_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T"""
    return _dot(a, b, (1, 1))


def dot_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b"""
    return _dot(a, b, (0, 0))


def dot_tt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b^T"""
    return _dot(a, b, (0, 1))


def column(row_1X: jax.Array, width: int) -> jax.Array:
    """A row [1, X] as X equal columns [X, width]; X and width are multiples of 128."""
    block_X128 = jnp.broadcast_to(row_1X, (128, row_1X.shape[1])).T
    return jnp.concatenate([block_X128] * (width // 128), axis=1)


def strike_tail(scores: jax.Array, geometry: Geometry, axis: int) -> jax.Array:
    """The scores of the last key block, keys along `axis`, with the places past the end struck out."""
    real = geometry.num_keys % geometry.block_kv
    whole = real // 128 * 128  # whole registers of real keys are not looked at
    kept = jax.lax.slice_in_dim(scores, 0, whole, axis=axis)
    tail = jax.lax.slice_in_dim(scores, whole, None, axis=axis)
    tail = jnp.where(jax.lax.broadcasted_iota(jnp.int32, tail.shape, axis) < real - whole, tail, MASKED)
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
    """The mask of a tile whose queries run along `q_axis`.

    `num_keys` is given where keys past the end are among the tile's. The ids are broadcast to the tile: a row for what
    runs along axis 1, columns for axis 0.
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
