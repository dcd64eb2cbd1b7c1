"""Read the static schedule of a TPU kernel on a machine without a TPU.

    python benchmarks/kernel_schedule.py kernel_targets:flash_forward --chip v6e length=4096

A TPU core issues one bundle (a very long instruction word) per cycle, in order, and the compiler decides at compile
time which operations share a bundle, so the compiled program determines most of a kernel's cost. This module compiles a
function for a given TPU with libtpu, lets the compiler dump its bundles, and reads from them, for every kernel:

    body        a stretch of the program that feeds the matrix unit: the steady state of a loop or of a grid step, apart
                from what surrounds it (pipeline prologue and epilogue, initialisation, the final write)
    bundles     the cycles of one pass through it, including stalls that the compiler foresaw
    matrix      the share of those bundles in which a matrix unit is busy, averaged over the units. A unit that
                multiplies a 128-deep operand on a 256-deep array is busy and half idle: flop/bundle shows that, this
                does not
    spills      stores of vector registers that did not fit, and their loads
    flop/bundle useful floating-point operations (given by the caller) per bundle, and the chip's ceiling
    vmem        the largest address of vector memory in use: windows, scratch and spills

The result is an estimate for comparing kernels built by the same compiler, not a measured speed. It ignores DMA stalls
(a kernel bound by HBM bandwidth looks as fast as one that is not), run-time branches, contention between a chip's cores
and clock throttling. A loop is counted once; multiply by its trip count.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.checks import ArgumentError, check
from pallas_kernels.chips import CHIPS, compile_only_mesh

_LABELS = "(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization|post-delay-converter)"
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*>*\s*\{")
_LOOP_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{")
_BRANCH = re.compile(r"target bundleno = (\d+)")
_BRANCH_DELAY = {"tpu7x": 6}  # bundles issued while a branch is taken; 4 on other chips
_VMEM = re.compile(r"#allocation\S* \[.*space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)")


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of straight-line bundles: the body of a loop or of a branch, without the regions inside it."""

    number: int  # the compiler's; 0 is the whole kernel
    first: int  # index of its first bundle
    depth: int  # regions around it
    bundles: int  # its own, excluding inner regions
    operations: Mapping[str, int]  # issued, by unit: MATMUL, VALU, VSTORE:SPILL and so on

    @property
    def is_body(self) -> bool:
        return self.operations["MATMUL"] > 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop, such as the grid's, for kernels that do not use the matrix unit."""

    first: int  # index of its first bundle
    depth: int  # of loops, 1 for the outermost
    bundles: int  # of one trip, excluding inner loops


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The compiled schedule of one kernel."""

    kernel: str
    chip: str
    slots: Mapping[str, int]  # operations a bundle can hold, by unit
    regions: tuple[Region, ...]
    vmem_bytes: int
    loops: tuple[Loop, ...] = ()

    @property
    def bundles(self) -> int:
        return sum(region.bundles for region in self.regions)

    @property
    def bodies(self) -> tuple[Region, ...]:
        """The regions that feed the matrix unit, in program order."""
        return tuple(region for region in self.regions if region.is_body)

    def use(self, region: Region, unit: str) -> float:
        """The share of a unit's slots that a region fills."""
        return region.operations[unit] / (region.bundles * self.slots[unit])


def ceiling(chip: str) -> float:
    """The chip's peak bfloat16 floating-point operations per bundle: TFLOP/s of a core over its clock."""
    return CHIPS[chip].bf16_tflops * 1e3 / CHIPS[chip].clock_ghz


def read(folder: Path, chip: str) -> list[Schedule]:
    """The schedules of every kernel in a folder of compiler dumps, in the order of compilation."""
    schedules = []
    for path in sorted(folder.glob("*-packed-bundles-post-ra.txt")):
        if "schedule-analysis" in path.name:
            continue
        prefix, kernel, number = re.fullmatch(r"(\d+)-(.+)-(\d+)-packed-bundles-post-ra\.txt", path.name).groups()  # type: ignore[union-attr]
        if kernel == "TLP" or not _is_kernel(folder, f"{prefix}-{kernel}-*"):
            continue  # the surrounding program, and XLA's own operations
        following = {match[1]: p for p in folder.glob(f"{prefix}-{kernel}-*") if (match := _label(p))}
        slots, use = _read_use(following["pre-delay_hlo-static-per-bundle-utilization"])
        regions = _read_regions(path, use)
        vmem = _read_vmem(following["post-delay-converter"])
        schedules.append(Schedule(re.sub(r"\.\d+$", "", kernel), chip, slots, regions, vmem, _read_loops(path, chip)))
    return schedules


