"""Which queries read a prefix together: groups of trajectories of one problem, computed inside the compiled program.

A group is up to MAX_GROUP trajectories of one problem: their queries meet every block of the prefix while it is on the
chip, so the prefix is read once a group. A problem of at most MAX_GROUP trajectories is one group.

Axes: B trajectories, P problems, G groups, I the trajectories of a group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_GROUP = 64


class Groups(NamedTuple):
    """Groups in the order of their problems, the unused ones last."""

    group_of_B: jax.Array  # num_groups: none
    member_of_B: jax.Array  # place in its group, from 0
    problem_of_G: jax.Array  # in range for unused groups too
    count_G: jax.Array  # trajectories; 0: unused


def max_groups(batch: int, num_problems: int) -> int:
    """How many groups B trajectories of P problems can need at most."""
    return min(batch, (batch + (MAX_GROUP - 1) * num_problems) // MAX_GROUP)


def group_trajectories(problem_of_B: jax.Array, num_problems: int) -> Groups:
    """Groups for `problem_of_B` in any order; values outside [0, P) join none."""
    num_groups = max_groups(problem_of_B.shape[0], num_problems)
    in_problem_BP = problem_of_B[:, None] == jnp.arange(num_problems)
    joins_B = in_problem_BP.any(axis=1)
    rank_BP = jnp.cumsum(in_problem_BP, axis=0, dtype=jnp.int32)  # from 1
    rank_B = jnp.sum(jnp.where(in_problem_BP, rank_BP, 0), axis=1) - 1
    count_P = in_problem_BP.sum(axis=0, dtype=jnp.int32)
    end_P = jnp.cumsum(-(-count_P // MAX_GROUP), dtype=jnp.int32)
    first_P = end_P - -(-count_P // MAX_GROUP)

    problem_B = jnp.where(joins_B, problem_of_B, 0)
    group_of_B = jnp.where(joins_B, first_P[problem_B] + rank_B // MAX_GROUP, num_groups)
    group_G = jnp.arange(num_groups, dtype=jnp.int32)
    problem_of_G = jnp.minimum((group_G[:, None] >= end_P).sum(axis=1, dtype=jnp.int32), num_problems - 1)
    before_G = MAX_GROUP * (group_G - first_P[problem_of_G])
    return Groups(
        group_of_B=group_of_B.astype(jnp.int32),
        member_of_B=jnp.where(joins_B, rank_B % MAX_GROUP, 0),
        problem_of_G=problem_of_G,
        count_G=jnp.clip(count_P[problem_of_G] - before_G, 0, MAX_GROUP),
    )
