"""Cost of the output projection with cross-entropy in a training step, forward and backward, by several methods.

    python benchmarks/linear_cross_entropy.py [--chips v5p v6e] [--tokens 4096 8192] [--no-timing]

Needs no TPU: the real compiler compiles every method for every chip, at the public model's size (width 4,096,
vocabulary 151,936, parameters and sums in float32, products of bfloat16). Read from the compiled program:

  ms         the compiler's `estimated_cycles` of every operation, loop bodies times their trips, at the chip's clock.
             For operations that stream memory the compiler assumes less than half of the nominal bandwidth
  products   the same in units of one product of tokens x width x vocabulary at the chip's nominal peak: at least 3,
             or 4 if the logits are recomputed. Includes the cast of the kernel, 0.4 to 0.8 of a product; if the kernel
             is sharded over many chips, each casts its part
  HBM        gigabytes that the operations read and write, each operand counted once and whole, except in vector memory
             (not for `vocabulary`, whose operations each read a slice of the kernel)
  temporary  memory that the program allocates besides its arguments and results

Methods: `sum` and `scores` are token_loss_sum and token_scores; `checkpointed scan` is autodiff of a scan over chunks
of tokens; `vocabulary` scans over chunks of the vocabulary with a running normalizer. tokamax's Mosaic kernels, if
installed (Python 3.12), are counted from their static schedule: the shorter of the bodies that a grid step may run,
times the grid steps, without memory stalls and without the cast. This is a lower bound.

On the CPU the same methods run at a small size, in turns, with their ratio to `checkpointed scan`.
Writes results/linear_cross_entropy.json.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kernel_schedule
import machine
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from pallas_kernels.chips import CHIPS, compile_only_mesh
from stepjax.config import MeshConfig
from stepjax.sharding import make_mesh
from stepjax.training.linear_cross_entropy import token_loss_sum, token_scores

WIDTH, VOCAB = 4096, 151_936
CORES = {"v5p": 2}  # of one JAX device; the other chips have one
CHUNKS = (512, 2048, 4096)
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


# The methods ----------------------------------------------------------------------------------------------------------


def weighted(log_probs, log_normalizers, weights):
    return weights * (1e-4 * log_normalizers**2 - log_probs)


def by_sum(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk: int):
    return token_loss_sum(weighted, hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk=chunk)


def by_scores(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk: int):
    scores = token_scores(hidden_BTD, kernel_DV, targets_BT, chunk=chunk)
    return jnp.sum(weighted(scores.log_probs_BT, scores.log_normalizers_BT, weights_BT)), scores


def by_checkpointed_scan(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk: int):
    def cut(x_BT):
        return x_BT.reshape(-1, chunk, *x_BT.shape[2:])

    @jax.checkpoint
    def score(_, hidden_and_targets):
        hidden_CD, targets_C = hidden_and_targets
        kernel = kernel_DV.astype(hidden_CD.dtype)
        logits_CV = jnp.einsum("CD,DV->CV", hidden_CD, kernel, preferred_element_type=jnp.float32)
        log_normalizers_C = jax.nn.logsumexp(logits_CV, axis=-1)
        target_logits_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        correct_C = jnp.argmax(logits_CV, axis=-1) == targets_C
        return None, (target_logits_C - log_normalizers_C, log_normalizers_C, correct_C.astype(jnp.float32))

    _, scores = jax.lax.scan(score, None, (cut(hidden_BTD), cut(targets_BT)))
    log_probs_BT, log_normalizers_BT, _ = scores = [x.reshape(targets_BT.shape) for x in scores]
    return jnp.sum(weighted(log_probs_BT, log_normalizers_BT, weights_BT)), scores


def by_vocabulary(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk: int):
    """Chunks of the vocabulary with all tokens: a running normalizer forward, each gradient column computed once."""
    width, vocab = kernel_DV.shape
    blocks = math.ceil(vocab / chunk)
    padded_DV = jnp.pad(kernel_DV, ((0, 0), (0, blocks * chunk - vocab)))
    shape, dtype = targets_BT.shape, hidden_BTD.dtype
    targets_N = targets_BT.reshape(-1)

    def logits_of(hidden_ND, kernel_DV, i):
        block_DC = jax.lax.dynamic_slice_in_dim(kernel_DV, i * chunk, chunk, axis=1).astype(dtype)
        logits_NC = jnp.einsum("ND,DC->NC", hidden_ND, block_DC, preferred_element_type=jnp.float32)
        ids_NC = i * chunk + jax.lax.broadcasted_iota(jnp.int32, logits_NC.shape, 1)
        return jnp.where(ids_NC < vocab, logits_NC, -jnp.inf), ids_NC == targets_N[:, None], block_DC

    def forward(hidden_ND, kernel_DV):
        def add(carry, i):
            top_N, total_N, target_N = carry
            logits_NC, hit_NC, _ = logits_of(hidden_ND, kernel_DV, i)
            new_N = jnp.maximum(top_N, jnp.max(logits_NC, axis=-1))
            total_N = total_N * jnp.exp(top_N - new_N) + jnp.sum(jnp.exp(logits_NC - new_N[:, None]), axis=-1)
            return (new_N, total_N, target_N + jnp.sum(jnp.where(hit_NC, logits_NC, 0), axis=-1)), None

        zeros_N = jnp.zeros(targets_N.shape, jnp.float32)
        start = jnp.full(targets_N.shape, -jnp.inf, jnp.float32), zeros_N, zeros_N
        (top_N, total_N, target_N), _ = jax.lax.scan(add, start, jnp.arange(blocks))
        log_normalizers_N = top_N + jnp.log(total_N)
        return target_N - log_normalizers_N, log_normalizers_N, (target_N >= top_N).astype(jnp.float32)

    @jax.custom_vjp
    def score(hidden_ND, kernel_DV):
        return forward(hidden_ND, kernel_DV)

    def score_forward(hidden_ND, kernel_DV):
        scores = forward(hidden_ND, kernel_DV)
        return scores, (hidden_ND, kernel_DV, scores[1])

    def score_backward(residuals, cotangents):
        hidden_ND, kernel_DV, log_normalizers_N = residuals
        f1_N, f2_N, _ = cotangents

        def add(carry, i):
            hidden_grad_ND, kernel_grad_DV = carry
            logits_NC, hit_NC, block_DC = logits_of(hidden_ND, kernel_DV, i)
            probs_NC = jnp.exp(logits_NC - log_normalizers_N[:, None])
            logits_grad_NC = ((f2_N - f1_N)[:, None] * probs_NC + jnp.where(hit_NC, f1_N[:, None], 0)).astype(dtype)
            logits_grad_NC = jax.lax.optimization_barrier(logits_grad_NC)
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            hidden_grad_ND += product("NC,DC->ND", logits_grad_NC, block_DC)
            block_grad_DC = product("ND,NC->DC", hidden_ND, logits_grad_NC).astype(kernel_DV.dtype)
            kernel_grad_DV = jax.lax.dynamic_update_slice_in_dim(kernel_grad_DV, block_grad_DC, i * chunk, axis=1)
            return (hidden_grad_ND, kernel_grad_DV), None

        start = jnp.zeros(hidden_ND.shape, jnp.float32), jnp.zeros(kernel_DV.shape, kernel_DV.dtype)
        (hidden_grad_ND, kernel_grad_DV), _ = jax.lax.scan(add, start, jnp.arange(blocks))
        return hidden_grad_ND.astype(dtype), kernel_grad_DV

    score.defvjp(score_forward, score_backward)
    scores = [x.reshape(shape) for x in score(hidden_BTD.reshape(-1, width), padded_DV)]
    return jnp.sum(weighted(scores[0], scores[1], weights_BT)), scores


def tokamax_step(tokens: int, width: int, vocab: int) -> tuple[Callable[..., Any], Any]:
    """Target for kernel_schedule: tokamax's kernels with its own block sizes."""

    def step(hidden_ND, kernel_DV, targets_N, cotangents_N):
        fwd, bwd, kernel = tokamax_blocks(tokens, width, vocab)  # depends on the target chip
        loss_N, lse_N = kernel.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(
            hidden_ND, targets_N, kernel_DV, **fwd, reduction="none"
        )
        gradients = kernel.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu(
            cotangents_N, lse_N, hidden_ND, targets_N, kernel_DV, **bwd, reduction="none"
        )
        return loss_N, gradients

    hidden, kernel_shape, targets, cotangents = arguments(tokens, jnp.bfloat16)
    return step, [
        hidden.update(shape=(tokens, width)),
        kernel_shape,
        *(x.update(shape=(tokens,)) for x in (targets, cotangents)),
    ]


