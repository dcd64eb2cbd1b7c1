"""Stand-ins for cuDNN where there is no GPU: JAX's own XLA form, and the packed layout written out with a mask.

Legend: B rows, T tokens, N query heads, K key-value heads, H head dim, M slots of a row.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels.flash_attention import gpu_packed

_plain = jax.nn.dot_product_attention


def present(monkeypatch, *, hopper: bool = False) -> None:
    """JAX asks for cuDNN's version, and for the GPU's generation, when it traces."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    if hopper:
        monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)


def stand_in(monkeypatch) -> None:
    """Every call of cuDNN runs as XLA."""

    def unpacked(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return _plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", unpacked)
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", packed)
    monkeypatch.setattr(gpu_packed, "GROUPED", True)


def packed(q_BTNH, k_BTKH, v_BTKH, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """cuDNN's packed layout as JAX's private function documents it; NaN in what cuDNN does not write."""
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
    (B, M), T = q_seqlen.shape, q_BTNH.shape[1]
    assert q_offsets.shape == (B, M + 1) and M > 1, "a single slot is not packed"
    # JAX drops every negative entry and moves the others to the left: starts and lengths must be empty together.
    first_BM = jnp.where((q_offsets[:, :M] < 0) == (q_seqlen < 0), q_offsets[:, :M], T + 1)
    offset_BTM = jnp.arange(T)[:, None] - first_BM[:, None]
    inside_BTM = (offset_BTM >= 0) & (offset_BTM < q_seqlen[:, None]) & (first_BM >= 0)[:, None]
    visible_BTS = jnp.any(inside_BTM[:, :, None] & inside_BTM[:, None], axis=-1)
    if mask_type == fused_attention_stablehlo.MaskType.PADDING_CAUSAL:
        visible_BTS &= jnp.tril(jnp.ones((T, T), bool))
    else:
        assert mask_type == fused_attention_stablehlo.MaskType.PADDING
    return _packed(q_BTNH, k_BTKH, v_BTKH, visible_BTS, scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(q_BTNH, k_BTKH, v_BTKH, visible_BTS, scale):
    covered_BT11 = jnp.any(visible_BTS, axis=-1)[:, :, None, None]
    q_BTNH, k_BTKH, v_BTKH = (jnp.where(covered_BT11, x, 0) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BTNH = _plain(q_BTNH, k_BTKH, v_BTKH, mask=visible_BTS[:, None], scale=scale, implementation="xla")
    return jnp.where(covered_BT11, out_BTNH, jnp.nan)


def _forward(q_BTNH, k_BTKH, v_BTKH, visible_BTS, scale):
    out_BTNH, pullback = jax.vjp(lambda q, k, v: _packed.fun(q, k, v, visible_BTS, scale), q_BTNH, k_BTKH, v_BTKH)
    return out_BTNH, (pullback, visible_BTS)


def _backward(scale, kept, d_out_BTNH):
    pullback, visible_BTS = kept
    covered_BT11 = jnp.any(visible_BTS, axis=-1)[:, :, None, None]
    gradients = pullback(jnp.where(covered_BT11, d_out_BTNH, 0))
    return (*(jnp.where(covered_BT11, x, jnp.nan) for x in gradients), None)


_packed.defvjp(_forward, _backward)
