"""Savings of sampling without a sort: measured on this machine's CPU, and from the static schedules of four TPUs.

    python benchmarks/sampling.py [--rows 64] [--repeats 3]

Needs libtpu for the TPU part. Writes results/sampling.json:
    cpu   seconds of the "xla" implementation and of a sorting sampler (jax.lax.sort, cumsum), best of interleaved
          repeats, and their ratio. Both do temperature, top-k, top-p and both log-probabilities.
    tpu   kernel: bundles per row, from the loops' bundles and trips, and HBM bytes read per row (logits and parameters,
          once, as the kernel's block copies them). Sorting sampler compiled by XLA for the same chip: bytes accessed by
          XLA's count, each operation's operands and results once, so passes inside the sort are missing; and XLA's
          estimated cycles of everything but the sort (if this JAX can print the program).
The probes of a bisection are counted on this machine, in blocks of 8 rows of synthetic logits.
"""

import argparse
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import kernel_schedule
import kernel_targets
import machine
import numpy as np

from pallas_kernels import chips
from pallas_kernels.sampling import parameters, sample, selection, wide
from pallas_kernels.sampling.tpu import CHUNK, LANES, LARGEST, PARTS, ROWS

VOCAB = 151_936
SETTINGS = {"plain": (0, 1.0), "top-k 50": (50, 1.0), "top-p 0.9": (0, 0.9), "top-k 50, top-p 0.9": (50, 0.9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.rows % ROWS or arguments.rows < 8 * ROWS:
        # With few blocks the compiler drops the loop over them, and the loops read from the schedule are others.
        parser.error(f"--rows {arguments.rows}: give a multiple of {ROWS} from {8 * ROWS} on")
    logits_BV = synthetic_logits(arguments.rows)
    figures: dict[str, Any] = {
        "command": "python benchmarks/sampling.py",
        "rows": arguments.rows,
        "vocabulary": VOCAB,
        "load_average": round(os.getloadavg()[0], 1),
    }
    figures["cpu"] = {name: on_cpu(logits_BV, *s, arguments.repeats) for name, s in SETTINGS.items()}
    figures["probes"] = {name: count_probes(logits_BV, *s) for name, s in SETTINGS.items()}
    figures["tpu"] = {chip: on_tpu(chip, arguments.rows, figures["probes"]) for chip in chips.CHIPS}
    path = machine.write("sampling", figures)
    for name, row in figures["cpu"].items():
        print(f"{name:20} xla {row['xla_seconds']:.3f} s, sort {row['sort_seconds']:.3f} s: {row['sort_to_xla']:.1f} x")
    for chip, row in figures["tpu"].items():
        print(f"{chip:6} {row['kernel']}\n       {row['sort']}")
    print(f"written to {path}")


def synthetic_logits(rows: int) -> jax.Array:
    """A bell-shaped bulk, less likely with increasing id, and 1 to 200 outstanding tokens per row: float32 [B, V].

    In the median row these have 96 % of the mass, so its nucleus of 0.9 has a few tokens.
    """
    rng = np.random.default_rng(1)
    logits_BV = 2.5 * rng.standard_normal((rows, VOCAB), np.float32) - 0.4 * np.log(
        1 + np.arange(VOCAB, dtype=np.float32)
    )
    for logits_V in logits_BV:
        standing_out = rng.integers(0, VOCAB, rng.integers(1, 200))
        logits_V[standing_out] += 8 + rng.exponential(3, len(standing_out)).astype(np.float32)
    return jnp.asarray(logits_BV)


def row_arguments(rows: int, top_k: int, top_p: float) -> dict[str, jax.Array]:
    return {
        "seeds_B2": jnp.stack([jnp.arange(rows), jnp.zeros(rows)], axis=1).astype(jnp.uint32),
        "positions_B": jnp.full(rows, 100, jnp.int32),
        "temperature_B": jnp.ones(rows),
        "top_k_B": jnp.full(rows, top_k, jnp.int32),
        "top_p_B": jnp.full(rows, top_p, jnp.float32),
        "min_p_B": jnp.zeros(rows),
    }


def sample_by_sorting(logits_BV, seeds_B2, positions_B, temperature_B, top_k_B, top_p_B, min_p_B):
    """The usual way: sort, cut by rank and by cumulative probability, draw from the cumulative probability."""
    x_BV = logits_BV / temperature_B[:, None]
    ids_BV = jnp.broadcast_to(jnp.arange(x_BV.shape[1], dtype=jnp.int32), x_BV.shape)
    negative_BV, ids_BV = jax.lax.sort((-x_BV, ids_BV), dimension=1, num_keys=1)
    rank_V = jnp.arange(x_BV.shape[1])
    kept_k_BV = (rank_V < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    p_BV = jax.nn.softmax(jnp.where(kept_k_BV, -negative_BV, -jnp.inf), axis=1)
    upto_BV = jnp.cumsum(p_BV, axis=1)
    kept_B = jnp.sum(upto_BV - p_BV < top_p_B[:, None], axis=1, keepdims=True)
    mass_B1 = jnp.take_along_axis(upto_BV, kept_B - 1, axis=1)

    def uniform(seed, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))

    u_B1 = jax.vmap(uniform)(seeds_B2[:, 0], positions_B)[:, None]
    drawn_B1 = jnp.minimum(jnp.sum(upto_BV <= u_B1 * mass_B1, axis=1, keepdims=True), kept_B - 1)
    tokens_B1 = jnp.take_along_axis(ids_BV, drawn_B1, axis=1)
    log_probs_B1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BV, axis=1), tokens_B1, axis=1)
    sampling_log_probs_B1 = jnp.log(jnp.take_along_axis(p_BV, drawn_B1, axis=1) / mass_B1)
    return tokens_B1[:, 0], log_probs_B1[:, 0], sampling_log_probs_B1[:, 0]


