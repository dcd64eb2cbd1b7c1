"""Attention for all models: picks the implementation and shards it over the mesh.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import Implementation, flash_attention
from stepjax.config import AttentionImplementation
from stepjax.models.context_parallel import balanced
from stepjax.sharding import all_gather, axis_size, spec, target_platform

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
    scale: float | None = None,
    rows_axis: str = "batch",
    length_axis: str | None = None,
    implementation: AttentionImplementation = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v with grouped queries.

    A token sees only its own segment (packed rows) and, if `causal`, nothing after itself. Segment 0 is padding: it
    neither sees nor is seen, and its output is zero.

    Args:
        scale: 1 / sqrt(H) by default.
        rows_axis, length_axis: logical axes of B and T; None if T is never sharded.
        implementation: "auto" uses the platform of the current mesh or, without a mesh, JAX's default.

    Raises:
        ArgumentError: the implementation does not support these shapes or this dtype.
    """
    chosen = resolve(implementation, target_platform(), q_BTNH.dtype, q_BTNH.shape[-1])
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, INPUT_NAME) for x in (q_BTNH, k_BTKH, v_BTKH))
    # Packing numbers segments from 1; the kernels expect negative ids for padding.
    segment_ids = () if segment_ids_BT is None else (segment_ids_BT - 1,)
    if chosen == "xla" or jax.sharding.get_abstract_mesh().empty:
        q_ids = segment_ids[0] if segment_ids else None
        return flash_attention(
            q_BTNH, k_BTKH, v_BTKH, causal=causal, scale=scale, q_segment_ids_BT=q_ids, implementation=chosen
        )

    def of_device(q_BTNH, k_BSKH, v_BSKH, q_ids_BT=None, kv_ids_BS=None):
        if length_axis is not None:
            k_BSKH, v_BSKH = (all_gather(x, length_axis, 1) for x in (k_BSKH, v_BSKH))
        if length_axis is None or axis_size(length_axis) == 1:
            kv_ids_BS = q_ids_BT  # the same array tells the kernels that these are whole packed rows

        def part(q_BTNH, first, q_ids_BT):
            return flash_attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                causal=causal,
                q_offset=first,
                q_segment_ids_BT=q_ids_BT,
                kv_segment_ids_BS=kv_ids_BS,
                scale=scale,
                implementation=chosen,
            )

        if length_axis is None or not causal:
            return part(q_BTNH, 0, q_ids_BT)
        return balanced(part, q_BTNH, q_ids_BT, length_axis)

    # The partitioner cannot see into a kernel, so shard explicitly: every device gets its rows, its heads and its part
    # of the queries, and all-gathers the keys of those rows.
    q_spec, kv_spec = spec(rows_axis, length_axis, "heads", None), spec(rows_axis, length_axis, "kv_heads", None)
    ids_specs = (spec(rows_axis, length_axis), spec(rows_axis, None)) if segment_ids else ()
    sharded = jax.shard_map(
        of_device, in_specs=(q_spec, kv_spec, kv_spec, *ids_specs), out_specs=q_spec, check_vma=False
    )
    return sharded(q_BTNH, k_BTKH, v_BTKH, *(2 * segment_ids))
