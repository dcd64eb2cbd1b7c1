"""Attention with grouped queries over packed rows.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, R query heads a key-value head, H head
dim.
"""

import jax
import jax.numpy as jnp

from stepjax.config import AttentionImplementation

_MASKED = -1e30  # finite, so that a row without any visible key gives a mean and not NaN


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    segment_ids_BT: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
    implementation: AttentionImplementation = "xla",
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v with grouped queries, softmax in float32; [B, T, N, H].

    A token sees the tokens of its own segment only (packed rows), those up to itself if `causal`, and where `mask_BTS`
    is true. Two packed examples of two and three tokens, then one of padding (segment 0), causal:

        segment_ids  1 1 2 2 2 0
        token 0      1 . . . . .
        token 1      1 1 . . . .
        token 2      . . 1 . . .
        token 3      . . 1 1 . .
        token 4      . . 1 1 1 .
        token 5      . . . . . 1    padding sees padding: finite, and weighed by zero in the loss
    """
    assert implementation == "xla", implementation
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    R = N // K
    visible_BTS = mask_BTS
    for mask in (_causal(T, S) if causal else None, _same_segment(segment_ids_BT)):
        if mask is not None:
            visible_BTS = mask if visible_BTS is None else visible_BTS & mask

    # The R query heads that share a key-value head become R * T queries of it: plain batched matrix products, which
    # every backend has a fast path for, and no repeated keys.
    q_BKQH = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4).reshape(B, K, R * T, H) * H**-0.5
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKQS = jnp.matmul(q_BKQH, k_BKHS, preferred_element_type=jnp.float32)
    if visible_BTS is not None:
        scores_BKQS += jnp.tile(jnp.where(visible_BTS, 0.0, _MASKED), (1, R, 1))[:, None]
    # The division by the sum waits until after the second product, where there is less to divide.
    weights_BKQS = jnp.exp(scores_BKQS - jax.lax.stop_gradient(jnp.max(scores_BKQS, axis=-1, keepdims=True)))
    sums_BKQ1 = jnp.sum(weights_BKQS, axis=-1, keepdims=True)
    out_BKQH = jnp.matmul(weights_BKQS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32) / sums_BKQ1
    out_BTNH = out_BKQH.reshape(B, K, R, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out_BTNH.astype(q_BTNH.dtype)


def _causal(queries: int, keys: int) -> jax.Array:
    return (jnp.arange(keys) <= jnp.arange(queries)[:, None])[None]


def _same_segment(segment_ids_BT: jax.Array | None) -> jax.Array | None:
    return None if segment_ids_BT is None else segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
