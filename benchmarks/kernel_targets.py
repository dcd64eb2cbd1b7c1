"""Targets for `kernel_schedule`: the kernels at realistic sizes, over abstract arrays.

python benchmarks/kernel_schedule.py kernel_targets:flash_forward --chip v6e length=4096
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_schedule import Schedule

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.tpu import BlockSizes
from pallas_kernels.sampling import sample
from pallas_kernels.sampling.tpu import CANDIDATES, CHUNK, WEIGH_UNROLL
from pallas_kernels.shared_prefix_attention import PageTables, shared_prefix_attention

Target = tuple[Callable[..., Any], tuple[Any, ...]]

# The sampling kernel's loops in program order, with their nesting depth.
SAMPLING_LOOPS = {
    "block": 1,
    "collect": 2,
    "weigh": 2,
    "weigh_candidates": 2,
    "attempt": 2,
    "top_k_probe": 3,
    "top_k_measure": 4,
    "top_p_probe": 3,
    "top_p_measure": 4,
    "sum_filtered": 2,
}


def flash_forward(
    length: int = 4096,
    head_dim: int = 128,
    causal: bool = True,
    blocks: list[int] | None = None,
    segmented: bool = False,
    heads: int = 2,
) -> Target:
    q_BTNH = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16)
    ids_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def f(q_BTNH, k_BTNH, v_BTNH, ids_BT):
        return flash_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            causal=causal,
            q_segment_ids_BT=ids_BT if segmented else None,
            implementation="tpu",
            block_sizes=BlockSizes(*blocks) if blocks else None,
        )

    return f, (q_BTNH, q_BTNH, q_BTNH, ids_BT)


def flash_backward(**options: Any) -> Target:
    """The gradient. It includes the forward kernel, because the backward pass needs its log-sum-exp."""
    f, (q_BTNH, k_BTNH, v_BTNH, ids_BT) = flash_forward(**options)

    def gradient(q_BTNH, k_BTNH, v_BTNH, ids_BT, d_out_BTNH):
        _, pull_back = jax.vjp(lambda q, k, v: f(q, k, v, ids_BT), q_BTNH, k_BTNH, v_BTNH)
        return pull_back(d_out_BTNH)

    return gradient, (q_BTNH, k_BTNH, v_BTNH, ids_BT, q_BTNH)


def decode(
    batch: int = 128,
    groups: int = 8,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    width: int = 128,
    page_size: int = 64,
    prefix: int = 32768,
    suffix: int = 8192,
    num_pages: int = 4096,
) -> Target:
    """One step of shared-prefix attention, of Qwen3-8B's size by default.

    The prefix kernel has one body each for subgroups of up to 4, 16, 32 and 64 sequences, the suffix kernel a single
    one; each processes tiling.chunk tokens.
    """

    def step(q_BNH, kv_pages_S2KTW, *tables):
        return shared_prefix_attention(q_BNH, kv_pages_S2KTW, PageTables(*tables), implementation="tpu")

    shapes = (groups, prefix // page_size), (groups,), (batch,), (batch, suffix // page_size), (batch,)
    return step, (
        jax.ShapeDtypeStruct((batch, num_heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_pages, 2, num_kv_heads, page_size, -(-width // 128) * 128), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
    )


def draw(rows: int = 64, vocab_size: int = 151_936) -> Target:
    """One token for every row, with all filters."""

    def step(logits_BV, arguments):
        return sample(logits_BV, implementation="tpu", **arguments)

    arguments = {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in ("positions_B", "top_k_B")}
    arguments |= {name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in ("temperature_B", "top_p_B", "min_p_B")}
    arguments["seeds_B2"] = jax.ShapeDtypeStruct((rows, 2), jnp.uint32)
    return step, (jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32), arguments)


def sampling_bundles(kernel: Schedule, vocab_size: int) -> dict[str, int]:
    """Bundles of each part of the sampling kernel's work on a block of 8 rows: loops times their trips.

    An unrolled loop's remainder is outside the loop and counted with the block.

    Returns the bundles of
      always: a block without top-k and top-p, including the branches it then skips.
      probe: a probe among the candidates.
      full_probe: a probe over the vocabulary.
      filtered: what top-k or top-p adds to a block, apart from its probes.

    Raises:
      RuntimeError: the compiled loops differ from the kernel's source.
    """
    if [loop.depth for loop in kernel.loops] != list(SAMPLING_LOOPS.values()):
        raise RuntimeError(f"loops {kernel.loops} do not match {SAMPLING_LOOPS}; the kernel or the compiler changed")
    loops = {name: loop.bundles for name, loop in zip(SAMPLING_LOOPS, kernel.loops, strict=True)}
    chunks, whole = -(-vocab_size // CHUNK), vocab_size // CHUNK
    passes = loops["collect"] * whole + loops["weigh"] * (whole // WEIGH_UNROLL)
    step = max(loops["top_k_probe"], loops["top_p_probe"])
    measure = max(loops["top_k_measure"], loops["top_p_measure"])
    return {
        "always": loops["block"] + passes + loops["weigh_candidates"] * CANDIDATES + loops["attempt"],
        "probe": step + measure * CANDIDATES,
        "full_probe": step + measure * chunks,
        "filtered": loops["sum_filtered"] * chunks,
    }
