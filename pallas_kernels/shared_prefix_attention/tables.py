"""Page tables of a decoding step: which sequence reads which pages, and prefix groups split to the kernel's size.

A step decodes one token for each of B sequences. The sequences of a prefix group share the group's prefix; each has its
own suffix. Both are in pages of one pool, so a prefix written in one piece is simply a row of consecutive page numbers.
A suffix starts on a new page, even if the prefix's last page is not full.

    group 0     prefix pages 7 8 9 (130 tokens)     sequence 0    suffix pages 3 4 (70 tokens)
                                                    sequence 2    suffix page  5   (12 tokens)
    no group                                        sequence 1    suffix pages 1 2 (99 tokens)

Up to SUBGROUP_SIZE sequences of a group form a subgroup: all their queries use a block of the prefix while it is on the
chip, so the prefix is read once per subgroup. The compiled program forms the subgroups.

Axes: B sequences, P prefix groups, M pages in a row of a table (prefix and suffix rows may differ in width),
G subgroups, H head width, X any leading axes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SUBGROUP_SIZE = 64


class PageTables(NamedTuple):
    """The addresses of one decoding step: a pytree of int32 arrays. Only their shapes are compiled into the program.

    A row with no group in `group_of_B` and an empty suffix is unused and costs nothing.
    """

    prefix_pages_PM: Any  # page numbers of each group's prefix; entries past its length are not read
    prefix_lengths_P: Any  # tokens of each prefix; 0: none
    group_of_B: Any  # each sequence's prefix group, in any order; any value outside [0, P), such as -1: none
    suffix_pages_BM: Any  # page numbers of each sequence's own tokens
    suffix_lengths_B: Any  # tokens of each suffix, including the one just written; 0: none


class Subgroups(NamedTuple):
    """Subgroups in group order, unused ones last."""

    subgroup_of_B: jax.Array  # num_subgroups: none
    member_of_B: jax.Array  # place in its subgroup, from 0
    group_of_G: jax.Array  # in range for unused subgroups too
    count_G: jax.Array  # sequences; 0: unused


def make_subgroups(group_of_B: jax.Array, num_groups: int) -> Subgroups:
    """Subgroups for `group_of_B` in any order; values outside [0, P) join none."""
    batch = group_of_B.shape[0]
    num_subgroups = min(batch, (batch + (SUBGROUP_SIZE - 1) * num_groups) // SUBGROUP_SIZE)  # never needs more
    in_group_BP = group_of_B[:, None] == jnp.arange(num_groups)
    joins_B = in_group_BP.any(axis=1)
    rank_BP = jnp.cumsum(in_group_BP, axis=0, dtype=jnp.int32)  # from 1
    rank_B = jnp.sum(jnp.where(in_group_BP, rank_BP, 0), axis=1) - 1
    count_P = in_group_BP.sum(axis=0, dtype=jnp.int32)
    end_P = jnp.cumsum(-(-count_P // SUBGROUP_SIZE), dtype=jnp.int32)
    first_P = end_P - -(-count_P // SUBGROUP_SIZE)

    group_B = jnp.where(joins_B, group_of_B, 0)
    subgroup_of_B = jnp.where(joins_B, first_P[group_B] + rank_B // SUBGROUP_SIZE, num_subgroups)
    subgroup_G = jnp.arange(num_subgroups, dtype=jnp.int32)
    group_of_G = jnp.minimum((subgroup_G[:, None] >= end_P).sum(axis=1, dtype=jnp.int32), num_groups - 1)
    before_G = SUBGROUP_SIZE * (subgroup_G - first_P[group_of_G])
    return Subgroups(
        subgroup_of_B=subgroup_of_B.astype(jnp.int32),
        member_of_B=jnp.where(joins_B, rank_B % SUBGROUP_SIZE, 0),
        group_of_G=group_of_G,
        count_G=jnp.clip(count_P[group_of_G] - before_G, 0, SUBGROUP_SIZE),
    )


def merge_by_lse(out1_XH: jax.Array, lse1_X: jax.Array, out2_XH: jax.Array, lse2_X: jax.Array) -> jax.Array:
    """Merge attention over two disjoint sets of keys into attention over their union; float32 in and out.

    With o_i = sum_j exp(s_j) v_j / Z_i and lse_i = log Z_i over set i, the result is
    (Z_1 o_1 + Z_2 o_2) / (Z_1 + Z_2). An empty set has lse = -inf and any finite o; two empty sets give zeros.
    """
    lse_X = jnp.logaddexp(lse1_X, lse2_X)
    shift_X = jnp.where(lse_X == -jnp.inf, 0, lse_X)
    return jnp.exp(lse1_X - shift_X)[..., None] * out1_XH + jnp.exp(lse2_X - shift_X)[..., None] * out2_XH