def tokamax_blocks(tokens: int, width: int, vocab: int) -> tuple[dict[str, int], dict[str, int], Any]:
    name = "tokamax._src.ops.linear_softmax_cross_entropy_loss.pallas_mosaic_tpu_kernel"
    kernel = importlib.import_module(name)
    blocks = []
    for config_of in (kernel.get_heuristic_fwd_config, kernel.get_heuristic_bwd_config):
        config = config_of(tokens, width, vocab, dtype=jnp.bfloat16)
        blocks.append({f"{axis}_block_size": getattr(config, f"{axis}_block_size") for axis in "bhv"})
    return blocks[0], blocks[1], kernel


WAYS = {
    "sum": by_sum,
    "scores": by_scores,
    "checkpointed scan": by_checkpointed_scan,
    "vocabulary": by_vocabulary,
}


# Compiled programs ----------------------------------------------------------------------------------------------------


def arguments(tokens: int, kernel_dtype: Any = jnp.float32) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((WIDTH, VOCAB), kernel_dtype),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    ]


def step_of(way: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """Loss, scores, and gradients with respect to hidden states and kernel."""
    return jax.value_and_grad(partial(way, chunk=chunk), argnums=(0, 1), has_aux=True)


def product_ms(chip: str, tokens: int) -> float:
    return 2 * tokens * WIDTH * VOCAB / (CHIPS[chip].bf16_tflops * CORES.get(chip, 1) * 1e9)


def compiled_figures(chip: str, tokens: int, way: Callable[..., Any], chunk: int) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(fsdp=1), list(compile_only_mesh(chip).devices.flat))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated) for x in arguments(tokens)]
        compiled = jax.jit(step_of(way, chunk)).lower(*shapes).compile()
    cycles, moved = count(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    ms = cycles / CHIPS[chip].clock_ghz / 1e6
    return {
        "ms": round(ms, 2),
        "products": round(ms / product_ms(chip, tokens), 2),
        "hbm_gb": round(moved / 1e9, 1),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
    }


def count(text: str) -> tuple[int, int]:
    """Estimated cycles, and bytes between HBM and the core, of a compiled program."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith("  "):
            computations[name].append(line)

    def total(name: str) -> tuple[int, int]:
        lines = computations[name]
        result = {m[1]: m[2] for line in lines if (m := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.+?) [\w\-]+\(", line))}
        cycles = moved = 0
        for line in lines:
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[loop[1]]))
                trips = int(known[1]) if known else max(map(int, limits))
                inner_cycles, inner_moved = total(loop[2])
                cycles, moved = cycles + trips * inner_cycles, moved + trips * inner_moved
            elif estimate := re.search(r'"estimated_cycles":"?(\d+)', line):
                cycles += int(estimate[1])
                operation = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = .+? [\w\-]+\((.*?)\)", line)
                assert operation
                arrays = [operation[1], *re.findall(r"%([\w.\-]+)", operation[2])]
                moved += sum(hbm_bytes(result.get(array, "")) for array in arrays)
        return cycles, moved

    return total(entry)


def hbm_bytes(shape: str) -> int:
    """Bytes of an HLO shape or tuple of shapes; S(n) marks another memory space."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
    return sum(
        BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in arrays
        if "S(" not in layout
    )


def tokamax_figures(chip: str, tokens: int) -> dict[str, Any]:
    sizes = {"tokens": tokens, "width": WIDTH, "vocab": VOCAB}
    kernels = kernel_schedule.compile_target("linear_cross_entropy:tokamax_step", chip, sizes)
    with jax.set_mesh(compile_only_mesh(chip)):
        fwd, bwd, _ = tokamax_blocks(tokens, WIDTH, VOCAB)
    bundles = 0
    for kernel in kernels:
        # A grid step runs one of two bodies: for the first block of the width, or for later ones. The backward pass
        # goes over the width three times, with a pair of bodies each.
        blocks, passes = (bwd, 3) if "bwd" in kernel.kernel else (fwd, 1)
        bodies = [body.bundles for body in kernel.bodies]
        assert len(bodies) == 2 * passes, kernel.kernel
        steps = math.prod(
            math.ceil(size / blocks[f"{axis}_block_size"]) for axis, size in zip("bhv", sizes_of(tokens), strict=True)
        )
        bundles += steps * sum(min(bodies[i : i + 2]) for i in range(0, len(bodies), 2))
    ms = bundles / CORES.get(chip, 1) / CHIPS[chip].clock_ghz / 1e6
    return {"ms": round(ms, 2), "products": round(ms / product_ms(chip, tokens), 2), "blocks": [fwd, bwd]}


def sizes_of(tokens: int) -> tuple[int, int, int]:
    return tokens, WIDTH, VOCAB


# On this machine ------------------------------------------------------------------------------------------------------


def cpu_times(tokens: int = 512, width: int = 256, vocab: int = 8192, chunk: int = 128) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    args = (
        jnp.asarray(rng.normal(size=(1, tokens, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(width, vocab)) / math.sqrt(width), jnp.float32),
        jnp.asarray(rng.integers(0, vocab, size=(1, tokens)), jnp.int32),
        jnp.ones((1, tokens), jnp.float32),
    )
    chunks = {name: 2048 if name == "vocabulary" else chunk for name in WAYS}
    steps = {name: jax.jit(step_of(way, chunks[name])) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(9):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t[2:]) for name, t in times.items()}  # the first two compile and warm up
    return {
        "tokens": tokens,
        "width": width,
        "vocab": vocab,
        "chunk": chunk,
        "ms": {name: round(1e3 * median, 1) for name, median in medians.items()},
        "ratio": {name: round(median / medians["checkpointed scan"], 2) for name, median in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=tuple(CHIPS), default=tuple(CHIPS))
    parser.add_argument("--tokens", nargs="+", type=int, default=(4096, 8192))
    parser.add_argument("--no-timing", action="store_true", help="skip the run on this machine")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    rows = []
    print("chip   tokens  way                chunk        ms  products   HBM GB  temporary GiB")
    for chip in options.chips:
        for tokens in options.tokens:
            cases = [(name, chunk) for chunk in CHUNKS if tokens / 8 <= chunk < tokens for name in list(WAYS)[:3]]
            for name, chunk in [*cases, ("vocabulary", 4736), ("tokamax", None)]:
                row = {"chip": chip, "tokens": tokens, "way": name, "chunk": chunk}
                try:
                    if chunk is not None:
                        row |= compiled_figures(chip, tokens, WAYS[name], chunk)
                        if name == "vocabulary":
                            del row["hbm_gb"]
                    elif importlib.util.find_spec("tokamax") is not None:
                        row |= tokamax_figures(chip, tokens)
                    else:
                        continue
                except jax.errors.JaxRuntimeError as error:
                    # JAX 0.10 cannot print some of libtpu 0.0.52's programs (async copies of several operands).
                    row["failed"] = str(error).splitlines()[0]
                rows.append(row)
                figures = [f"{row.get(key, '-'):>{width}}" for key, width in zip(KEYS, (9, 9, 8, 14), strict=True)]
                print(f"{chip:6s} {tokens:6d}  {name:18s} {chunk or '-':>5} {' '.join(figures)}", flush=True)
    figures = {
        "command": "python benchmarks/linear_cross_entropy.py",
        "libtpu": importlib.metadata.version("libtpu"),
        "width": WIDTH,
        "vocab": VOCAB,
        "compiled": rows,
    }
    if not options.no_timing:
        figures["cpu"] = times = cpu_times()
        print(
            f"this CPU, {times['tokens']} tokens x {times['width']} x {times['vocab']}: "
            + ", ".join(f"{name} {ms} ms ({times['ratio'][name]})" for name, ms in times["ms"].items())
        )
    print(f"written to {machine.write('linear_cross_entropy', figures).relative_to(Path(__file__).parent.parent)}")


KEYS = ("ms", "products", "hbm_gb", "temporary_gib")


if __name__ == "__main__":
    main()
