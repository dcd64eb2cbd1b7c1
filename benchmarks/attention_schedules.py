"""Static schedules of flash attention on TPUs: ours, tokamax's and JAX's splash attention, side by side.

    pip install jax libtpu tokamax        # Python 3.12 or newer; without tokamax its columns stay empty
    python benchmarks/attention_schedules.py [--chips v5e v6e] [--tune]

Needs no TPU. The real compiler compiles every kernel for every chip; the bundles of a whole call are read from its
output (kernel_schedule.py) and added up:

    bundles = full tiles * body of a full tile + diagonal tiles * body of a diagonal tile
              + tiles * bundles per grid step + rows of tiles * bundles per row (initialise, write)

The rate is useful floating-point operations (4 L^2 D forward and 10 L^2 D backward, half of it if causal) per bundle.
Each kernel uses the best of several block sizes and options. Our forward pass is counted without its repair (see
pallas_kernels/flash_attention/tpu_forward.py), which does not run while logits stay within +-41 nats. The last columns
give the cost of a repaired tile. Writes results/attention_schedules.json.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kernel_schedule
import machine

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp

from pallas_kernels.checks import ArgumentError
from pallas_kernels.chips import CHIPS

HEADS = 2
KERNELS = ("ours", "tokamax", "jax")


@dataclasses.dataclass(frozen=True)
class Shape:
    length: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"{self.length:>6} D={self.head_dim:<3} {'causal' if self.causal else 'full'}"


SHAPES = (
    Shape(4096, 128, True),
    Shape(8192, 128, True),
    Shape(32768, 128, True),
    Shape(2704, 96, False),
    Shape(1296, 96, False),
)
# Outside the bodies, code of at least this many bundles runs once per row of tiles, shorter code at every grid step.
STEP_BUNDLES = 64


# The kernels ----------------------------------------------------------------------------------------------------------


def ours(shape: Shape, which: str, blocks: list[int] | None) -> tuple[str, dict[str, Any]]:
    length = min(shape.length, 8192)  # a tile's schedule does not depend on the number of tiles
    arguments = dict(length=length, head_dim=shape.head_dim, causal=shape.causal, blocks=blocks, heads=HEADS)
    return f"kernel_targets:flash_{which}", arguments


def splash_target(
    package: str, which: str, length: int, head_dim: int, causal: bool, block: int, options: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Splash attention of "tokamax" or "jax", in its layout: [heads, length, head dim]."""
    if package == "tokamax":
        from tokamax._src.ops.experimental.tpu.splash_attention import (  # type: ignore[import-not-found]
            splash_attention_kernel,
            splash_attention_mask,
        )

        sizes = splash_attention_kernel.SplashConfig(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, **options,
        )  # fmt: skip
        mask = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((length, length))
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, config=sizes)
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        sizes = splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
        )  # fmt: skip
        one = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((length, length))
        mask = splash_attention_mask.MultiHeadMask([one] * HEADS)
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)

    x = jax.ShapeDtypeStruct((HEADS, length, head_dim), jnp.bfloat16)

    def gradient(q, k, v, d_out):
        return jax.vjp(kernel, q, k, v)[1](d_out)

    return (kernel, (x, x, x)) if which == "forward" else (gradient, (x, x, x, x))


# From schedules to a call ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of a kernel's parts, in bundles."""

    full: int
    diagonal: int
    step: int
    row: int
    block_q: int
    block_kv: int
    repair: int = 0
    occupancy: float = 0.0  # of the matrix unit, in a full tile
    spills: int = 0

    def call(self, shape: Shape) -> float:
        """Bundles of one head."""
        rows, columns = math.ceil(shape.length / self.block_q), math.ceil(shape.length / self.block_kv)
        if not shape.causal:
            return rows * columns * (self.full + self.step) + rows * self.row
        assert self.block_q == self.block_kv
        tiles = rows * (rows + 1) // 2
        return (tiles - rows) * self.full + rows * self.diagonal + tiles * self.step + rows * self.row


