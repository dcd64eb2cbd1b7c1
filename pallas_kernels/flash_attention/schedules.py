"""Targets of the schedule instrument: the forward and the backward kernel at a shape, over abstract arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.block_sizes import BlockSizes


def _attention(length: int, head_dim: int, causal: bool, blocks: list[int] | None, segmented: bool, heads: int):
    q_BTNH = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16)
    ids_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def f(q_BTNH, k_BTNH, v_BTNH, ids_BT):
        return flash_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            causal=causal,
            q_segment_ids_BT=ids_BT if segmented else None,
            kv_segment_ids_BS=ids_BT if segmented else None,
            implementation="tpu",
            block_sizes=BlockSizes(*blocks) if blocks else None,
        )

    return f, (q_BTNH, q_BTNH, q_BTNH, ids_BT)


def forward(
    length: int = 4096,
    head_dim: int = 128,
    causal: bool = True,
    blocks: list[int] | None = None,
    segmented: bool = False,
    heads: int = 2,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _attention(length, head_dim, causal, blocks, segmented, heads)


def backward(
    length: int = 4096,
    head_dim: int = 128,
    causal: bool = True,
    blocks: list[int] | None = None,
    segmented: bool = False,
    heads: int = 2,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient, which holds the forward kernel too: the backward pass needs its log-sum-exp."""
    f, (q_BTNH, k_BTNH, v_BTNH, ids_BT) = _attention(length, head_dim, causal, blocks, segmented, heads)

    def gradient(q_BTNH, k_BTNH, v_BTNH, ids_BT, d_out_BTNH):
        _, pull_back = jax.vjp(lambda q, k, v: f(q, k, v, ids_BT), q_BTNH, k_BTNH, v_BTNH)
        return pull_back(d_out_BTNH)

    return gradient, (q_BTNH, k_BTNH, v_BTNH, ids_BT, q_BTNH)