def _is_kernel(folder: Path, prefix: str) -> bool:
    """Whether a dump is a Mosaic kernel's: the compiler's analysis names its operation."""
    analyses = folder.glob(f"{prefix}-schedule-analysis_packed-bundles-post-ra.txt")
    return any('custom_call_target="tpu_custom_call"' in path.read_text() for path in analyses)


def _label(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r".+-\d+-" + _LABELS + r"\.txt", path.name)


def _read_use(path: Path) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The slots of every unit, and the operations of every bundle."""
    lines = path.read_text().splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    slots = dict(zip(units, map(int, lines[2].split()), strict=True))
    return slots, [dict(zip(units, map(int, line.split()), strict=True)) for line in lines[4:]]


def _read_regions(path: Path, use: Sequence[Mapping[str, int]]) -> tuple[Region, ...]:
    """Attribute every bundle to the innermost region that holds it.

    The dump marks the first and the last bundle of a region in that bundle's comment. A region that ends where another
    begins shares no bundle with it.
    """
    open_regions: list[int] = []
    first: dict[int, int] = {}
    depth: dict[int, int] = {}
    counts: dict[int, dict[str, int]] = {}
    index = -1
    waiting: list[str] = []  # ends marked in the current bundle take effect after it
    with path.open() as lines:
        for line in lines:
            if _BUNDLE.match(line):
                for number in waiting:
                    if int(number) in open_regions:
                        open_regions.remove(int(number))
                waiting = []
                index += 1
                started = index
            elif index < 0:
                continue
            else:
                started = None
            for kind, number in _REGION.findall(line):
                if kind == "Start":
                    open_regions.append(int(number))
                    first[int(number)], depth[int(number)] = index, len(open_regions)
                elif kind == "End":
                    waiting.append(number)
            if started is not None and open_regions:
                inner = counts.setdefault(open_regions[-1], {"bundles": 0} | dict.fromkeys(use[0], 0))
                inner["bundles"] += 1
                for unit, count in use[index].items():
                    inner[unit] += count
    if index + 1 != len(use):
        raise RuntimeError(
            f"{path.name} has {index + 1} bundles and its utilization table {len(use)}: unknown dump format"
        )
    regions = [
        Region(number, first[number], depth[number], count.pop("bundles"), count) for number, count in counts.items()
    ]
    return tuple(sorted(regions, key=lambda region: region.first))


def _read_loops(path: Path, chip: str) -> tuple[Loop, ...]:
    """The loops: from a backward branch's target to that branch and the bundles issued while it is taken."""
    depth: dict[int, int] = {}  # by the loop's first bundle
    length: dict[int, int] = {}
    index = -1
    with path.open() as lines:
        for line in lines:
            if match := _LOOP_BUNDLE.match(line):
                label, nesting = match.groups()
                index += 1
                if label == "LB":
                    depth[index] = len(nesting)
            for target in map(int, _BRANCH.findall(line)):
                if target in depth and target <= index:
                    length[target] = index + 1 + _BRANCH_DELAY.get(chip, 4) - target

    def inside(inner: int, outer: int) -> bool:
        return depth[inner] == depth[outer] + 1 and outer < inner < outer + length[outer]

    return tuple(
        Loop(first, depth[first], length[first] - sum(length[other] for other in length if inside(other, first)))
        for first in sorted(length)
    )


def _read_vmem(path: Path) -> int:
    with path.open() as lines:
        ends = [int(match[1], 0) + int(match[2], 0) for line in lines if (match := _VMEM.search(line))]
    return max(ends, default=0)