def cost(
    found: kernel_schedule.Schedule, shape: Shape, block_q: int, block_kv: int, kernel: str, ragged: bool = False
) -> Cost:
    bodies = found.bodies
    repair = 0
    if kernel == "ours" and "forward" in found.kernel:  # the last body is the loop of the repair
        bodies, repair = bodies[:-1], bodies[-1].bundles * (block_kv // 256 if block_kv % 256 == 0 else 1)
    # A tile in which the keys end has its own body, after the full tile's.
    full = bodies[-1] if ragged else bodies[0]
    diagonal = bodies[-1] if shape.causal else full
    outside = [region for region in found.regions if region not in found.bodies]
    return Cost(
        full=full.bundles,
        diagonal=diagonal.bundles,
        step=sum(region.bundles for region in outside if region.bundles < STEP_BUNDLES),
        row=sum(region.bundles for region in outside if region.bundles >= STEP_BUNDLES),
        block_q=block_q,
        block_kv=block_kv,
        repair=repair,
        occupancy=found.use(full, "MATMUL"),
        spills=full.operations["VSTORE:SPILL"],
    )


def padded(length: int, block: int) -> int:
    return math.ceil(length / block) * block


def candidates(kernel: str, shape: Shape, chip: str, tune: bool) -> Iterable[tuple[str, str, dict[str, Any], int, int]]:
    """Yields (label, which pass, arguments of the target, block_q, block_kv) of everything to compile."""
    for which in ("forward", "backward"):
        if kernel == "ours":
            chosen: list[list[int] | None] = [None]
            if tune and shape.causal:
                chosen = [[b, b, b, b, d] for b in (512, 1024, 2048) for d in (256, 512) if d < b]
            for blocks in chosen:
                label = "table" if blocks is None else f"{blocks[0]}/{blocks[4]}"
                blocks = blocks or chosen_sizes(shape, chip)
                q, kv = blocks[:2] if which == "forward" else blocks[2:4]
                yield label, which, {"blocks": blocks}, q, kv
            continue
        # The sizes in their own tuning guides for these shapes; smaller tiles are always slower.
        sides = (
            (1024, 2048) if shape.causal else (padded(math.ceil(shape.length / math.ceil(shape.length / 1408)), 128),)
        )
        choices: list[dict[str, Any]] = [{}]
        if kernel == "tokamax" and shape.causal:
            choices += [{"qk_diag_skip": True, "sv_diag_skip": True}]
        for side in sides:
            for options in choices:
                yield f"{side} {' '.join(options)}".strip(), which, {"block": side, "options": options}, side, side


def measure(kernel: str, shape: Shape, chip: str, label: str, which: str, arguments: dict[str, Any], bq: int, bkv: int):
    """(label, Cost or None, error or None) of one candidate."""
    if kernel == "ours":
        target, keywords = ours(shape, which, arguments["blocks"])
        ragged = not shape.causal and shape.length % bkv != 0
    else:
        length = padded(min(shape.length, 8192), bq)
        target = "attention_schedules:splash_target"
        keywords = dict(
            package=kernel, which=which, length=length, head_dim=shape.head_dim, causal=shape.causal, **arguments
        )
        ragged = False
    try:
        found = kernel_schedule.compile_target(target, chip, keywords)
    except ArgumentError as error:
        return label, None, str(error).splitlines()[-1][:200]
    wanted = [s for s in found if s.bodies and (("dkv" in s.kernel or "back" in s.kernel) == (which == "backward"))]
    return label, cost(wanted[-1], shape, bq, bkv, kernel, ragged), None


def chosen_sizes(shape: Shape, chip: str) -> list[int]:
    from pallas_kernels.chips import compile_only_mesh
    from pallas_kernels.flash_attention.tpu import choose_block_sizes

    with jax.set_mesh(compile_only_mesh(chip)):
        sizes = choose_block_sizes(
            shape.length, shape.length, shape.head_dim, causal=shape.causal, segmented=False, itemsize=2
        )
    return list(dataclasses.astuple(sizes))


# The table ------------------------------------------------------------------------------------------------------------


def run(chips: Iterable[str], kernels: list[str], tune: bool) -> list[dict[str, Any]]:
    if not importlib.util.find_spec("tokamax"):
        kernels = [kernel for kernel in kernels if kernel != "tokamax"]
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for chip in chips:
            # Causal lengths share a schedule and differ only in the number of tiles.
            classes = {(s.head_dim, s.causal, 0 if s.causal else s.length): s for s in SHAPES}
            jobs = [
                (kernel, shape, chip, *candidate)
                for shape in classes.values()
                for kernel in kernels
                for candidate in candidates(kernel, shape, chip, tune)
            ]
            results = list(pool.map(lambda job: measure(*job), jobs))
            for shape in SHAPES:
                for which in ("forward", "backward"):
                    row: dict[str, Any] = {"chip": chip, "shape": dataclasses.asdict(shape), "pass": which}
                    useful = (4 if which == "forward" else 10) * shape.length**2 * shape.head_dim
                    useful /= 2 if shape.causal else 1
                    for kernel in kernels:
                        tried = {}
                        for job, (label, found, error) in zip(jobs, results, strict=True):
                            same = (job[1].head_dim, job[1].causal) == (shape.head_dim, shape.causal)
                            if job[0] != kernel or job[4] != which or not same:
                                continue
                            if not shape.causal and job[1].length != shape.length:
                                continue
                            if found is None:
                                tried[label] = {"error": error}
                                continue
                            # Long enough that the tile is not mostly padding.
                            bundles = found.call(shape)
                            tried[label] = {
                                "flop_per_bundle": round(useful / bundles), "bundles_per_head": round(bundles),
                                **dataclasses.asdict(found), "repaired": found.full + found.repair,
                            }  # fmt: skip
                        good = {label: t for label, t in tried.items() if "error" not in t}
                        best = max(good, key=lambda label: good[label]["flop_per_bundle"]) if good else None
                        row[kernel] = {"best": best, "tried": tried, **(good[best] if best else {})}
                    rows.append(row)
                    print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    text = f"{row['chip']:<6} {Shape(**row['shape'])!s:<20} {row['pass']:<9}"
    peak = kernel_schedule.ceiling(row["chip"])
    for kernel in ("ours", "tokamax", "jax"):
        value = row.get(kernel, {}).get("flop_per_bundle")
        text += f" {value:>9,} {value / peak:>4.0%}" if value else f" {'-':>9} {'':>4}"
    if row.get("tokamax", {}).get("flop_per_bundle"):
        text += f"  x{row['ours']['flop_per_bundle'] / row['tokamax']['flop_per_bundle']:.2f}"
    return text + f"  {row['ours']['best']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument(
        "--tune", action="store_true", help="try all block sizes of our kernels, for block_sizes.py; writes nothing"
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=list(KERNELS),
        choices=KERNELS,
        help="chips to compile for; the results file keeps the others",
    )
    arguments = parser.parse_args()
    columns = f"{'ours':>14} {'tokamax':>14} {'jax splash':>14}  ours/tokamax, useful flop/bundle"
    print(f"{'chip':<6} {'shape':<20} {'pass':<9} {columns}")
    for chip in arguments.chips:
        rows = run([chip], ["ours"] if arguments.tune else arguments.kernels, arguments.tune)
        if not arguments.tune:
            keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Replace a chip's entries in the results file by new ones."""
    path = machine.RESULTS / "attention_schedules.json"
    saved = json.loads(path.read_text()) if path.exists() else {"rows": [], "compiler": {}}
    others = [row for row in saved["rows"] if row["chip"] != rows[0]["chip"]]
    before = {(str(row["shape"]), row["pass"]): row for row in saved["rows"] if row["chip"] == rows[0]["chip"]}
    rows = [before.get((str(row["shape"]), row["pass"]), {}) | row for row in rows]
    versions = {package: machine.version(package) for package in ("jax", "libtpu", "tokamax")}
    if versions["tokamax"] is None:
        versions["tokamax"] = saved["compiler"].get("tokamax")
    machine.write("attention_schedules", {"compiler": versions, "rows": others + rows})


if __name__ == "__main__":
    main()
