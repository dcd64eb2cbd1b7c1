"""Rates of the attention kernels in two packed decoders: useful floating-point operations per bundle, with segments.

Part of plan_vs_maxtext.py. The rates in stepjax.planning.core_time are for sequences without segments, with the best of
several block sizes. Both trainers pack, so their kernels take segment ids and use the block sizes of their settings;
this module reads exactly those kernels (grouped heads, segments, these blocks). It assumes one segment per row, which
is the most work: both sides then skip only what lies above the diagonal.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import kernel_schedule
import machine
from attention_schedules import Shape, cost

from pallas_kernels.chips import compile_only_mesh
from stepjax.planning.core_time import Pass

Kernel = Literal["ours", "tokamax", "jax_splash"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
HEADS, KV_HEADS = 8, 2  # 4 query heads per key-value head, as in Qwen3-8B


def splash_target(
    package: str, which: str, length: int, head_dim: int, blocks: dict[str, Any], options: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Target for kernel_schedule: splash attention of "tokamax" or "jax", causal, with segments."""
    if package == "tokamax":
        from tokamax._src.ops.experimental.tpu.splash_attention import (  # type: ignore[import-not-found]
            splash_attention_kernel,
            splash_attention_mask,
        )

        sizes = splash_attention_kernel.SplashConfig(**blocks, **options)
        mask = splash_attention_mask.CausalMask((length, length))
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, config=sizes)
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        sizes = splash_attention_kernel.BlockSizes(**blocks, use_fused_bwd_kernel=True)
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * HEADS)
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)

    q = jax.ShapeDtypeStruct((HEADS, length, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((KV_HEADS, length, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((length,), jnp.int32)

    def forward(q, k, v, ids):
        return kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(q=ids, kv=ids))

    def gradient(q, k, v, ids, d_out):
        return jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)[1](d_out)

    return (forward, (q, k, k, ids)) if which == "forward" else (gradient, (q, k, k, ids, q))


def rates(
    kernel: Kernel, chip: str, length: int, head_dim: int, blocks: dict[str, int], cache: Path, source: str
) -> dict[str, int]:
    """Useful FLOPs per bundle of both passes.

    Args:
        blocks: splash attention's block sizes, by its own names; our kernel chooses its own.
        source: tells versions of our kernel apart.
    """
    key = f"{kernel} {chip} {length} {head_dim} {json.dumps(blocks)} {source if kernel == 'ours' else ''}"
    versions = "".join(str(machine.version(package)) for package in ("jax", "libtpu", "tokamax"))
    path = cache / f"rate-{hashlib.sha256((key + versions).encode()).hexdigest()[:12]}.json"
    if not path.exists():
        found = {which: round(_measure(kernel, chip, which, Shape(length, head_dim, True), blocks)) for which in PASSES}
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def _measure(kernel: Kernel, chip: str, which: Pass, shape: Shape, blocks: dict[str, int]) -> float:
    common = {"length": shape.length, "head_dim": shape.head_dim}
    if kernel == "ours":
        block_q = block_kv = _our_block(chip, which, shape)
        keywords: dict[str, Any] = common | {"segmented": True, "heads": 2}
        target = f"kernel_targets:flash_{which}"
    else:
        suffix = "" if which == "forward" else "_dkv"
        block_q, block_kv = (min(blocks[f"block_{side}{suffix}"], shape.length) for side in ("q", "kv"))
        package = "tokamax" if kernel == "tokamax" else "jax"
        keywords = common | {"which": which, "package": package, "blocks": blocks, "options": {}}
        target = "packed_attention_rates:splash_target"
    found = kernel_schedule.compile_target(target, chip, keywords)
    wanted = [s for s in found if s.bodies and (("dkv" in s.kernel or "back" in s.kernel) == (which == "backward"))]
    parts = cost(wanted[-1], shape, block_q, block_kv, kernel)
    tiles, masked = visited(shape.length, block_q, block_kv)
    rows = shape.length // (block_q if which == "forward" else block_kv)
    bundles = (tiles - masked) * parts.full + masked * parts.diagonal + tiles * parts.step + rows * parts.row
    return (4 if which == "forward" else 10) * shape.length**2 * shape.head_dim / 2 / bundles


def visited(length: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """Nonempty tiles of causal attention, and how many of them the diagonal crosses."""
    tiles = [(q, k) for q in range(0, length, block_q) for k in range(0, length, block_kv) if k < q + block_q]
    return len(tiles), sum(k + block_kv > q + 1 for q, k in tiles)


def _our_block(chip: str, which: Pass, shape: Shape) -> int:
    from pallas_kernels.flash_attention.tpu import choose_block_sizes

    with jax.set_mesh(compile_only_mesh(chip)):
        length = shape.length
        sizes = choose_block_sizes(length, length, shape.head_dim, causal=True, segmented=True, itemsize=2)
    return sizes.q if which == "forward" else sizes.q_backward
