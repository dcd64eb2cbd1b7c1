"""Sampling in XLA, on any platform: the kernel's bisection over whole arrays, with bit-identical results.

Legend: B rows, V vocabulary in C chunks of L = 128 lanes; N parts of it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.sampling import parameters, selection, wide
from pallas_kernels.sampling.parameters import Parameters, Sample
from pallas_kernels.sampling.selection import Draw, Measure
from pallas_kernels.sampling.wide import Wide

LANES = 128
_CARRY_FREE = 8  # this many masses always fit 32 bits


def sample(logits_BV: jax.Array, rows: Parameters) -> Sample:
    top_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
    sum_B = jnp.sum(jnp.exp(logits_BV - parameters.finite(top_B1)), axis=1)
    padding = -logits_BV.shape[1] % (LANES * _CARRY_FREE)
    x_BV = jnp.pad(logits_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    rows_B1: Parameters = jax.tree.map(lambda x_B: x_B[:, None], rows)
    mass_BV = parameters.masses(x_BV, parameters.finite(top_B1), rows_B1.inverse_temperature)

    def among(kept_BV: jax.Array) -> Measure:
        count = jnp.sum(kept_BV, axis=1, dtype=jnp.int32, keepdims=True)
        return Measure(count, _sum(jnp.where(kept_BV, mass_BV, 0)))

    draw = selection.select(
        rows_B1,
        top=parameters.finite(top_B1),
        floor=jnp.full_like(top_B1, -jnp.inf),
        all_mass=_sum(mass_BV),
        at_min_p=among(mass_BV >= rows_B1.min_mass),
        measure=lambda threshold_B1: among(x_BV >= threshold_B1),
    )
    tokens_B = _locate(x_BV, mass_BV, draw)
    return parameters.finish(
        rows,
        tokens_B=tokens_B,
        logits_B=jnp.take_along_axis(x_BV, tokens_B[:, None], axis=1)[:, 0],
        top_B=top_B1[:, 0],
        sum_B=sum_B,
        kept_mass_B=jax.tree.map(lambda x_B1: x_B1[:, 0], draw.total),
    )


def _sum(mass_BV: jax.Array) -> Wide:
    """The sum over the vocabulary, [B, 1]."""
    part_BN = jnp.sum(mass_BV.reshape(len(mass_BV), _CARRY_FREE, -1), axis=1)
    part = wide.split(part_BN)
    low_B1 = jnp.sum(part.low, axis=1, keepdims=True, dtype=jnp.uint32)
    high_B1 = jnp.sum(part.high, axis=1, keepdims=True)
    carry_B1 = (low_B1 >> 16).astype(jnp.int32)
    return Wide(high_B1 + carry_B1, (low_B1 & 0xFFFF).astype(jnp.int32))


def _locate(x_BV: jax.Array, mass_BV: jax.Array, draw: Draw) -> jax.Array:
    """The drawn tokens [B]."""
    drawn_BV = (x_BV >= draw.low) & (x_BV < draw.high) & (mass_BV >= draw.min_mass)
    mass_BCL = jnp.where(drawn_BV, mass_BV, 0).reshape(len(x_BV), -1, LANES)
    mass_BC = wide.normalized(*(jnp.sum(part, axis=2) for part in wide.split(mass_BCL)))
    chunk_B1, target = _advance(draw.target, mass_BC)
    mass_BL = jnp.take_along_axis(mass_BCL, chunk_B1[:, :, None], axis=1)[:, 0]
    lane_B1, _ = _advance(target, wide.split(mass_BL))
    return (chunk_B1 * LANES + lane_B1)[:, 0]


def _advance(target: Wide, mass_BN: Wide) -> tuple[jax.Array, Wide]:
    """The index of the part that contains the target, [B, 1], and the target within it."""
    upto_BN = _cumulative(mass_BN)
    passed_BN = ~wide.less(target, upto_BN)
    last = passed_BN.shape[1] - 1  # used if no part has any mass
    part_B1 = jnp.minimum(jnp.sum(passed_BN, axis=1, dtype=jnp.int32, keepdims=True), last)
    before = wide.subtract(
        *(jax.tree.map(lambda x: jnp.take_along_axis(x, part_B1, axis=1), m) for m in (upto_BN, mass_BN))
    )
    return part_B1, wide.subtract(target, before)


def _cumulative(a: Wide) -> Wide:
    return wide.normalized(jnp.cumsum(a.high, axis=1), jnp.cumsum(a.low, axis=1))
