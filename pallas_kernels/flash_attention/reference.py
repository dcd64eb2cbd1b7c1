"""Attention in plain JAX: the reference semantics, and the implementation for platforms without a kernel.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, R = N / K query heads per key-value
head, Q = R * T queries of a key-value head, H head dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# What the backward pass needs besides q, k and v, for rematerialisation policies: with
# `jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)` the attention is not recomputed.
OUT_NAME = "flash_attention_out"  # [B, T, N, H] in the input's dtype
LSE_NAME = "flash_attention_lse"  # [B, T, N] float32; the XLA implementation keeps it only if requested
RESIDUAL_NAMES = (OUT_NAME, LSE_NAME)
_MASKED = -1e30  # finite, so that the maximum of a row without visible keys can be subtracted


def visibility(
    queries: int,
    keys: int,
    *,
    causal: bool,
    q_offset: int | jax.Array,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
) -> jax.Array | None:
    """Which query sees which key, bool [B, T, S] or [1, T, S]; None: all see all.

    Two packed examples of two and three tokens, then padding, causal:

        segment ids  1 1 2 2 2 -1
        token 0      1 . . . . .
        token 1      1 1 . . . .
        token 2      . . 1 . . .
        token 3      . . 1 1 . .
        token 4      . . 1 1 1 .
        token 5      . . . . . .    padding neither sees nor is seen
    """
    visible_BTS = None
    if causal:
        visible_BTS = (jnp.arange(keys) <= jnp.arange(queries)[:, None] + q_offset)[None]
    if q_segment_ids_BT is not None and kv_segment_ids_BS is not None:
        q_ids_BT1, kv_ids_B1S = q_segment_ids_BT[:, :, None], kv_segment_ids_BS[:, None, :]
        same_BTS = (q_ids_BT1 == kv_ids_B1S) & (kv_ids_B1S >= 0)
        visible_BTS = same_BTS if visible_BTS is None else visible_BTS & same_BTS
    return visible_BTS


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    q_offset: int | jax.Array,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`flash_attention` with implementation="xla", on checked arguments; stores all scores at once."""
    visible_BTS = visibility(
        q_BTNH.shape[1],
        k_BSKH.shape[1],
        causal=causal,
        q_offset=q_offset,
        q_segment_ids_BT=q_segment_ids_BT,
        kv_segment_ids_BS=kv_segment_ids_BS,
    )
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale=scale)


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array | None, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention under any mask (bool [B, T, S] or [1, T, S]; None: all visible).

    Returns:
        The output [B, T, N, H] in the dtype of q and the log-sum-exp of the scores [B, T, N] in float32; zero and -inf
        for a query that sees no key. Scores, softmax and sums are float32; both products use the inputs' dtype.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    R = N // K

    # The R query heads that share a key-value head become R * T queries of it: plain batched matrix products, fast on
    # every backend, and no repeated keys.
    q_BKQH = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4).reshape(B, K, R * T, H)
    # Scaling the queries is cheaper than scaling the scores, but would round narrower types once more.
    scale_queries = q_BTNH.dtype == jnp.float32
    q_BKQH = q_BKQH * scale if scale_queries else q_BKQH
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKQS = jnp.matmul(q_BKQH, k_BKHS, preferred_element_type=jnp.float32)
    scores_BKQS = scores_BKQS if scale_queries else scores_BKQS * scale
    if visible_BTS is not None:
        scores_BKQS += jnp.tile(jnp.where(visible_BTS, 0.0, _MASKED), (1, R, 1))[:, None]
    max_BKQ1 = jax.lax.stop_gradient(jnp.max(scores_BKQS, axis=-1, keepdims=True))
    weights_BKQS = jnp.exp(scores_BKQS - max_BKQ1)
    sums_BKQ1 = jnp.sum(weights_BKQS, axis=-1, keepdims=True)
    lse_BKQ1 = max_BKQ1 + jnp.log(sums_BKQ1)
    if visible_BTS is not None:
        sees_BKQ1 = max_BKQ1 > _MASKED / 2
        # If a query sees no key, an infinite sum makes its output and all gradients through it zero.
        sums_BKQ1 = jnp.where(sees_BKQ1, sums_BKQ1, jnp.inf)
        lse_BKQ1 = jnp.where(sees_BKQ1, lse_BKQ1, -jnp.inf)
    # Divide by the sum after the second product, where there is less to divide.
    product_BKQH = jnp.matmul(weights_BKQS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    out_BKQH = _divide(product_BKQH, sums_BKQ1, q_BTNH.dtype)
    out_BTNH = out_BKQH.reshape(B, K, R, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    lse_BTN = lse_BKQ1.reshape(B, K, R, T).transpose(0, 3, 1, 2).reshape(B, T, N)
    return out_BTNH, checkpoint_name(lse_BTN, LSE_NAME)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divide(product: jax.Array, sums: jax.Array, dtype: Any) -> jax.Array:
    """product / sums in `dtype`, with a derivative in terms of the quotient.

    The usual derivative needs `product`, so even a backward pass that kept the attention's output would have to
    recompute the second matrix product.
    """
    return (product / sums).astype(dtype)


@_divide.defjvp
def _divide_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (product, sums), (d_product, d_sums) = primals, tangents
    out = checkpoint_name(_divide(product, sums, dtype), OUT_NAME)
    d_out = (d_product - out.astype(product.dtype) * d_sums) / sums
    return out, d_out.astype(dtype)