def compile_target(target: str, chip: str, arguments: Mapping[str, Any] | None = None) -> list[Schedule]:
    """Compile `target` for `chip` in a separate process and read its schedules.

    Args:
      target: "module:function"; called with `arguments`, it returns (f, args) where `f(*args)` is to be compiled
        and args are jax.ShapeDtypeStruct trees.
      chip: one of pallas_kernels.chips.CHIPS.
      arguments: keyword arguments of `target`, JSON values.

    Raises:
      ArgumentError: the target cannot be found, or it does not compile (with the compiler's message).
    """
    check(chip in CHIPS, f"chip is {chip!r}; choose one of {', '.join(CHIPS)}")
    check(target.count(":") == 1, f"target is {target!r}; write it as module:function")
    with tempfile.TemporaryDirectory() as folder:
        # The compiler reads its flags only when it starts; a separate process also frees its memory.
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false"
        flags += f" --xla_jf_dump_llo_pass_label_regex={_LABELS}"
        # libtpu aborts on other backends' flags.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        command = [sys.executable, __file__, "--compile-only", target, "--chip", chip]
        command += [f"{name}={json.dumps(value)}" for name, value in (arguments or {}).items()]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise ArgumentError(f"{target} does not compile for {chip}:\n{_last_error(result.stderr)}")
        return read(Path(folder), chip)


def _last_error(text: str) -> str:
    lines = text.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
    return "\n".join(lines[starts[-1] if starts else -1 :])[:4000]


def _compile_here(target: str, chip: str, arguments: Mapping[str, Any]) -> None:
    mesh = compile_only_mesh(chip)
    f, args = find(target)(**arguments)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args)
    with jax.set_mesh(mesh):
        jax.jit(f).lower(*specs).compile()


def find(target: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"target is {target!r}: {error}") from error


def table(schedules: Sequence[Schedule], flops: float | None = None) -> str:
    """A line for every body of every kernel. `flops`: useful floating-point operations of one pass through a body."""
    columns = "body  bundles  matrix   VALU    EUP    XLU  spills   fills   flop/bundle      us"
    lines = [f"{'kernel':34s}  {columns}"]
    for schedule in schedules:
        facts, peak = CHIPS[schedule.chip], ceiling(schedule.chip)
        for region in schedule.bodies or schedule.regions[-1:]:
            use = "".join(f" {schedule.use(region, unit):6.0%}" for unit in ("MATMUL", "VALU", "EUP", "XLU"))
            spilled = "".join(f" {region.operations[unit]:7,d}" for unit in ("VSTORE:SPILL", "VLOAD:FILL"))
            rate = flops / region.bundles if flops else None
            useful = f"{rate:9,.0f} {rate / peak:4.0%}" if rate else " " * 14
            microseconds = region.bundles / facts.clock_ghz / 1e3
            lines.append(
                f"{schedule.kernel[:34]:34s} {region.number:5d} {region.bundles:8,d} {use}{spilled} {useful}"
                f" {microseconds:7.2f}"
            )
        lines.append(
            f"{'':34s} whole {schedule.bundles:8,d}  vmem {schedule.vmem_bytes / 2**20:.1f} MiB of {facts.vmem_mib}; "
            f"ceiling {peak:,.0f} flop/bundle on {schedule.chip} at {facts.clock_ghz} GHz"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/kernel_schedule.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("target", help="module:function that returns (f, args), args as jax.ShapeDtypeStruct")
    parser.add_argument(
        "arguments", nargs="*", metavar="name=value", help="keyword arguments of the function, values in JSON"
    )
    parser.add_argument("--chip", default="v5e", help="v5e, v5p, v6e or tpu7x")
    parser.add_argument("--flops", type=float, help="useful floating-point operations of one pass through a body")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    arguments = {}
    for pair in options.arguments:
        name, equals, value = pair.partition("=")
        if not equals:
            parser.error(f"{pair!r} is not of the form name=value")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value  # a bare word
    if options.compile_only:
        _compile_here(options.target, options.chip, arguments)
        return 0
    try:
        schedules = compile_target(options.target, options.chip, arguments)
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(schedules, options.flops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
