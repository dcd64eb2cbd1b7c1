"""Packed rows on cuDNN: attention within the segments of a row, without a mask of every query and key.

Legend: B rows, T tokens, N query heads, K key-value heads, H head dim, M slots for segments of a row.

cuDNN takes the start and length of up to M segments per row and computes only their blocks. `jax.nn` does not offer
this; the function beneath it does, and we call that one. It is private to JAX, so `available` calls it once while
tracing: whatever it refuses runs with a dense mask instead (gpu.py).

M is static and its slots cost memory and time, even the empty ones: each is a row of softmax statistics [N, T] and, in
the backward pass, of float32 sums [T, N, H]. On an H200, 4 rows of 4,096 tokens in four segments ran at 188 to 265
TFLOP/s forward with M = 4, at 146 to 190 with M = 16 or 32 and at 100 with M = 64; a dense mask reached 58. So M is
small, and a row with more segments takes further passes over the next M, counted on the device. Only the first pass
keeps its statistics: the backward pass recomputes those of the others.

cuDNN reads and writes the tokens of its segments only. The rest of its output and gradients is arbitrary: a later pass
replaces its own tokens, and `flash_attention` zeroes padding, both in the output and in the gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.flash_attention.reference import LSE_NAME, OUT_NAME

SLOTS = 8  # segments of a row and pass, at most
GROUPED = jax.__version_info__ >= (0, 11, 1)  # older JAX strides the keys' segments by the number of query heads
_BYTES = 2**32  # of the backward pass's sums, which lower the number of slots
_UNUSED = -1  # start and length of an empty slot


class Segments(NamedTuple):
    """Where the segments of each row are, in order; unused entries have start T and length 0.

    ids      4  4  7  7  7 -1        starts  0  2  6  6  6  6        counts  2
    indices  0  0  1  1  1 -1        lengths 2  3  0  0  0  0
    """

    starts_BT: jax.Array
    lengths_BT: jax.Array
    indices_BT: jax.Array  # of each token's segment; -1 for padding
    counts_B: jax.Array


def find_segments(ids_BT: jax.Array) -> Segments:
    """The runs of equal ids of each row; negative ids are padding."""
    T = ids_BT.shape[1]
    changes_BT = ids_BT[:, 1:] != ids_BT[:, :-1]
    edge_B1 = jnp.ones_like(changes_BT, shape=(ids_BT.shape[0], 1))
    begins_BT = jnp.concatenate([edge_B1, changes_BT], axis=1) & (ids_BT >= 0)
    ends_BT = jnp.concatenate([changes_BT, edge_B1], axis=1) & (ids_BT >= 0)
    place_T = jnp.arange(T, dtype=jnp.int32)
    starts_BT = jnp.sort(jnp.where(begins_BT, place_T, T), axis=1)
    stops_BT = jnp.sort(jnp.where(ends_BT, place_T + 1, T), axis=1)
    indices_BT = jnp.where(ids_BT >= 0, jnp.cumsum(begins_BT, axis=1) - 1, -1)
    return Segments(starts_BT, stops_BT - starts_BT, indices_BT, jnp.sum(begins_BT, axis=1))


def recurs(ids_BT: jax.Array) -> jax.Array:
    """Rows in which an id returns after another one, bool [B]."""
    before_BT = jnp.pad(ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    runs_BT = jnp.sort(jnp.where(ids_BT != before_BT, ids_BT, -1), axis=1)
    return jnp.any((runs_BT[:, 1:] == runs_BT[:, :-1]) & (runs_BT[:, 1:] >= 0), axis=1)


def slots(q_BTNH: jax.Array) -> int:
    """M for these queries; at least two, since cuDNN takes a single one for an unpacked row."""
    return max(2, min(SLOTS, _BYTES // (4 * q_BTNH.size)))


def available(q_BTNH: jax.Array, k_BTKH: jax.Array, *, causal: bool) -> bool:
    """Whether JAX and this GPU offer packed rows for these shapes."""
    if q_BTNH.size >= 2**31 or (q_BTNH.shape[2] != k_BTKH.shape[2] and not GROUPED):
        return False  # cuDNN's offsets are int32
    B, M = q_BTNH.shape[0], slots(q_BTNH)
    table_BM = jax.ShapeDtypeStruct((B, M), jnp.int32)
    try:
        # Older GPUs, no cuDNN, and whatever a future JAX changes about its private function.
        out = jax.eval_shape(
            partial(_cudnn, causal=causal, scale=1.0), q_BTNH, k_BTKH, k_BTKH, starts_BM=table_BM, lengths_BM=table_BM
        )
    except (ImportError, AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError):
        return False
    return getattr(out, "shape", None) == q_BTNH.shape


def _cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    starts_BM: jax.Array,
    lengths_BM: jax.Array,
    causal: bool,
    scale: float,
) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    starts_BM1 = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=_UNUSED)
    out_BTNH: Any = cudnn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM1,
        kv_offsets=starts_BM1,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING,
    )
    return out_BTNH


def _of_pass(i: int | jax.Array, segments: Segments, M: int, causal: bool, scale: float) -> tuple[Any, jax.Array]:
    """The function of q, k and v that attends within segments i * M to i * M + M - 1, and those segments' tokens."""

    def table(values_BT: jax.Array) -> jax.Array:
        padded_BT = jnp.pad(values_BT, ((0, 0), (0, -values_BT.shape[1] % M)))
        return jax.lax.dynamic_slice_in_dim(padded_BT, i * M, M, axis=1)

    lengths_BM = table(segments.lengths_BT)
    starts_BM = jnp.where(lengths_BM > 0, table(segments.starts_BT), _UNUSED)
    lengths_BM = jnp.where(lengths_BM > 0, lengths_BM, _UNUSED)
    attend = partial(_cudnn, starts_BM=starts_BM, lengths_BM=lengths_BM, causal=causal, scale=scale)
    tokens_BT11 = (segments.indices_BT // M == i)[:, :, None, None]
    return attend, tokens_BT11


def _passes(segments: Segments, M: int) -> jax.Array:
    return -(-jnp.max(segments.counts_B) // M)


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array, *, causal: bool, scale: float
) -> jax.Array:
    """Attention within segments [B, T, N, H]; NaN in rows where an id returns after another one.

    Output and gradients are arbitrary at padding.
    """
    out_BTNH: Any = _attention(q_BTNH, k_BTKH, v_BTKH, find_segments(ids_BT), causal, scale, slots(q_BTNH))
    return jnp.where(recurs(ids_BT)[:, None, None, None], jnp.nan, out_BTNH)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q_BTNH, k_BTKH, v_BTKH, segments: Segments, causal: bool, scale: float, M: int) -> jax.Array:
    attend, _ = _of_pass(0, segments, M, causal, scale)
    return _add_passes(attend(q_BTNH, k_BTKH, v_BTKH), q_BTNH, k_BTKH, v_BTKH, segments, causal, scale, M)


