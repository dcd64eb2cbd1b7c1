"""The kernel at realistic sizes, to be compiled for a TPU and its schedule read.

    python -m pallas_kernels.schedule pallas_kernels.shared_prefix_attention.schedules:decode --chip v6e

The sizes default to Qwen3-8B's attention. The prefix kernel has a body for groups of up to 4, 16, 32 and 64
trajectories, the suffix kernel one; each body is a chunk of tiling.chunk tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention import PageTables, shared_prefix_attention


def decode(
    batch: int = 128,
    problems: int = 8,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    width: int = 128,
    page_size: int = 64,
    prefix: int = 32768,
    suffix: int = 8192,
    num_pages: int = 4096,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One step, shared prefix and suffixes."""

    def step(q_BNH, kv_pages_S2KTW, *tables):
        return shared_prefix_attention(q_BNH, kv_pages_S2KTW, PageTables(*tables), implementation="tpu")

    shapes = (problems, prefix // page_size), (problems,), (batch,), (batch, suffix // page_size), (batch,)
    return step, (
        jax.ShapeDtypeStruct((batch, num_heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_pages, 2, num_kv_heads, page_size, -(-width // 128) * 128), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
    )
