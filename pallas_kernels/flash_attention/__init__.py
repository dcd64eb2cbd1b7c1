"""Softmax attention over packed rows with grouped queries, without storing the scores: one function, every platform.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels.checks import ArgumentError, check, check_choice, check_dtype, check_shape
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.reference import RESIDUAL_NAMES

if TYPE_CHECKING:
    from pallas_kernels.flash_attention.tpu import BlockSizes

__all__ = ["LOG2_UNITS", "RESIDUAL_NAMES", "Implementation", "flash_attention"]

# The scale to pass if the queries already include their scale and a factor of log2(e): the TPU kernel then uses them
# directly, without a scaled copy.
LOG2_UNITS = math.log(2)

Implementation = Literal["xla", "tpu", "gpu"]
_DTYPES = {
    "xla": (jnp.bfloat16, jnp.float16, jnp.float32),
    "tpu": (jnp.bfloat16, jnp.float32),
    "gpu": (jnp.bfloat16, jnp.float16),
}


@overload
def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = ...,
    q_offset: int | jax.Array = ...,
    q_segment_ids_BT: jax.Array | None = ...,
    kv_segment_ids_BS: jax.Array | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation = ...,
    interpret: Any = ...,
    block_sizes: "BlockSizes | None" = ...,
) -> jax.Array: ...


@overload
def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = ...,
    q_offset: int | jax.Array = ...,
    q_segment_ids_BT: jax.Array | None = ...,
    kv_segment_ids_BS: jax.Array | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation = ...,
    interpret: Any = ...,
    block_sizes: "BlockSizes | None" = ...,
) -> tuple[jax.Array, jax.Array]: ...


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = False,
    q_offset: int | jax.Array = 0,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "xla",
    interpret: Any = False,
    block_sizes: "BlockSizes | None" = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * q k^T) v over the keys that each query sees; differentiable in q, k and v.

    Query head n reads key-value head n // (N / K). With `causal`, query t sees the keys s <= t + q_offset. With segment
    ids, a query sees only keys with the same id. A negative id marks padding: padded keys are never seen and may have
    any values, even NaN; padded queries have output zero and no gradient. A query that sees no key has output zero,
    log-sum-exp -inf and no gradient.

    Args:
        q_BTNH: queries [B, T, N, H]; bfloat16 or float32, on a GPU bfloat16 or float16.
        k_BSKH: keys [B, S, K, H] of the same dtype; N is a multiple of K.
        v_BSKH: values [B, S, K, H] of the same dtype.
        q_offset: position of the first query among the keys, such as the start of a prefill chunk or of a sequence
            shard. An int, or an int32 scalar that may be traced (new values do not recompile). Only with `causal`.
        q_segment_ids_BT: int32 [B, T].
        kv_segment_ids_BS: int32 [B, S]. If T == S, either of the two serves for both.
        scale: H ** -0.5 by default; see LOG2_UNITS.
        return_lse: also return the log-sum-exp (natural logarithm) of the scores, for merging partial results over
            parts of the keys.
        implementation: "xla" runs everywhere and stores all scores, "tpu" is the Mosaic kernel, "gpu" is cuDNN. With
            one array of ids for queries and keys, "gpu" expects the tokens of a segment side by side, as packing puts
            them: a row in which an id returns after another one is NaN.
        interpret: run the TPU kernel in interpret mode, for tests: a bool or `pltpu.InterpretParams`.
        block_sizes: of the TPU kernel; None chooses them for the target chip.

    Returns:
        The output [B, T, N, H] in the dtype of q, or a pair of it and the log-sum-exp [B, T, N] in float32. Both are
        differentiable and named RESIDUAL_NAMES for rematerialisation policies.

    Raises:
        ArgumentError: an invalid shape, dtype or option; the message names it.

    Source: Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691), sections 2 and 3.1.
    """
    q_BTNH, k_BSKH, v_BSKH = jnp.asarray(q_BTNH), jnp.asarray(k_BSKH), jnp.asarray(v_BSKH)
    check_choice("implementation", implementation, tuple(_DTYPES))
    _check_arrays(q_BTNH, k_BSKH, v_BSKH, implementation)
    if implementation != "tpu":
        check(not interpret, f"interpret={interpret!r} is only for the TPU kernel; omit it for {implementation!r}")
        check(block_sizes is None, f"block_sizes are only for the TPU kernel; omit them for {implementation!r}")
    q_offset = _checked_offset(q_offset, causal)
    q_ids_BT, kv_ids_BS = _checked_segment_ids(q_BTNH, k_BSKH, q_segment_ids_BT, kv_segment_ids_BS)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    if not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ArgumentError(f"scale is {scale!r}; it must be a finite Python number")

    # These selects keep padded values out of every product, and cotangents of padded queries out of the gradients.
    padded_q_BT11 = None if q_ids_BT is None else (q_ids_BT < 0)[:, :, None, None]
    if padded_q_BT11 is not None and kv_ids_BS is not None:
        padded_kv_BS11 = (kv_ids_BS < 0)[:, :, None, None]
        q_BTNH = jnp.where(padded_q_BT11, 0, q_BTNH)
        k_BSKH, v_BSKH = jnp.where(padded_kv_BS11, 0, k_BSKH), jnp.where(padded_kv_BS11, 0, v_BSKH)

    arguments: dict[str, Any] = dict(
        causal=causal, q_offset=q_offset, q_segment_ids_BT=q_ids_BT, kv_segment_ids_BS=kv_ids_BS, scale=float(scale)
    )
    # Import an implementation only when used: it may import only on its own platform.
    if implementation == "tpu":
        from pallas_kernels.flash_attention import tpu

        out_BTNH, lse_BTN = tpu.attention(
            q_BTNH, k_BSKH, v_BSKH, **arguments, interpret=interpret, block_sizes=block_sizes
        )
    elif implementation == "gpu":
        from pallas_kernels.flash_attention import gpu

        out_BTNH, lse_BTN = gpu.attention(q_BTNH, k_BSKH, v_BSKH, **arguments, with_lse=return_lse)
    else:
        out_BTNH, lse_BTN = reference.attention(q_BTNH, k_BSKH, v_BSKH, **arguments)

    if padded_q_BT11 is not None:
        out_BTNH = jnp.where(padded_q_BT11, 0, out_BTNH)
        lse_BTN = None if lse_BTN is None else jnp.where(padded_q_BT11[..., 0], -jnp.inf, lse_BTN)
    if not return_lse:
        return out_BTNH
    assert lse_BTN is not None
    return out_BTNH, lse_BTN