def _add_passes(out_BTNH, q_BTNH, k_BTKH, v_BTKH, segments: Segments, causal: bool, scale: float, M: int) -> jax.Array:
    """The output of all passes, given that of the first."""

    def add(i, out_BTNH):
        attend, tokens_BT11 = _of_pass(i, segments, M, causal, scale)
        return jnp.where(tokens_BT11, attend(q_BTNH, k_BTKH, v_BTKH), out_BTNH)

    return jax.lax.fori_loop(1, _passes(segments, M), add, out_BTNH)


def _forward(q_BTNH, k_BTKH, v_BTKH, segments: Segments, causal: bool, scale: float, M: int):
    attend, _ = _of_pass(0, segments, M, causal, scale)
    first_BTNH, pullback = jax.vjp(attend, q_BTNH, k_BTKH, v_BTKH)
    out_BTNH = _add_passes(first_BTNH, q_BTNH, k_BTKH, v_BTKH, segments, causal, scale, M)
    out_BTNH = checkpoint_name(out_BTNH, OUT_NAME)
    B, T, N, _ = q_BTNH.shape

    def name(kept: Any) -> Any:
        if kept is first_BTNH:
            return out_BTNH  # equal where cuDNN reads it, and one array less to keep
        is_statistics = getattr(kept, "shape", None) == (B * M, N, T) and kept.dtype == jnp.float32
        return checkpoint_name(kept, LSE_NAME) if is_statistics else kept

    return out_BTNH, (jax.tree.map(name, pullback), q_BTNH, k_BTKH, v_BTKH, segments)


def _backward(causal: bool, scale: float, M: int, kept: Any, d_out_BTNH: jax.Array):
    pullback, q_BTNH, k_BTKH, v_BTKH, segments = kept

    def add(i, gradients):
        attend, tokens_BT11 = _of_pass(i, segments, M, causal, scale)
        of_pass = jax.vjp(attend, q_BTNH, k_BTKH, v_BTKH)[1](d_out_BTNH)
        return jax.tree.map(lambda new, old: jnp.where(tokens_BT11, new, old), tuple(of_pass), gradients)

    return (*jax.lax.fori_loop(1, _passes(segments, M), add, tuple(pullback(d_out_BTNH))), None)


_attention.defvjp(_forward, _backward)
