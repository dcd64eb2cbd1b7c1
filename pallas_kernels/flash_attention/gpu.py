"""Attention on NVIDIA GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, R = N / K query heads per key-value
head, H head dim, C query chunks, Q queries of a chunk.

cuDNN directly supports grouped queries, and the causal mask if T == S. The public JAX function offers no more, so:
- packed rows, where the ids of queries and keys are the same array, take gpu_packed.py if JAX and the GPU allow it.
- other segment ids and q_offset become a dense mask [B or 1, 1, T, S], which JAX turns into an additive mask of the
  input's dtype: 2 B T S bytes. Odd lengths, which JAX rejects in training, need it too unless causal.
- a query that sees no key would get the mean of the values; we set its output to zero.
- cuDNN's log-sum-exp is rounded to the input's dtype and has no gradient; on request XLA recomputes it in float32, a
  chunk of queries at a time.

Run on an H200 by benchmarks/gpu.py: in its six cases the bfloat16 errors of values and gradients are at most 1.6 times
those of the XLA implementation. Tests without a GPU check that JAX accepts these calls and lowers them for CUDA to the
cuDNN custom calls, forward and backward, and that the values are right with JAX's XLA implementation in place of cuDNN.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.checks import ArgumentError, check
from pallas_kernels.flash_attention import gpu_packed
from pallas_kernels.flash_attention.reference import LSE_NAME, OUT_NAME, visibility

_LSE_QUERIES = 512  # per chunk of the log-sum-exp


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
    with_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`flash_attention` with implementation="gpu", on checked arguments.

    Returns:
        The output, and the log-sum-exp if `with_lse`.

    Raises:
        ArgumentError: cuDNN is missing or rejects the head dim, on any GPU or on this one.
    """
    (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    check(H % 8 == 0 and H <= 256, f"H is {H}; cuDNN takes multiples of 8 up to 256: pad it, or use 'xla'")
    find_visible = partial(visibility, T, S, q_segment_ids_BT=q_segment_ids_BT, kv_segment_ids_BS=kv_segment_ids_BS)
    visible_BTS = find_visible(causal=causal, q_offset=q_offset)
    # cuDNN's own causal mask skips blocks above the diagonal. If T == S, top-left and bottom-right alignment agree.
    plain_causal = causal and T == S and isinstance(q_offset, int) and q_offset == 0

    # JAX rejects odd lengths in training.
    odd_T, odd_S = T % 2, S % 2
    padded = (_even(q_BTNH), _even(k_BSKH), _even(v_BSKH))
    packed_ids_BT = q_segment_ids_BT if q_segment_ids_BT is kv_segment_ids_BS and plain_causal == causal else None
    if packed_ids_BT is not None and gpu_packed.available(*padded[:2], causal=causal):
        ids_BT = jnp.pad(packed_ids_BT, ((0, 0), (0, odd_T)), constant_values=-1)
        out_BTNH = gpu_packed.attention(*padded, ids_BT, causal=causal, scale=scale)[:, :T]
    else:
        mask_BTS = find_visible(causal=causal and not plain_causal, q_offset=q_offset)
        # The causal mask hides the extra key; without it we need a dense mask.
        if mask_BTS is None and odd_S and not plain_causal:
            mask_BTS = jnp.ones((1, T, S), bool)
        mask_B1TS = None if mask_BTS is None else jnp.pad(mask_BTS, ((0, 0), (0, odd_T), (0, odd_S)))[:, None]
        try:
            out_BTNH = _cudnn(*padded, mask_B1TS, plain_causal, scale)[:, :T]
        except (NotImplementedError, RuntimeError) as error:  # the GPU's generation, or no cuDNN at all
            raise ArgumentError(f"implementation='gpu' is not available here, use 'xla': {error}") from error
        if mask_B1TS is not None and visible_BTS is not None:
            out_BTNH = jnp.where(jnp.any(visible_BTS, axis=-1)[:, :, None, None], out_BTNH, 0)
    if not with_lse:
        return out_BTNH, None
    return out_BTNH, checkpoint_name(_log_sum_exp(q_BTNH, k_BSKH, visible_BTS, scale), LSE_NAME)


def _even(x_BTNH: jax.Array) -> jax.Array:
    return jnp.pad(x_BTNH, ((0, 0), (0, 1), (0, 0), (0, 0))) if x_BTNH.shape[1] % 2 else x_BTNH


def _dot_product_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_B1TS: jax.Array | None, causal: bool, scale: float
) -> jax.Array:
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=causal, scale=scale, implementation="cudnn"
    )


_cudnn = jax.custom_vjp(_dot_product_attention, nondiff_argnums=(4, 5))


def _cudnn_forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_B1TS: jax.Array | None, causal: bool, scale: float
) -> tuple[jax.Array, Any]:
    """JAX's own rule, with names on its residuals: the output and the softmax statistics [B, N, T]."""
    out_BTNH, pullback = jax.vjp(
        lambda q_BTNH, k_BSKH, v_BSKH: _dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask_B1TS, causal, scale),
        q_BTNH,
        k_BSKH,
        v_BSKH,
    )
    named_BTNH = checkpoint_name(out_BTNH, OUT_NAME)
    B, T, N, _ = q_BTNH.shape

    def name(kept: Any) -> Any:
        if kept is out_BTNH:
            return named_BTNH
        is_statistics = getattr(kept, "shape", None) == (B, N, T) and kept.dtype == jnp.float32
        return checkpoint_name(kept, LSE_NAME) if is_statistics else kept

    return named_BTNH, jax.tree.map(name, pullback)


def _cudnn_backward(causal: bool, scale: float, pullback: Any, d_out_BTNH: jax.Array) -> tuple[Any, ...]:
    return (*pullback(d_out_BTNH), None)


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


def _log_sum_exp(q_BTNH: jax.Array, k_BSKH: jax.Array, visible_BTS: jax.Array | None, scale: float) -> jax.Array:
    """Log-sum-exp of the visible scores [B, T, N] in float32; -inf if a query sees no key."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    chunks = -(-T // _LSE_QUERIES)
    Q = -(-T // chunks)
    missing = chunks * Q - T
    q_CBQKRH = jnp.moveaxis(
        jnp.pad(q_BTNH, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(B, chunks, Q, K, N // K, H), 1, 0
    )
    if visible_BTS is None:
        visible_BTS = jnp.ones((1, T, S), bool)
    visible_CBQS = jnp.moveaxis(
        jnp.pad(visible_BTS, ((0, 0), (0, missing), (0, 0))).reshape(visible_BTS.shape[0], chunks, Q, S), 1, 0
    )

    @jax.checkpoint
    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BQKRH, visible_BQS = chunk
        scores_BQKRS = scale * jnp.einsum("BQKRH,BSKH->BQKRS", q_BQKRH, k_BSKH, preferred_element_type=jnp.float32)
        scores_BQKRS = jnp.where(visible_BQS[:, :, None, None, :], scores_BQKRS, -1e30)
        # Select before and after, because even an unselected -inf would make the gradient NaN.
        sees_BQ11 = jnp.any(visible_BQS, axis=-1)[:, :, None, None]
        return jnp.where(sees_BQ11, jax.nn.logsumexp(scores_BQKRS, axis=-1), -jnp.inf)

    lse_CBQKR = jax.lax.map(of_chunk, (q_CBQKRH, visible_CBQS))
    return jnp.moveaxis(lse_CBQKR, 0, 1).reshape(B, chunks * Q, N)[:, :T]
