"""The kernel at realistic sizes, to be compiled for a TPU and its schedule read, and what its loops add up to.

python -m pallas_kernels.schedule pallas_kernels.sampling.schedules:draw --chip v6e rows=8 dtype=bfloat16
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import schedule
from pallas_kernels.sampling import bitmask, sample
from pallas_kernels.sampling.tpu import CANDIDATES, COLLECT_UNROLL, WEIGH_UNROLL
from pallas_kernels.sampling.vectors import CHUNK

# In program order, with their depth in the nest of loops.
_LOOPS = {
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


def draw(
    rows: int = 64, vocab_size: int = 151_936, dtype: str = "float32", masked: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One token for every row, all filters at hand."""

    def step(logits_BV, arguments):
        return sample(logits_BV, implementation="tpu", **arguments)

    def of_rows(dtype):
        return jax.ShapeDtypeStruct((rows,), dtype)

    arguments = {"seeds_B": of_rows(jnp.uint32), "positions_B": of_rows(jnp.int32), "top_k_B": of_rows(jnp.int32)}
    arguments |= {name: of_rows(jnp.float32) for name in ("temperature_B", "top_p_B", "min_p_B")}
    if masked:
        arguments["allowed_BW"] = jax.ShapeDtypeStruct((rows, bitmask.words_for(vocab_size)), jnp.int32)
    return step, (jax.ShapeDtypeStruct((rows, vocab_size), dtype), arguments)


def block_bundles(kernel: schedule.Schedule, vocab_size: int, masked: bool) -> dict[str, int]:
    """The bundles of each part of the work on a block of 8 rows: loops times their trips.

    What an unrolled loop leaves over is outside it, and is counted with the block.

    Returns the bundles of
      always: what a block takes without top-k and top-p, the branches it then skips included.
      probe: a probe among the candidates.
      full_probe: a probe over the vocabulary.
      filtered: what a block with top-k or top-p takes besides, apart from its probes.

    Raises:
      RuntimeError: the compiler has made other loops than those of the kernel's source.
    """
    if [loop.depth for loop in kernel.loops] != list(_LOOPS.values()):
        raise RuntimeError(f"loops {kernel.loops} do not nest as {_LOOPS}; the kernel or the compiler has changed")
    loops = {name: loop.bundles for name, loop in zip(_LOOPS, kernel.loops, strict=True)}
    chunks, whole = -(-vocab_size // CHUNK), vocab_size // CHUNK
    passes = loops["collect"] * (whole // COLLECT_UNROLL[masked]) + loops["weigh"] * (whole // WEIGH_UNROLL)
    step = max(loops["top_k_probe"], loops["top_p_probe"])
    measure = max(loops["top_k_measure"], loops["top_p_measure"])
    return {
        "always": loops["block"] + passes + loops["weigh_candidates"] * CANDIDATES + loops["attempt"],
        "probe": step + measure * CANDIDATES,
        "full_probe": step + measure * chunks,
        "filtered": loops["sum_filtered"] * chunks,
    }
