"""The tokens that a row keeps and the point in their mass where it draws, without sorting.

Every filter keeps a prefix of the tokens, ordered by descending logit, ties by ascending id. So two filters together
keep the shorter of their prefixes, and a prefix is a threshold and a number of tokens tied at it. We find the threshold
by bisection over integers that sort like float32 numbers: exact after at most 33 probes, earlier when at most one
token is undecided or exactly k are kept.

Arrays hold one value per row, in any common shape: [B, 1] for XLA, [R, L] with R rows and equal lanes for Mosaic. Both
share this code; they differ in how they measure the tokens at or above a threshold and locate the drawn one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.sampling import wide
from pallas_kernels.sampling.parameters import MASS_BITS, UNLIMITED, Parameters
from pallas_kernels.sampling.wide import Wide

_Tree = TypeVar("_Tree")
_WEIGHTLESS = 0.5 + (MASS_BITS + 1) * math.log(2)  # times temperature: tokens this far below the top have no mass
_SIGNLESS = 0x7FFFFFFF
_LARGEST_SUBNORMAL = 0x007FFFFF


class Measure(NamedTuple):
    """The size and mass of a set of tokens."""

    count: jax.Array
    mass: Wide


class Draw(NamedTuple):
    """How to find a row's token.

    Among tokens with low <= logit < high and mass at least `min_mass`, it is the first, by id, whose cumulative mass
    exceeds `target`.
    """

    low: jax.Array
    high: jax.Array
    min_mass: jax.Array
    unfiltered: jax.Array  # int32, 1 where neither top-k nor top-p binds: low is -inf and high inf
    target: Wide
    total: Wide  # the mass of all kept tokens
    found: jax.Array  # int32, 0 where a threshold is at or below the floor, and all else is invalid


class _Bracket(NamedTuple):
    """The tokens at or above `lower` meet the goal; those at or above `upper` do not."""

    lower: jax.Array
    upper: jax.Array
    at_lower: Measure
    at_upper: Measure


def key_of(x: jax.Array) -> jax.Array:
    """int32 keys that sort like the float32. Subnormal numbers share zero's key, as in TPU comparisons."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.maximum((bits & _SIGNLESS) - _LARGEST_SUBNORMAL, 0)
    return jnp.where(bits < 0, -key, key)


def value_of(key: jax.Array) -> jax.Array:
    """The inverse of `key_of`."""
    bits = jnp.where(key == 0, 0, jnp.abs(key) + _LARGEST_SUBNORMAL)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(key < 0, -value, value)