def on_cpu(logits_BV: jax.Array, top_k: int, top_p: float, repeats: int) -> dict[str, float]:
    arguments = row_arguments(len(logits_BV), top_k, top_p)
    functions: dict[str, Callable[..., Any]] = {"xla": jax.jit(sample), "sort": jax.jit(sample_by_sorting)}
    best = dict.fromkeys(functions, float("inf"))
    for i in range(repeats + 1):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f(logits_BV, **arguments))
            if i > 0:  # the first compiles
                best[name] = min(best[name], time.perf_counter() - start)
    seconds = {f"{name}_seconds": round(value, 4) for name, value in best.items()}
    return seconds | {"sort_to_xla": round(best["sort"] / best["xla"], 2)}


def count_probes(logits_BV: jax.Array, top_k: int, top_p: float) -> dict[str, float]:
    """Mean number of probes of the kernel's bisections for a block of 8 rows.

    Returns probes among the candidates, probes over the vocabulary, and the share of blocks whose candidates suffice.
    """
    among_candidates, over_vocabulary, found = [], [], []
    for first in range(0, len(logits_BV) // ROWS * ROWS, ROWS):
        x_RV = logits_BV[first : first + ROWS]
        rows = parameters.prepare(VOCAB, **row_arguments(len(logits_BV), top_k, top_p))
        rows = jax.tree.map(lambda x_B, first=first: x_B[first : first + ROWS, None], rows)
        top = jnp.max(x_RV, axis=1, keepdims=True)
        mass_RV = np.asarray(parameters.masses(x_RV, top, rows.inverse_temperature), np.int64)
        calls: list[None] = []

        def measure(threshold, x_RV=x_RV, mass_RV=mass_RV, calls=calls):
            def on_host(threshold):
                calls.append(None)
                return as_measure(np.asarray(x_RV) >= threshold, mass_RV)

            return jax.pure_callback(on_host, as_measure(mass_RV >= 0, mass_RV), threshold)

        everything = as_measure(mass_RV >= 0, mass_RV)
        select = partial(
            selection.select,
            rows,
            top=top,
            all_mass=jax.tree.map(jnp.asarray, everything.mass),
            at_min_p=jax.tree.map(jnp.asarray, everything),
            measure=measure,
        )
        draw = select(floor=candidates_floor(x_RV))
        found.append(bool(jnp.all(draw.found != 0)))
        among_candidates.append(len(calls))
        if not found[-1]:
            jax.block_until_ready(select(floor=jnp.full_like(top, -jnp.inf)))
        over_vocabulary.append(len(calls) - among_candidates[-1])
    return {
        "among_candidates": float(np.mean(among_candidates)),
        "over_vocabulary": float(np.mean(over_vocabulary)),
        "candidates_suffice": float(np.mean(found)),
    }


def as_measure(kept_RV: np.ndarray, mass_RV: np.ndarray) -> selection.Measure:
    mass_R1 = np.sum(mass_RV, axis=1, keepdims=True, where=kept_RV)
    mass = wide.Wide((mass_R1 >> 16).astype(np.int32), (mass_R1 & 0xFFFF).astype(np.int32))  # type: ignore[arg-type]
    return selection.Measure(kept_RV.sum(1, keepdims=True).astype(np.int32), mass)


def candidates_floor(x_RV: jax.Array) -> jax.Array:
    """The largest LARGEST-th logit of any lane of any part, as the kernel collects them."""
    chunks = -(-VOCAB // (CHUNK * PARTS)) * PARTS
    padded = np.pad(np.asarray(x_RV), ((0, 0), (0, chunks * CHUNK - VOCAB)), constant_values=-np.inf)
    of_lane = padded.reshape(len(padded), -1, PARTS, CHUNK // LANES, LANES).transpose(0, 2, 4, 1, 3)
    ordered = np.sort(of_lane.reshape(len(padded), PARTS * LANES, -1), axis=2)
    return jnp.asarray(ordered[:, :, -LARGEST].max(axis=1, keepdims=True))


def on_tpu(chip: str, rows: int, probes: dict[str, dict[str, float]]) -> dict[str, Any]:
    (kernel,) = kernel_schedule.compile_target("kernel_targets:draw", chip, {"rows": rows, "vocab_size": VOCAB})
    parts = kernel_targets.sampling_bundles(kernel, VOCAB)
    bundles_a_row = {"plain": round(parts["always"] / ROWS)}
    for name in list(SETTINGS)[1:]:
        block = parts["always"] + parts["filtered"] + parts["probe"] * probes[name]["among_candidates"]
        block += parts["full_probe"] * probes[name]["over_vocabulary"]
        bundles_a_row[name] = round(block / ROWS)
    worst_probes = 2 * 33
    worst = sum(parts.values()) + (parts["probe"] + parts["full_probe"]) * (worst_probes - 1)
    bundles_a_row["worst case"] = round(worst / ROWS)
    figures = {
        "bundles_a_row": bundles_a_row,
        "block": parts,
        "hbm_bytes_a_row": 4 * (VOCAB + len(parameters.Parameters._fields)),
        "vmem_mib": round(kernel.vmem_bytes / 2**20, 1),
    }
    return {"kernel": figures, "sort": sort_on_tpu(chip, rows)}


def sort_on_tpu(chip: str, rows: int) -> dict[str, Any]:
    """XLA's figures for `sample_by_sorting` per row, and the ratio of its bytes to the logits' bytes."""
    mesh = chips.compile_only_mesh(chip)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = {"logits_BV": jnp.zeros((rows, 1)), **row_arguments(rows, 1, 1.0)}
    specs = {
        name: jax.ShapeDtypeStruct((rows, VOCAB) if name == "logits_BV" else x.shape, x.dtype, sharding=replicated)
        for name, x in arguments.items()
    }
    with jax.set_mesh(mesh):
        compiled: Any = jax.jit(sample_by_sorting).lower(*specs.values()).compile()
    accessed = compiled.cost_analysis()["bytes accessed"]
    figures = {
        "bytes_accessed_a_row": round(accessed / rows),
        "logits_read_once": round(accessed / (4 * rows * VOCAB), 1),
    }
    try:
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())))
    except jax.errors.JaxRuntimeError:  # older JAX cannot print this version's asynchronous copies
        return figures
    return figures | {"cycles_a_row_without_the_sort": round(cycles / rows)}


if __name__ == "__main__":
    main()
