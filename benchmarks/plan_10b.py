"""Memory, time and MFU of STEP3-VL-10B's steps on TPU pods, by `stepjax plan`.

    python benchmarks/plan_10b.py [--steps vlm-v5p-128 ...] [--cache FOLDER]

Compiling a step takes a quarter of an hour and up to 6 GiB on two cores; run nothing else meanwhile. FOLDER keeps every
program with its memory report, so an interrupted run resumes, and a changed estimator rereads the same programs. Empty
it when the model, the recipes or libtpu change.
Writes results/plan_step3_vl_10b.json.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import machine

from stepjax.config import PretrainConfig
from stepjax.config_file import load_recipe, override
from stepjax.planning import hlo
from stepjax.planning.core_time import attention_rate
from stepjax.planning.estimate import estimate
from stepjax.planning.network import Network
from stepjax.planning.plan import StepPlan, make_plan
from stepjax.planning.report import to_json
from stepjax.planning.steps import CompiledStep
from stepjax.planning.topologies import Topology, find
from stepjax.sharding import make_mesh
from stepjax.training.footprint import GIB, Memory

PRETRAIN, SFT = "configs/step3_vl_10b/pretrain.py", "configs/step3_vl_10b/sft_stage1.py"


@dataclasses.dataclass(frozen=True)
class Step:
    recipe: str
    topology: str
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        parts = ["stepjax plan", self.recipe, "--tokenizer.path demo", f"--topology {self.topology}", *self.overrides]
        return " ".join(parts)


STEPS = {
    "vlm-v5p-128": Step(PRETRAIN, "v5p-128"),
    # 31 GiB per chip: smaller micro-batches, full rematerialisation.
    "vlm-v6e-256": Step(
        PRETRAIN,
        "v6e-256",
        ("--batch.accumulation", "16", "--numerics.encoder_remat", "full", "--numerics.remat", "full"),
    ),
    "sft-128k-v5p-128": Step(SFT, "v5p-128"),
}


def plan(name: str, step: Step, cache: Path) -> StepPlan:
    """The plan from the cached program, or compiled."""
    config = override(load_recipe(step.recipe), ["--tokenizer.path", "demo", *step.overrides], prog="plan_10b")
    topology = find(step.topology)
    text, facts = cache / f"{name}.hlo", cache / f"{name}.json"
    if facts.exists():
        return read(config, topology, text.read_text(), json.loads(facts.read_text()))
    print(f"compiling {name} ...", file=sys.stderr, flush=True)
    made = make_plan(config, topology, keep_text=text)
    if made.fits:
        facts.write_text(json.dumps(to_json(made)))
    return made


def read(config: PretrainConfig, topology: Topology, text: str, facts: dict) -> StepPlan:
    """A plan from a cached program and its compilation report."""
    mesh = make_mesh(config.mesh, topology.devices())
    step = CompiledStep(
        mesh,
        total_bytes=round(facts["hbm_gib"] * GIB),
        seconds=facts["compile_seconds"],
        host_gib=facts["host_memory_gib"],
    )
    network = Network(topology, list(mesh.devices.flat))
    estimated = estimate(hlo.read(text), network, attention_rate=attention_rate(config))
    return StepPlan(config, topology, step, Memory(**facts["hbm_gib_by_kind"]), estimated)


HEAD = f"{'step':<18} {'HBM, GiB':>15} {'s':>8} {'MFU':>7} {'tokens/s/chip':>14} {'compile s':>9} {'host GiB':>9}"


def line(name: str, made: StepPlan) -> str:
    if made.estimate is None or made.mfu is None or made.tokens_per_second is None:
        return f"{name:<18} does not fit: {made.hbm_gib:.1f} of {made.limit_gib:.1f} GiB"
    return (
        f"{name:<18} {made.hbm_gib:>6.1f} / {made.limit_gib:<6.1f} {made.estimate.seconds:>8.1f} {made.mfu:>7.1%} "
        f"{made.tokens_per_second / made.topology.chips:>14,.0f} {made.step.seconds:>9.0f} {made.step.host_gib:>9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument("--cache", type=Path, default=Path("plan_10b_cache"), help="keeps compiled programs")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    plans = {}
    for name in options.steps:
        made = plan(name, STEPS[name], options.cache)
        print(line(name, made), flush=True)
        plans[name] = {"command": STEPS[name].command, **to_json(made)}
    versions = {package: machine.version(package) for package in ("jax", "libtpu")}
    path = machine.write("plan_step3_vl_10b", {"versions": versions, "plans": plans})
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