def select(
    parameters: Parameters,
    *,
    top: jax.Array,
    floor: jax.Array,
    all_mass: Wide,
    at_min_p: Measure,
    measure: Callable[[jax.Array], Measure],
) -> Draw:
    """The rows' Draw.

    Args:
      parameters: of the rows.
      top: the largest logit, finite.
      floor: thresholds at or below it cannot be measured; -inf if all can.
      all_mass: the mass of all tokens.
      at_min_p: the Measure of the tokens whose mass is at least parameters.min_mass.
      measure: maps thresholds to the Measure of the tokens at or above them.
    """

    def at_key(key: jax.Array) -> Measure:
        return measure(value_of(key))

    zero = jnp.zeros_like(parameters.top_k)
    no_mass = Wide(zero, zero)
    top_key, floor_key = key_of(top), key_of(floor)
    valid = parameters.valid != 0

    # Top-k.
    limited = valid & (parameters.top_k != UNLIMITED)
    bracket = _Bracket(floor_key, top_key + 1, Measure(zero + UNLIMITED, all_mass), Measure(zero, no_mass))
    bracket = _bisect(
        bracket, limited, lambda at: at.count >= parameters.top_k, lambda at: at.count == parameters.top_k, at_key
    )
    found = ~limited | (bracket.lower > floor_key) | (floor == -jnp.inf)
    tied, tied_mass = _ties(bracket)
    kept_ties = jnp.where(limited, parameters.top_k - bracket.at_upper.count, tied)

    # Top-p, of the mass that top-k keeps. All mass lies above `weightless`.
    weightless = key_of(top - _WEIGHTLESS / parameters.inverse_temperature) - 1
    nucleus = valid & (parameters.nucleus != 0)
    wanted = wide.fraction(_kept_mass(bracket, tied, tied_mass, kept_ties), [parameters.top_p], round_up=True)
    one = Wide(zero, zero + 1)
    wanted = wide.where(wide.less(wanted, one), one, wanted)
    from_top = bracket._replace(
        lower=jnp.where(limited, bracket.lower, jnp.maximum(bracket.lower, weightless)),
        upper=top_key + 1,
        at_upper=Measure(zero, no_mass),
    )
    bracket = _where(nucleus, from_top, bracket)
    bracket = _bisect(bracket, nucleus, lambda at: ~wide.less(at.mass, wanted), lambda at: at.count < 0, at_key)
    found &= ~nucleus | (bracket.lower > floor_key) | (floor == -jnp.inf)
    tied, tied_mass = _ties(bracket)
    missing = wide.subtract(wanted, bracket.at_upper.mass)
    kept_ties = jnp.where(nucleus, wide.ceil_ratio(missing, jnp.maximum(tied_mass, 1)), kept_ties)

    # Min-p keeps a prefix too.
    unfiltered = at_min_p.count <= bracket.at_upper.count + kept_ties
    total = wide.where(unfiltered, at_min_p.mass, _kept_mass(bracket, tied, tied_mass, kept_ties))
    target = wide.fraction(total, [parameters.random_low, parameters.random_high])

    # If only some of the tied tokens are kept, they come last. All have the same mass, so the target can reach only the
    # kept ones.
    all_ties = kept_ties == tied
    among_ties = ~unfiltered & ~all_ties & ~wide.less(target, bracket.at_upper.mass)
    low = value_of(jnp.where(all_ties | among_ties, bracket.lower, bracket.upper))
    return Draw(
        low=jnp.where(unfiltered, -jnp.inf, low),
        high=jnp.where(among_ties, value_of(bracket.upper), jnp.inf),
        min_mass=jnp.where(unfiltered, parameters.min_mass, 0),
        unfiltered=unfiltered.astype(jnp.int32),
        target=wide.where(among_ties, wide.subtract(target, bracket.at_upper.mass), target),
        total=total,
        found=found.astype(jnp.int32),
    )


def _bisect(
    bracket: _Bracket,
    active: jax.Array,
    meets: Callable[[Measure], jax.Array],
    settles: Callable[[Measure], jax.Array],
    measure: Callable[[jax.Array], Measure],
) -> _Bracket:
    """Narrow the active rows' brackets until only one number or one token is left, or the row is settled."""

    def open_rows(bracket: _Bracket) -> jax.Array:
        undecided = bracket.at_lower.count - bracket.at_upper.count > 1
        return active & (bracket.lower + 1 < bracket.upper) & undecided & ~settles(bracket.at_lower)

    def step(state: tuple[jax.Array, _Bracket]) -> tuple[jax.Array, _Bracket]:
        i, bracket = state
        # The first probe is the top itself, which settles greedy rows and one-token nuclei.
        middle = (bracket.lower & bracket.upper) + ((bracket.lower ^ bracket.upper) >> 1)
        probe = jnp.where(i == 0, bracket.upper - 1, middle)
        found = measure(probe)
        moves = open_rows(bracket)
        up = moves & meets(found)
        down = moves & ~meets(found)
        bracket = _Bracket(
            lower=jnp.where(up, probe, bracket.lower),
            upper=jnp.where(down, probe, bracket.upper),
            at_lower=_where(up, found, bracket.at_lower),
            at_upper=_where(down, found, bracket.at_upper),
        )
        return i + 1, bracket

    return jax.lax.while_loop(lambda state: jnp.any(open_rows(state[1])), step, (jnp.int32(0), bracket))[1]


def _ties(bracket: _Bracket) -> tuple[jax.Array, jax.Array]:
    """The number of tokens between the ends of a bracket and, if they are tied, the mass of one."""
    tied = bracket.at_lower.count - bracket.at_upper.count
    mass = wide.subtract(bracket.at_lower.mass, bracket.at_upper.mass)
    return tied, wide.ratio(mass, jnp.maximum(tied, 1))


def _kept_mass(bracket: _Bracket, tied: jax.Array, tied_mass: jax.Array, kept_ties: jax.Array) -> Wide:
    some = wide.add(bracket.at_upper.mass, wide.times(kept_ties, tied_mass))
    return wide.where(kept_ties == tied, bracket.at_lower.mass, some)


def _where(condition: jax.Array, a: _Tree, b: _Tree) -> _Tree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
