"""Bytes and cost of a decoding step whose sequences share a prefix, against a step that treats each separately.

    python benchmarks/shared_prefix_attention.py [--chips v5e v6e ...] [--suffix 4096] [--no-timing]

For prefixes of 2k, 8k and 32k tokens, eight prefix groups of 4, 16 and 32 sequences, Qwen3-8B's attention (one layer),
pages of 64 tokens:

  bytes      keys and values read per step: by formula, and by counting the copies that the kernel's work list issues.
             "Per sequence" is the same kernel without sharing: every sequence has prefix and suffix in its own row
  bundles    per core and step, from the compiled kernel's static schedule: loop bodies times their runs in the work
             list (starting the copies adds about 10 per page). An estimate, not a measurement:
             see kernel_schedule.py
  HBM time   bytes over the chip's memory bandwidth; the step takes at least the larger of the two times

With a GPU, also the time of a step in XLA: shared prefix, per sequence over pages, and per sequence over a dense cache.
Without one, the same three run at a small size on the CPU, which says nothing about accelerators.

Writes results/shared_prefix_attention.json.
"""

import argparse
import dataclasses
import importlib.metadata
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_schedule
import machine
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import CHIPS
from pallas_kernels.shared_prefix_attention import PageTables, shared_prefix_attention
from pallas_kernels.shared_prefix_attention.paged_kernel import WorkList
from pallas_kernels.shared_prefix_attention.tables import make_subgroups
from pallas_kernels.shared_prefix_attention.tpu import choose_tiling, prefix_work, row_counts, suffix_work

PREFIXES = (2048, 8192, 32768)
SEQUENCES = (4, 16, 32)
VERSIONS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "tpu7x": pltpu.ChipVersion.TPU_7X,
}
DECODE = "kernel_targets:decode"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A batch of equal prefix groups and the attention's sizes."""

    groups: int = 8
    sequences: int = 16  # per group
    prefix: int = 8192
    suffix: int = 4096
    page_size: int = 64
    num_heads: int = 32
    num_kv_heads: int = 8
    width: int = 128

    @property
    def batch(self) -> int:
        return self.groups * self.sequences

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.width * 2

    @property
    def num_pages(self) -> int:
        return self.groups * self.pages(self.prefix) + self.batch * self.pages(self.suffix)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)


def tables(sizes: Sizes, shared: bool) -> PageTables:
    """The step's tables on scattered pages. Not shared: a sequence's row is its group's prefix pages, then its own.

    An unshared prefix ends at its last full page, since rows have no gaps; the sizes used here are full pages.
    """
    assert sizes.prefix % sizes.page_size == 0
    pages = np.random.default_rng(0).permutation(sizes.num_pages).astype(np.int32)
    prefix_PM, suffix_BM = np.split(pages, [sizes.groups * sizes.pages(sizes.prefix)])
    prefix_PM, suffix_BM = prefix_PM.reshape(sizes.groups, -1), suffix_BM.reshape(sizes.batch, -1)
    group_B = np.repeat(np.arange(sizes.groups, dtype=np.int32), sizes.sequences)
    prefix_length = sizes.prefix if shared else 0
    return PageTables(
        prefix_pages_PM=prefix_PM,
        prefix_lengths_P=np.full(sizes.groups, prefix_length, np.int32),
        group_of_B=group_B if shared else np.full_like(group_B, -1),
        suffix_pages_BM=suffix_BM if shared else np.concatenate([prefix_PM[group_B], suffix_BM], axis=1),
        suffix_lengths_B=np.full(sizes.batch, sizes.suffix + sizes.prefix - prefix_length, np.int32),
    )


@dataclasses.dataclass
class Walk:
    """What the kernel does for a work list."""

    copies: int = 0  # one page each
    steps: int = 0
    chunks: Counter = dataclasses.field(default_factory=Counter)  # runs by body


