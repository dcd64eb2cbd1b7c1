"""Attention for all models: picks the implementation and shards it over the mesh.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import Implementation, flash_attention, reference
from stepjax.config import AttentionImplementation
from stepjax.models.context_parallel import balanced
from stepjax.sharding import all_gather, axis_size, spec, target_platform

_QUERIES = 128  # of a call on XLA, where segments have prefixes
INPUT_NAME = "attention_input"  # checkpoint name of q, k and v for rematerialisation policies


def resolve(
    implementation: AttentionImplementation, platform: str, dtype: Any = jnp.bfloat16, head_dim: int = 128
) -> Implementation:
    """Resolves the configured implementation for a platform ("cpu", "gpu", "tpu").

    "auto" is the Mosaic kernel on TPU, and cuDNN on GPU if it supports the arrays: on an H200 it was 2.8 to 7.2 times
    as fast as XLA's attention (benchmarks/results/gpu_attention.json), and it does not materialise the scores. Packed
    rows use cuDNN's own packed layout where JAX and the GPU offer it (pallas_kernels/flash_attention/gpu_packed.py).
    """
    if implementation != "auto":
        return implementation
    if platform == "gpu":
        return "gpu" if jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256 else "xla"
    return "tpu" if platform == "tpu" else "xla"


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    causal: bool = False,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    prefix_ids_BT: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    rows_axis: str = "batch",
    length_axis: str | None = None,
    implementation: AttentionImplementation = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v with grouped queries.

    A token sees only its own segment (packed rows) and, if `causal`, nothing after itself. Segment 0 is padding: it
    neither sees nor is seen, and its output is zero.

    Segments may share a prefix, such as the prompt of several answers: a token also sees all of the segment that its
    prefix id names, an earlier one. A kernel takes two calls for such a row, one over each token's own segment and one
    over its prefix, whose results are merged by log-sum-exp. XLA, which computes masked scores as well, has both in one
    mask.

    Args:
        prefix_ids_BT: id of a segment of the same row; 0: none.
        scale: 1 / sqrt(H) by default.
        rows_axis, length_axis: logical axes of B and T; None if T is never sharded.
        implementation: "auto" uses the platform of the current mesh or, without a mesh, JAX's default.

    Raises:
        ArgumentError: the implementation does not support these shapes or this dtype.
    """
    chosen = resolve(implementation, target_platform(), q_BTNH.dtype, q_BTNH.shape[-1])
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, INPUT_NAME) for x in (q_BTNH, k_BTKH, v_BTKH))
    assert prefix_ids_BT is None or segment_ids_BT is not None
    # Packing numbers segments from 1; the kernels expect negative ids for padding.
    given = [ids_BT - 1 for ids_BT in (segment_ids_BT, prefix_ids_BT) if ids_BT is not None]
    ids = (jnp.stack(given, axis=-1),) if given else ()  # [B, T, 1], or [B, T, 2] with prefixes

    def part(q_BTNH, k_BSKH, v_BSKH, first, ids_BTI, kv_ids_BS=None):
        """Attention of queries that start at token `first`; `kv_ids_BS` is None if these are whole rows."""
        flash = partial(flash_attention, q_BTNH, k_BSKH, v_BSKH, scale=scale, implementation=chosen)
        offset = {"q_offset": first} if causal else {}
        if ids_BTI is None:
            return flash(causal=causal, **offset)
        own_BT, whole = ids_BTI[..., 0], kv_ids_BS is None
        kv_ids_BS = own_BT if whole else kv_ids_BS  # the same array tells the kernels that rows are whole
        segments = {"q_segment_ids_BT": own_BT, "kv_segment_ids_BS": kv_ids_BS}
        if ids_BTI.shape[-1] == 1:
            return flash(causal=causal, **segments, **offset)
        if chosen == "xla":
            # A row that the mesh shards by length stays whole: slices would be moved between devices.
            is_split = causal and (length_axis is None or axis_size(length_axis) == 1)
            size = _QUERIES if is_split else q_BTNH.shape[1]
            return _with_prefixes(q_BTNH, k_BSKH, v_BSKH, ids_BTI, causal=causal, scale=scale, size=size)
        own = flash(causal=causal, **segments, **offset, return_lse=True)
        prefix = flash(q_segment_ids_BT=ids_BTI[..., 1], kv_segment_ids_BS=kv_ids_BS, return_lse=True)
        return _merged(own, prefix)

    if chosen == "xla" or jax.sharding.get_abstract_mesh().empty:
        return part(q_BTNH, k_BTKH, v_BTKH, 0, *(ids or (None,)))

    def of_device(q_BTNH, k_BSKH, v_BSKH, ids_BTI=None, kv_ids_BS=None):
        if length_axis is not None:
            k_BSKH, v_BSKH = (all_gather(x, length_axis, 1) for x in (k_BSKH, v_BSKH))
        if length_axis is None or axis_size(length_axis) == 1:
            kv_ids_BS = None
        if length_axis is None or not causal:
            return part(q_BTNH, k_BSKH, v_BSKH, 0, ids_BTI, kv_ids_BS)
        return balanced(
            lambda q, first, ids: part(q, k_BSKH, v_BSKH, first, ids, kv_ids_BS), q_BTNH, ids_BTI, length_axis
        )

    # The partitioner cannot see into a kernel, so shard explicitly: every device gets its rows, its heads and its part
    # of the queries, and all-gathers the keys of those rows.
    q_spec, kv_spec = spec(rows_axis, length_axis, "heads", None), spec(rows_axis, length_axis, "kv_heads", None)
    ids_specs = (spec(rows_axis, length_axis, None), spec(rows_axis, None)) if ids else ()
    kv_ids = tuple(ids_BTI[..., 0] for ids_BTI in ids)
    sharded = jax.shard_map(
        of_device, in_specs=(q_spec, kv_spec, kv_spec, *ids_specs), out_specs=q_spec, check_vma=False
    )
    return sharded(q_BTNH, k_BTKH, v_BTKH, *ids, *kv_ids)


