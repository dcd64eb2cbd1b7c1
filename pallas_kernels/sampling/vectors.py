"""Blocks of the TPU kernel in vectors: [R, L] is one, R = 8 rows by L = 128 lanes, and [R, CHUNK] are 8 side by side.

Values of a row are kept in a whole vector, equal in its lanes: a broadcast over lanes that is left to the compiler
costs a hundred cycles wherever it is used.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.sampling import wide
from pallas_kernels.sampling.wide import Wide

ROWS = 8
LANES = 128
VECTORS = 8  # of a chunk: their masses add up within 32 bits
CHUNK = VECTORS * LANES


def lanes(chunk: Any) -> Any:
    return pl.ds(chunk * CHUNK if isinstance(chunk, int) else pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)


def spread(x: jax.Array) -> jax.Array:
    """[R, 1] to [R, L]."""
    return jnp.broadcast_to(x, (ROWS, LANES))


def tile(x: jax.Array) -> jax.Array:
    """[R, L] to [R, CHUNK]; it costs nothing, for all vectors are one."""
    return jnp.concatenate([x] * VECTORS, axis=1)


def vectors(x: jax.Array) -> list[jax.Array]:
    """[R, CHUNK] to VECTORS of [R, L]."""
    return [x[:, i * LANES : (i + 1) * LANES] for i in range(VECTORS)]


def fold(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[R, CHUNK] to [R, L], lane by lane, as a tree."""
    parts = vectors(x)
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def accumulate(total: Wide, mass: jax.Array) -> Wide:
    """Add 32-bit masses, carrying nothing yet: the low part outgrows its 16 bits by one for every mass at most."""
    part = wide.split(mass)
    return Wide(total.high + part.high, total.low + part.low)


def over_lanes(mass: Wide) -> Wide:
    """[..., R, L]: the sum over lanes, in all of them."""
    mass = wide.normalized(*mass)
    return wide.normalized(lane_sum(mass.high, long=True), lane_sum(mass.low))


def lane_sum(x: jax.Array, long: bool = False) -> jax.Array:
    """As `over_lanes`, of integers below 2^17 or, if `long`, 2^31: in float32, which adds 128 of 17 bits exactly."""
    if long:
        return (lane_sum(x >> 16) << 16) + lane_sum(x & 0xFFFF)
    return jnp.broadcast_to(jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True), x.shape).astype(jnp.int32)
