"""Shared by all sampling implementations: normalized row parameters, token masses, log-probabilities.

Legend: B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sampling import wide

MASS_BITS = 28  # the top token's mass is 2^28: at most eight such masses fit 32 bits
MAX_VOCAB_SIZE = (1 << 19) - 1  # so that the total mass fits a Wide
NO_TOKEN = -1
UNLIMITED = 1 << 30  # top_k when off
_LARGEST = float(np.finfo(np.float32).max)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


class Sample(NamedTuple):
    """The drawn tokens of B rows and their log-probabilities."""

    tokens_B: jax.Array  # int32, or -1 if none can be drawn
    log_probs_B: jax.Array  # float32, under the softmax of the unmodified logits at temperature 1
    sampling_log_probs_B: jax.Array  # float32, under the distribution the token was drawn from


class Parameters(NamedTuple):
    """Row parameters with special cases folded in; all [B], int32 except the first."""

    inverse_temperature: jax.Array  # float32; 1 for a greedy row
    top_k: jax.Array  # UNLIMITED when off; 1 for a greedy row
    top_p: jax.Array  # the bits of a uint32, in units of 2^-32; 0 when off
    nucleus: jax.Array  # 1 where top-p is on
    min_mass: jax.Array  # smallest mass that min-p keeps
    valid: jax.Array  # 1 where the parameters are in range
    random_low: jax.Array  # 64 random bits, as two words
    random_high: jax.Array


def prepare(
    vocab_size: int,
    seeds_B2: jax.Array,
    positions_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
) -> Parameters:
    """The rows' Parameters."""
    position = jax.lax.bitcast_convert_type(positions_B, jnp.uint32)
    random = threefry_2x32((seeds_B2[:, 0], seeds_B2[:, 1]), (position, jnp.zeros_like(position)))

    in_range = (temperature_B >= 0) & (temperature_B <= _LARGEST)  # also false for NaN
    in_range &= (top_p_B >= 0) & (top_p_B <= 1) & (min_p_B >= 0) & (min_p_B <= 1)
    greedy = (temperature_B == 0) | (top_p_B == 0)
    limited = (top_k_B > 0) & (top_k_B < vocab_size)
    nucleus = (top_p_B < 1) & ~greedy
    top_p_B = jnp.where(nucleus & in_range, top_p_B, 0)
    top_p_high = jnp.floor(top_p_B * 65536)
    top_p_low = jnp.floor((top_p_B * 65536 - top_p_high) * 65536)
    return Parameters(
        # Temperatures below the smallest normal number have no finite inverse; _LARGEST gives the same sample.
        inverse_temperature=jnp.where(greedy, 1, jnp.minimum(1 / temperature_B, _LARGEST)).astype(jnp.float32),
        top_k=jnp.where(greedy, 1, jnp.where(limited, top_k_B, UNLIMITED)).astype(jnp.int32),
        top_p=(top_p_high.astype(jnp.int32) << 16) + top_p_low.astype(jnp.int32),
        nucleus=nucleus.astype(jnp.int32),
        min_mass=jnp.where(in_range, jnp.ceil(min_p_B * (1 << MASS_BITS)), 0).astype(jnp.int32),
        valid=in_range.astype(jnp.int32),
        random_low=jax.lax.bitcast_convert_type(random[0], jnp.int32),
        random_high=jax.lax.bitcast_convert_type(random[1], jnp.int32),
    )


def threefry_2x32(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Two random uint32 for every (key, counter), by 20 rounds of Threefry (Salmon et al. 2011)."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            x = x + y
            y = ((y << distance) | (y >> (32 - distance))) ^ x
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def masses(x: jax.Array, top: jax.Array, inverse_temperature: jax.Array) -> jax.Array:
    """exp((x - top) / temperature) in units of 2^-28, rounded to int32. `top` is the largest x, and finite."""
    weights = jnp.exp((x - top) * inverse_temperature)
    return (weights * float(1 << MASS_BITS) + 0.5).astype(jnp.int32)


def finite(top: jax.Array) -> jax.Array:
    """The largest logit, or 0 if all are -inf, so that differences to it are not NaN."""
    return jnp.where(top == -jnp.inf, 0, top)


def finish(
    parameters: Parameters,
    *,
    tokens_B: jax.Array,
    logits_B: jax.Array,
    top_B: jax.Array,
    sum_B: jax.Array,
    kept_mass_B: wide.Wide,
) -> Sample:
    """The Sample from the drawn tokens and their logits.

    Args:
      top_B, sum_B: the largest logit, and the sum of exp(logit - largest) over the vocabulary.
      kept_mass_B: the mass of the tokens that pass all filters.
    """
    log_probs_B = (logits_B - finite(top_B)) - jnp.log(sum_B)
    kept = wide.to_float(kept_mass_B) * 2.0**-MASS_BITS
    sampling_log_probs_B = (logits_B - finite(top_B)) * parameters.inverse_temperature - jnp.log(kept)

    defined = (parameters.valid != 0) & ~jnp.isnan(sum_B)  # a NaN or +inf anywhere makes the sum NaN
    drawn = top_B != -jnp.inf

    def result(x_B: jax.Array) -> jax.Array:
        return jnp.where(defined, jnp.where(drawn, x_B, -jnp.inf), jnp.nan)

    tokens_B = jnp.where(defined & drawn, tokens_B, NO_TOKEN)
    return Sample(tokens_B, result(log_probs_B), result(sampling_log_probs_B))
