"""The train step of a text-only Qwen3-8B, ours and MaxText's, compiled ahead of time for TPUs and read by one rule.

    python3.12 -m venv VENV && VENV/bin/pip install "maxtext[tpu]==0.2.5" tyro
    PYTHONPATH=. VENV/bin/python benchmarks/plan_vs_maxtext.py [--topologies v5p-128 v6e-256] [--cache FOLDER]

Both sides use the same JAX and libtpu if the same Python runs them (--maxtext-python names another). Rows of 4,096
tokens, the same chips, the same tokens per step, float32 parameters and AdamW moments, bfloat16 compute. Ours is the
decoder of STEP3-VL-10B, which is Qwen3-8B, without image slots and with an encoder of one narrow layer (10.8 M more
parameters than MaxText's model; we count their optimizer state but no FLOPs).

The comparison is an estimate, not a measurement: stepjax.planning.estimate walks through each side's scheduled program.
Fusions take the compiler's cycles, collectives their exposed time on the wires, attention kernels their static schedule
with segments and the setting's blocks (packed_attention_rates.py). Copies to host memory, used only by MaxText's
setting on v6e, are assumed to be as fast as HBM, which favours MaxText.

Every setting of plan_vs_maxtext_settings.py is tried, and each side's best counts. MaxText's settings are its recipes
for the chip (configs/tpu/v5p/llama2_7b.sh; llama3_1_8b_8192 of its Trillium recipes), without the flags that libtpu
0.0.52 refuses on these chips (asynchronous collective fusion), with our flags (stepjax.xla_flags), with tokamax's or
JAX's splash attention and its best blocks; and settings that we found to be better for it. A compilation takes 2 to 12
minutes; FOLDER keeps each program, so an interrupted run resumes.
Writes results/plan_vs_maxtext.json.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import machine
import packed_attention_rates
from plan_vs_maxtext_settings import ROWS, SETTINGS, SIDES, TOKENS, Setting, Side

from stepjax import config as c
from stepjax.models.flops import decoder_flops
from stepjax.planning import hlo
from stepjax.planning.estimate import EXPOSED_COLLECTIVES, Cost, Estimate, estimate
from stepjax.planning.network import Network
from stepjax.planning.steps import compile_step
from stepjax.planning.topologies import Topology, find
from stepjax.xla_flags import compiler_options

ROOT = Path(__file__).parent.parent
DECODER = c.DecoderConfig()


@dataclasses.dataclass(frozen=True)
class Result:
    """A setting and its estimate."""

    side: Side
    topology: str
    label: str
    is_recipe: bool
    chips: int
    tokens: int  # per step
    model_flops: float
    peak_flops: float  # per chip
    seconds: float  # per step
    hbm_gib: float  # per device
    exposed_seconds: float  # of collectives
    attention_flop_per_bundle: dict[str, int]
    seconds_by_part: dict[str, float]
    not_understood: dict[str, int]

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.tokens / self.seconds / self.chips

    @property
    def mfu(self) -> float:
        return self.model_flops / self.seconds / self.chips / self.peak_flops


# Compiling ------------------------------------------------------------------------------------------------------------


def our_config(rows: int, values: dict[str, Any]) -> c.PretrainConfig:
    values = dict(values)
    side = 28  # pixels of a view; there are no images
    return c.PretrainConfig(
        name="qwen3_8b",
        model=c.ModelConfig(
            vision=c.VisionConfig(width=256, num_layers=1, num_heads=4, mlp_dim=512, position_grid=side // 14)
        ),
        images=c.ImageConfig(global_size=side, crop_size=side),
        data=c.DataConfig(sources=(c.DigitsSource(name="text", weight=1.0, task="transcribe"),)),
        batch=c.BatchConfig(
            rows=rows, tokens=TOKENS, global_views=0, crops=0, accumulation=values.pop("accumulation", 1)
        ),
        schedule=c.ScheduleConfig(phases=(c.Phase(tokens=1e12, start=1e-4, end=1e-5),)),
        numerics=c.NumericsConfig(**values),
    )


def compile_ours(topology: Topology, setting: Setting, flags: dict[str, str], text: Path) -> dict[str, Any]:
    step = compile_step(
        our_config(ROWS[topology.name] * topology.chips, setting.values), topology, compiler_options=flags
    )
    if step.shortage is not None:
        return {"refused": step.shortage.message}
    text.write_text(step.text)
    places = [[getattr(d, "slice_index", 0) or 0, *d.coords] for d in step.mesh.devices.flat]
    return {"places": places, "hbm_bytes": step.total_bytes, "compile_seconds": step.seconds}


def compile_maxtext(
    python: str, topology: Topology, setting: Setting, flags: dict[str, str], text: Path
) -> dict[str, Any]:
    options, found, log = (text.with_suffix(suffix) for suffix in (".flags", ".found", ".log"))
    options.write_text(json.dumps(flags))
    common = {
        "model_name": "qwen3-8b", "compile_topology": topology.name, "compile_topology_num_slices": 1,
        "max_target_length": TOKENS, "per_device_batch_size": ROWS[topology.name], "attention": "flash",
        "sa_use_fused_bwd_kernel": True, "enable_checkpointing": False, "dataset_type": "synthetic",
        "run_name": "plan", "base_output_directory": text.parent,
    }  # fmt: skip
    settings = [f"{key}={value}" for key, value in (common | setting.values).items()]
    script = Path(__file__).with_name("maxtext_step.py")
    with log.open("w") as output:
        command = [python, str(script), str(text), str(found), str(options), *settings]
        if subprocess.run(command, stdout=output, stderr=output).returncode:
            raise SystemExit(f"MaxText's step failed; see {log}")
    answer = json.loads(found.read_text())
    if "refused" not in answer:
        rows = ROWS[topology.name] * topology.chips
        assert answer["global_batch"] == rows, f"{answer['global_batch']} rows in place of {rows}"
        whole = answer["argument_size"] + answer["output_size"] - answer["alias_size"] + answer["temp_size"]
        # The compiler's peak includes host memory.
        answer["hbm_bytes"] = max(whole, answer["peak_memory"] - answer["host_temp_size"])
    return answer


def source_digest() -> str:
    """Digest of the code that a step is compiled from."""
    digest = hashlib.sha256()
    for folder in ("stepjax/models", "stepjax/training", "pallas_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    for name in ("stepjax/config.py", "stepjax/sharding.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def cache_name(side: Side, topology: str, setting: Setting, flags: dict[str, str]) -> str:
    """Name of a compiled program, derived from everything it depends on."""
    packages = ("jax", "libtpu", "maxtext") if side == "maxtext" else ("jax", "libtpu")
    versions = [machine.version(package) for package in packages]
    parts = [side, topology, ROWS[topology], TOKENS, setting.values, flags, versions]
    parts += [source_digest()] if side == "stepjax" else []
    return f"{side}-{topology}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]}"


# Reading --------------------------------------------------------------------------------------------------------------


def read(side: Side, topology: Topology, setting: Setting, compiled: dict[str, Any], text: str, cache: Path) -> Result:
    blocks = {key.removeprefix("sa_"): size for key, size in setting.values.items() if key.startswith("sa_block")}
    rates = packed_attention_rates.rates(
        setting.attention, topology.facts.chip, TOKENS, DECODER.head_dim, blocks, cache, source_digest()
    )
    program = hlo.read(text)
    devices = [SimpleNamespace(slice_index=place[0], coords=tuple(place[1:])) for place in compiled["places"]]
    estimated = estimate(
        program, Network(topology, devices), attention_rate=lambda chip, which, *_: float(rates[which])
    )
    rows = ROWS[topology.name] * topology.chips
    return Result(
        side=side,
        topology=topology.name,
        label=setting.label,
        is_recipe=setting.is_recipe,
        chips=topology.chips,
        tokens=rows * TOKENS,
        model_flops=3 * decoder_flops(DECODER, rows * TOKENS, rows * TOKENS * (TOKENS + 1) / 2),
        peak_flops=topology.facts.peak_flops * topology.facts.devices_per_chip,
        seconds=estimated.seconds,
        hbm_gib=compiled["hbm_bytes"] / 2**30,
        exposed_seconds=sum(cost.seconds for cost in estimated.costs if cost.part == EXPOSED_COLLECTIVES),
        attention_flop_per_bundle=rates,
        seconds_by_part=by_part(program, estimated),
        not_understood=dict(estimated.unknown),
    )


def by_part(program: hlo.Program, estimated: Estimate) -> dict[str, float]:
    """Seconds by part of the step. The sides use different names, so array sizes identify the parts."""
    shapes = {op.name: op.shape for ops in program.computations.values() for op in ops}
    total: dict[str, float] = {}
    for cost in estimated.costs:
        part = part_by_shape(cost, [shapes.get(name, "") for name in cost.operation.operands])
        total[part] = total.get(part, 0.0) + cost.seconds
    return dict(sorted(total.items(), key=lambda entry: -entry[1]))


def part_by_shape(cost: Cost, operands: list[str]) -> str:
    if cost.kind in ("attention kernel", "collective", "copy", "sparsecore"):
        return {"collective": "collectives, exposed", "copy": "copies, exposed"}.get(cost.kind, cost.kind)
    dims = {size for text in [cost.operation.shape, *operands] for array in hlo.arrays(text) for size in array.dims}
    if DECODER.vocab_size in dims:
        return "embedding, output projection, loss"
    if cost.times < DECODER.num_layers - 1:
        return "optimizer and the rest"
    if DECODER.mlp_dim in dims:
        return "MLP"
    names = f"{cost.scope} {cost.operation.source.file if cost.operation.source else ''}"
    if "splash" in names or "flash_attention" in names:
        return "around the attention kernel"
    # dot_general fusions keep the product's name; they may include adjacent norms and rotations.
    return "attention projections" if "dot_general" in cost.scope else "norms, rotary, residuals, stacking"


# The table ------------------------------------------------------------------------------------------------------------


def best(results: list[Result], side: Side) -> Result | None:
    return max((r for r in results if r.side == side), key=lambda r: r.tokens_per_second_per_chip, default=None)


def ratio(results: list[Result], *, recipes: bool = False) -> float | None:
    """Tokens per second, ours over MaxText's, each with its best setting; None while one side is missing.

    Args:
        recipes: use only MaxText's published settings.
    """
    theirs = best([r for r in results if r.is_recipe or not recipes], "maxtext")
    ours = best(results, "stepjax")
    return (
        None if ours is None or theirs is None else ours.tokens_per_second_per_chip / theirs.tokens_per_second_per_chip
    )


HEAD = (
    f"{'topology':<9} {'side':<8} {'setting':<50} {'tokens/s/chip':>13} {'step s':>7} {'HBM GiB':>8} {'MFU':>6} "
    f"{'exposed s':>9}"
)


def line(result: Result) -> str:
    return (
        f"{result.topology:<9} {result.side:<8} {result.label:<50} {result.tokens_per_second_per_chip:>13,.0f} "
        f"{result.seconds:>7.3f} {result.hbm_gib:>8.1f} {result.mfu:>6.1%} {result.exposed_seconds:>9.3f}"
    )


def to_json(result: Result) -> dict[str, Any]:
    return dataclasses.asdict(result) | {
        "tokens_per_second_per_chip": result.tokens_per_second_per_chip,
        "mfu": result.mfu,
    }


def run(topology: Topology, side: Side, setting: Setting, python: str, cache: Path) -> Result | None:
    flags = {**compiler_options(topology.facts.chip), **setting.flags}
    flags = {name: value for name, value in flags.items() if value is not None}
    text = cache / f"{cache_name(side, topology.name, setting, flags)}.hlo"
    answer = text.with_suffix(".json")
    if not answer.exists():
        print(f"compiling {side} for {topology.name}: {setting.label} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        compile_one = partial(compile_maxtext, python) if side == "maxtext" else compile_ours
        answer.write_text(json.dumps(compile_one(topology, setting, flags, text)))
        print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    compiled = json.loads(answer.read_text())
    if "refused" in compiled:
        print(f"{topology.name} {side} {setting.label}: refused, {compiled['refused'].splitlines()[0][:160]}")
        return None
    return read(side, topology, setting, compiled, text.read_text(), cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument(
        "--maxtext-python", default=sys.executable, help="Python of an environment with maxtext[tpu]==0.2.5"
    )
    parser.add_argument("--cache", type=Path, default=Path("plan_vs_maxtext_cache"), help="keeps compiled programs")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    options.cache.mkdir(parents=True, exist_ok=True)
    cache = options.cache.absolute()
    print(HEAD)
    figures = {}
    for name in options.topologies:
        topology, results = find(name), []
        for side in SIDES:
            for setting in SETTINGS[name, side]:
                result = run(topology, side, setting, options.maxtext_python, cache)
                if result is not None:
                    results.append(result)
                    print(line(result), flush=True)
        ratios = {"ratio": ratio(results), "ratio_to_recipe": ratio(results, recipes=True)}
        figures[name] = ratios | {"results": [to_json(result) for result in results]}
        shown = ["unknown" if value is None else f"{value:.3f}" for value in ratios.values()]
        print(f"{name}: ours over MaxText, each at its best: {shown[0]}; over MaxText with its recipe: {shown[1]}")
    versions = {package: machine.version(package) for package in ("jax", "libtpu", "maxtext", "tokamax")}
    settings = {f"{t} {side}": [dataclasses.asdict(s) for s in SETTINGS[t, side]] for t in figures for side in SIDES}
    written = {"compiler": versions, "stepjax_source": source_digest(), "settings": settings, "topologies": figures}
    path = machine.write("plan_vs_maxtext", written)
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
