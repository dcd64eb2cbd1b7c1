"""Elementwise integers of up to 47 bits from 32-bit ones: TPU cores, and JAX by default, have no 64-bit integers.

The mass of a whole vocabulary is such an integer. A Wide is high * 2^16 + low with 0 <= low < 2^16, in two int32 arrays
of the same shape. Everything here is exact and works inside Mosaic kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LIMB = 16
_LIMB_MASK = 0xFFFF


class Wide(NamedTuple):
    """high * 2^16 + low, nonnegative."""

    high: jax.Array
    low: jax.Array


def normalized(high: jax.Array, low: jax.Array) -> Wide:
    """high * 2^16 + low, where `low` may exceed 16 bits."""
    return Wide(high + jax.lax.shift_right_logical(low, _constant(low, _LIMB)), low & _LIMB_MASK)


def split(x: jax.Array) -> Wide:
    """A 32-bit unsigned integer, given as an int32 with the same bits."""
    return normalized(jnp.zeros_like(x), x)


def add(a: Wide, b: Wide) -> Wide:
    return normalized(a.high + b.high, a.low + b.low)


def subtract(a: Wide, b: Wide) -> Wide:
    """a - b for a >= b."""
    borrow = (a.low < b.low).astype(jnp.int32)
    return Wide(a.high - b.high - borrow, a.low - b.low + (borrow << _LIMB))


def less(a: Wide, b: Wide) -> jax.Array:
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def where(condition: jax.Array, a: Wide, b: Wide) -> Wide:
    return Wide(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def to_float(a: Wide) -> jax.Array:
    """`a` to about 24 bits."""
    return a.high.astype(jnp.float32) * float(1 << _LIMB) + a.low.astype(jnp.float32)


def wrapped(a: Wide) -> jax.Array:
    """`a` modulo 2^32, as an int32: small differences of two of these are exact."""
    return (a.high << _LIMB) + a.low


def times(a: jax.Array, b: jax.Array) -> Wide:
    """The product, below 2^47, of two nonnegative int32."""
    return _product(_limbs(split(a))[:2], _limbs(split(b))[:2], dropped=0, round_up=False)


def fraction(a: Wide, words: Sequence[jax.Array], round_up: bool = False) -> Wide:
    """a * w / 2^(32 n), rounded down or up, for a number w of n int32 words, least significant first."""
    limbs = [limb for word in words for limb in _limbs(split(word))[:2]]
    return _product(_limbs(a), limbs, dropped=len(limbs), round_up=round_up)


def ratio(a: Wide, b: jax.Array) -> jax.Array:
    """a / b for b >= 1 that divides a, with a quotient below 2^29: exact for any rounding of divisions."""
    divisor = b.astype(jnp.float32)
    estimate = (to_float(a) / divisor).astype(jnp.int32)
    # The estimate is off by at most 2^29 * 2^-22, so the rest fits 32 bits and its own quotient is off by < 1/2.
    rest = wrapped(a) - estimate * b
    return estimate + jnp.floor(rest.astype(jnp.float32) / divisor + 0.5).astype(jnp.int32)


def ceil_ratio(a: Wide, b: jax.Array) -> jax.Array:
    """The smallest n with n * b >= a, for 1 <= b <= 2^28 and n below 2^20: exact for any rounding of divisions."""
    estimate = (to_float(a) / b.astype(jnp.float32)).astype(jnp.int32)
    rest = wrapped(a) - estimate * b  # |rest| < 2 b
    return estimate - 1 + sum((rest > step * b).astype(jnp.int32) for step in (-1, 0, 1))


def _limbs(a: Wide) -> list[jax.Array]:
    high, low = a.high.astype(jnp.uint32), a.low.astype(jnp.uint32)
    return [low, high & _LIMB_MASK, high >> _LIMB]


def _product(a: Sequence[jax.Array], b: Sequence[jax.Array], *, dropped: int, round_up: bool) -> Wide:
    """The product of two numbers in 16-bit limbs without its `dropped` lowest limbs; at most three limbs remain."""
    zero = jnp.zeros_like(a[0])
    columns = [zero + (_LIMB_MASK if round_up and i < dropped else 0) for i in range(len(a) + len(b))]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product = x * y
            columns[i + j] += product & _LIMB_MASK
            columns[i + j + 1] += product >> _LIMB
    for i in range(len(columns) - 1):
        columns[i + 1] += columns[i] >> _LIMB
        columns[i] &= _LIMB_MASK
    low, middle, high = (columns[dropped:] + [zero] * 3)[:3]
    return Wide((middle | (high << _LIMB)).astype(jnp.int32), low.astype(jnp.int32))


def _constant(like: jax.Array, value: int) -> jax.Array:
    return jnp.full_like(like, value)