def walk(work: WorkList, page_size: int, block: int, chunk: int) -> Walk:
    """The kernel's loop over items and blocks, counting what it would do."""
    steps, lengths_J, _, _, buckets_J = (np.asarray(x) for x in work)
    seen = Walk()
    item = index = 0
    for _ in range(steps[0]):
        length = int(lengths_J[item])
        seen.steps += 1
        seen.copies += min(-(-length // page_size) - index * (block // page_size), block // page_size)
        seen.chunks[int(buckets_J[item])] += -(-min(length - index * block, block) // chunk)
        item, index = (item + 1, 0) if (index + 1) * block >= length else (item, index + 1)
    return seen


def walk_step(sizes: Sizes, chip: str, shared: bool) -> tuple[Walk, Walk]:
    """The walks of the prefix kernel and the suffix kernel."""
    tiling = choose_tiling(sizes.num_kv_heads, sizes.width, 2, CHIPS[chip])
    step = PageTables(*map(jnp.asarray, tables(sizes, shared)))
    subgroups = make_subgroups(step.group_of_B, sizes.groups)
    repeats = sizes.num_heads // sizes.num_kv_heads
    prefix, _ = prefix_work(step, subgroups, repeats, sizes.page_size, tiling.block)
    suffix = suffix_work(step, sizes.page_size, tiling.block)
    sizes_of_step = sizes.page_size, tiling.block, tiling.chunk
    return walk(prefix, *sizes_of_step), walk(suffix, *sizes_of_step)


def read_bytes(sizes: Sizes, chip: str) -> dict[str, float]:
    """Key and value bytes of one layer's step, by formula and by counting copies."""
    figures: dict[str, float] = {}
    for name, shared in (("shared", True), ("per_sequence", False)):
        readers = sizes.groups if shared else sizes.batch
        figures[f"{name}_formula"] = (readers * sizes.prefix + sizes.batch * sizes.suffix) * sizes.token_bytes
        ways = walk_step(sizes, chip, shared)
        figures[f"{name}_copied"] = sum(way.copies for way in ways) * sizes.page_size * sizes.token_bytes
    figures["ratio"] = figures["per_sequence_copied"] / figures["shared_copied"]
    return figures


def bodies(chip: str, sizes: Sizes) -> tuple[list[int], int]:
    """Bundles of one chunk in the prefix kernel's bodies, smallest group first, and in the suffix kernel's."""
    schedules = kernel_schedule.compile_target(
        DECODE,
        chip,
        {
            "num_heads": sizes.num_heads,
            "num_kv_heads": sizes.num_kv_heads,
            "width": sizes.width,
            "page_size": sizes.page_size,
        },
    )
    bundles = {
        s.kernel.rsplit("_", 1)[1]: [r.bundles for r in s.bodies] for s in schedules if "prefix_attention" in s.kernel
    }
    wanted = len(row_counts(sizes.num_heads // sizes.num_kv_heads))
    if len(bundles["prefix"]) != wanted or len(bundles["suffix"]) != 1:
        raise RuntimeError(f"the kernels have bodies {bundles}; expected {wanted} and 1")
    return bundles["prefix"], bundles["suffix"][0]


def estimate(sizes: Sizes, chip: str, prefix_bundles: list[int], suffix_bundles: int) -> dict[str, float]:
    """Bundles of a step for one layer, and the microseconds implied by bundles and by bytes."""
    cores = choose_tiling(sizes.num_kv_heads, sizes.width, 2, CHIPS[chip]).split  # each computes its part of the heads
    bandwidth = cores * pltpu.get_tpu_info_for_chip(VERSIONS[chip], 1).mem_bw_bytes_per_second
    figures: dict[str, float] = {}
    for name, shared in (("shared", True), ("per_sequence", False)):
        prefix, suffix = walk_step(sizes, chip, shared)
        bundles = sum(prefix_bundles[body] * times for body, times in prefix.chunks.items())
        bundles += suffix_bundles * suffix.chunks.total()
        copied = (prefix.copies + suffix.copies) * sizes.page_size * sizes.token_bytes
        figures[f"{name}_bundles"] = bundles
        figures[f"{name}_core_us"] = round(bundles / CHIPS[chip].clock_ghz / 1e3, 1)
        figures[f"{name}_hbm_us"] = round(copied / bandwidth * 1e6, 1)
        figures[f"{name}_bound_us"] = max(figures[f"{name}_core_us"], figures[f"{name}_hbm_us"])
    figures["speedup"] = round(figures["per_sequence_bound_us"] / figures["shared_bound_us"], 2)
    return figures


def methods(sizes: Sizes, dtype: Any) -> dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]]:
    """Three ways to compute the same step in XLA, each as a function and its arguments."""
    keys = jax.random.split(jax.random.key(0))
    q_BNH = jax.random.normal(keys[0], (sizes.batch, sizes.num_heads, sizes.width), dtype)
    shape = (sizes.num_pages, 2, sizes.num_kv_heads, sizes.page_size, sizes.width)
    pool = jax.random.normal(keys[1], shape, dtype)
    shared, separate = (PageTables(*map(jnp.asarray, tables(sizes, shared))) for shared in (True, False))

    kv_BM2KTH = pool[separate.suffix_pages_BM]
    kv_2BCKH = kv_BM2KTH.transpose(2, 0, 1, 4, 3, 5).reshape(2, sizes.batch, -1, sizes.num_kv_heads, sizes.width)
    length_B = separate.suffix_lengths_B

    def paged(q_BNH, pool, step):
        return shared_prefix_attention(q_BNH, pool, step, implementation="xla")

    def dense(q_BNH, k_BCKH, v_BCKH, length_B):
        return jax.nn.dot_product_attention(q_BNH[:, None], k_BCKH, v_BCKH, key_value_seq_lengths=length_B)[:, 0]

    return {
        "shared prefix": (jax.jit(paged), (q_BNH, pool, shared)),
        "per sequence, pages": (jax.jit(paged), (q_BNH, pool, separate)),
        "per sequence, dense": (jax.jit(dense), (q_BNH, *kv_2BCKH, length_B)),
    }


def seconds(f: Callable[..., Any], arguments: tuple[Any, ...], repeats: int = 20, batches: int = 5) -> float:
    """Median time of a call, of `batches` runs of `repeats` calls dispatched together."""
    jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        results = [f(*arguments) for _ in range(repeats)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def time_steps(sizes: Sizes, dtype: Any, **options: int) -> dict[str, dict[str, float]]:
    """Attention steps of one layer: seconds, and tokens per second (one per sequence)."""
    figures = {}
    for name, (f, arguments) in methods(sizes, dtype).items():
        taken = seconds(f, arguments, **options)
        figures[name] = {"seconds": taken, "tokens_per_second": sizes.batch / taken}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", default=list(CHIPS), choices=tuple(CHIPS), help="chips to compile for")
    parser.add_argument("--suffix", type=int, default=4096, help="tokens of each sequence's suffix")
    parser.add_argument("--no-timing", action="store_true", help="skip timing the XLA implementations")
    options = parser.parse_args()
    grid = [
        Sizes(prefix=prefix, sequences=sequences, suffix=options.suffix)
        for prefix in PREFIXES
        for sequences in SEQUENCES
    ]
    figures: dict[str, Any] = {
        "command": "python benchmarks/shared_prefix_attention.py",
        "libtpu": importlib.metadata.version("libtpu"),
        "sizes": dataclasses.asdict(Sizes(suffix=options.suffix)) | {"prefix": PREFIXES, "sequences": SEQUENCES},
        "bytes": report_bytes(grid),
        "chips": {chip: report_chip(grid, chip) for chip in options.chips},
    }
    if not options.no_timing:
        figures["xla"] = report_times(options.suffix)
    path = machine.write("shared_prefix_attention", figures)
    print(f"\nwritten to {path}")


def report_bytes(grid: list[Sizes]) -> list[dict[str, float]]:
    print("MiB of keys and values read per step and layer; copied: counted from the work list")
    print(f"{'prefix':>7} {'sequences':>13} {'shared':>9} {'copied':>9} {'per seq.':>9} {'copied':>9} {'ratio':>6}")
    rows = []
    for sizes in grid:
        row = read_bytes(sizes, "v5e")
        rows.append({"prefix": sizes.prefix, "sequences": sizes.sequences, **row})
        mib = [
            row[k] / 2**20 for k in ("shared_formula", "shared_copied", "per_sequence_formula", "per_sequence_copied")
        ]
        print(f"{sizes.prefix:7,} {sizes.sequences:13}", *(f"{x:9,.0f}" for x in mib), f"{row['ratio']:6.2f}")
    return rows


def report_chip(grid: list[Sizes], chip: str) -> dict[str, Any]:
    prefix_bundles, suffix_bundles = bodies(chip, grid[0])
    tiling = choose_tiling(grid[0].num_kv_heads, grid[0].width, 2, CHIPS[chip])
    print(
        f"\n{chip}: bundles of {tiling.chunk} tokens, a core's heads: prefix {prefix_bundles} for groups of up to 4, "
        f"16, 32 and 64 sequences, suffix {suffix_bundles}"
    )
    print("us per step and layer: the core's bundles over its clock, and bytes over bandwidth")
    print(f"{'prefix':>7} {'sequences':>13} {'core':>9} {'HBM':>9} {'core p.s.':>10} {'HBM p.s.':>9} {'speed-up':>9}")
    rows = []
    for sizes in grid:
        row = estimate(sizes, chip, prefix_bundles, suffix_bundles)
        rows.append({"prefix": sizes.prefix, "sequences": sizes.sequences, **row})
        print(
            f"{sizes.prefix:7,} {sizes.sequences:13} {row['shared_core_us']:9,.0f} {row['shared_hbm_us']:9,.0f} "
            f"{row['per_sequence_core_us']:10,.0f} {row['per_sequence_hbm_us']:9,.0f} {row['speedup']:9.2f}"
        )
    return {"prefix_bodies": prefix_bundles, "suffix_body": suffix_bundles, "chunk": tiling.chunk, "steps": rows}


def report_times(suffix: int) -> dict[str, Any]:
    device = jax.devices()[0]
    if device.platform == "gpu":
        grid, dtype = (
            [Sizes(prefix=p, sequences=k, suffix=suffix, groups=2) for p in PREFIXES for k in (4, 16)],
            jnp.bfloat16,
        )
    else:
        small = Sizes(groups=2, prefix=512, suffix=64, page_size=16, num_heads=4, num_kv_heads=1, width=64)
        grid, dtype = [dataclasses.replace(small, sequences=k) for k in (4, 16)], jnp.float32
    print(f"\nXLA on {device.device_kind}: us per step and layer")
    rows = []
    for sizes in grid:
        row = time_steps(sizes, dtype)
        rows.append({**dataclasses.asdict(sizes), **row})
        times = ", ".join(f"{name} {1e6 * row[name]['seconds']:,.0f}" for name in row)
        print(f"  prefix {sizes.prefix:,}, {sizes.groups} x {sizes.sequences} sequences: {times}")
    return {"device": device.device_kind, "platform": device.platform, "dtype": jnp.dtype(dtype).name, "steps": rows}


if __name__ == "__main__":
    main()