def _check_arrays(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, implementation: str) -> None:
    check_shape("q_BTNH", q_BTNH, (None, None, None, None), "[B, T, N, H]")
    B, T, N, H = q_BTNH.shape
    check_shape("k_BSKH", k_BSKH, (B, None, None, H), "[B, S, K, H]")
    check_shape("v_BSKH", v_BSKH, k_BSKH.shape, "[B, S, K, H], as k_BSKH")
    S, K = k_BSKH.shape[1:3]
    for name, size in (("B", B), ("T", T), ("N", N), ("H", H), ("S", S), ("K", K)):
        check(size > 0, f"{name} is 0 in q_BTNH {q_BTNH.shape} and k_BSKH {k_BSKH.shape}; skip the call instead")
    check(N % K == 0, f"q_BTNH has {N} heads and k_BSKH {K}; the query heads must be a multiple of the key-value heads")
    check_dtype("q_BTNH", q_BTNH, *_DTYPES[implementation])
    check_dtype("k_BSKH", k_BSKH, q_BTNH.dtype)
    check_dtype("v_BSKH", v_BSKH, q_BTNH.dtype)


def _checked_offset(q_offset: int | jax.Array, causal: bool) -> int | jax.Array:
    if isinstance(q_offset, int) and not isinstance(q_offset, bool):
        check(causal or q_offset == 0, f"q_offset is {q_offset}, but has no meaning without causal=True; drop it")
        return q_offset
    check(causal, "q_offset is an array, but has no meaning without causal=True; drop it")
    q_offset = jnp.asarray(q_offset)
    check_shape("q_offset", q_offset, (), "a scalar")
    check_dtype("q_offset", q_offset, jnp.int32)
    return q_offset


def _checked_segment_ids(
    q_BTNH: jax.Array, k_BSKH: jax.Array, q_ids_BT: jax.Array | None, kv_ids_BS: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    if q_ids_BT is None and kv_ids_BS is None:
        return None, None
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    missing, given = ("kv_segment_ids_BS", q_ids_BT) if kv_ids_BS is None else ("q_segment_ids_BT", kv_ids_BS)
    if q_ids_BT is None or kv_ids_BS is None:
        check(T == S, f"{missing} is missing; pass both, because there are {T} queries and {S} keys")
        q_ids_BT = kv_ids_BS = given
    same = q_ids_BT is kv_ids_BS  # as the "gpu" implementation wants to know
    q_ids_BT = jnp.asarray(q_ids_BT)
    kv_ids_BS = q_ids_BT if same else jnp.asarray(kv_ids_BS)
    check_shape("q_segment_ids_BT", q_ids_BT, (B, T), "[B, T]")
    check_shape("kv_segment_ids_BS", kv_ids_BS, (B, S), "[B, S]")
    check_dtype("q_segment_ids_BT", q_ids_BT, jnp.int32)
    check_dtype("kv_segment_ids_BS", kv_ids_BS, jnp.int32)
    return q_ids_BT, kv_ids_BS