def _with_prefixes(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    ids_BT2: jax.Array,
    *,
    causal: bool,
    scale: float | None,
    size: int,
) -> jax.Array:
    """Attention over each token's own segment and its prefix, under one mask, for `size` queries at a time."""
    T, parts = q_BTNH.shape[1], []
    own_scale: float = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    for start in range(0, T, size):
        # Prefixes come before what follows them, so causal queries need no keys after themselves.
        stop = min(start + size, T)
        own, keys = slice(start, stop), slice(0, stop if causal else T)
        q_BQNH, k_BSKH, v_BSKH = q_BTNH[:, own], k_BTKH[:, keys], v_BTKH[:, keys]
        kv_ids_BS = ids_BT2[:, keys, 0]
        sees = partial(reference.visibility, stop - start, keys.stop, q_offset=start, kv_segment_ids_BS=kv_ids_BS)
        of_segment_BQS = sees(causal=causal, q_segment_ids_BT=ids_BT2[:, own, 0])
        of_prefix_BQS = sees(causal=False, q_segment_ids_BT=ids_BT2[:, own, 1])
        assert of_segment_BQS is not None and of_prefix_BQS is not None
        visible_BQS = of_segment_BQS | of_prefix_BQS
        parts.append(reference.masked_attention(q_BQNH, k_BSKH, v_BSKH, visible_BQS, scale=own_scale)[0])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _merged(*parts: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Attention over disjoint sets of keys, from (output, log-sum-exp) of each; a part that sees no key has -inf."""
    outs, lses = zip(*parts, strict=True)
    lse_PBTN = jnp.stack(lses)
    most_BTN = jax.lax.stop_gradient(jnp.max(lse_PBTN, axis=0))
    most_BTN = jnp.where(most_BTN == -jnp.inf, 0, most_BTN)
    shares_PBTN = jnp.exp(lse_PBTN - most_BTN)
    total_BTN = jnp.sum(shares_PBTN, axis=0)
    weights_PBTN = shares_PBTN / jnp.where(total_BTN == 0, 1, total_BTN)
    merged_BTNH = jnp.sum(weights_PBTN[..., None] * jnp.stack(outs).astype(jnp.float32), axis=0)
    return merged_BTNH.astype(outs[0].dtype)
