"""Two softmaxes over disjoint sets of keys, made into one over their union.

With o_i = sum_j exp(s_j) v_j / Z_i and lse_i = log Z_i over set i, the union has lse = log(Z_1 + Z_2) and
o = (Z_1 o_1 + Z_2 o_2) / (Z_1 + Z_2). An empty set has lse = -inf and whatever finite o. (Hydragen, arXiv 2402.05099.)
"""

import jax
import jax.numpy as jnp


def merge_by_lse(
    out1_XH: jax.Array, lse1_X: jax.Array, out2_XH: jax.Array, lse2_X: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """float32 in and out; X any leading axes. Both sets empty: zeros and -inf."""
    lse_X = jnp.logaddexp(lse1_X, lse2_X)
    shift_X = jnp.where(lse_X == -jnp.inf, 0, lse_X)
    return jnp.exp(lse1_X - shift_X)[..., None] * out1_XH + jnp.exp(lse2_X - shift_X)[..., None] * out2_XH, lse_X
