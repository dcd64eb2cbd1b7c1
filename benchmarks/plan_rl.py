"""An iteration of STEP3-VL-10B's reinforcement learning on 64 chips of v5p, by `stepjax plan`.

    python benchmarks/plan_rl.py [--cache FOLDER]

For the three recipes, with all answers the longest and with answers of 4,096 tokens. Compiling takes hours on two
cores and up to 6 GiB. FOLDER keeps every program with its memory report, so an interrupted run resumes, and a changed
estimator rereads the same programs. Empty it when the model, the recipes or libtpu change.
Writes results/plan_rl.json, with the plans that are made so far.
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

from stepjax.config_file import load_recipe
from stepjax.planning.iteration import Program, plan_iteration
from stepjax.planning.iteration_report import to_json, to_text
from stepjax.planning.steps import CompiledStep, compiled, num_bytes, read_shortage
from stepjax.planning.topologies import Topology, find
from stepjax.post_training.config import RLConfig
from stepjax.xla_flags import compiler_options

TOPOLOGY = "v5p-128"
RECIPES = tuple(f"configs/step3_vl_10b/{name}.py" for name in ("rlvr", "rlhf", "pacore_rl"))
ANSWER_TOKENS = (None, 4096)


def kept(stem: Path, program: Program, topology: Topology) -> CompiledStep:
    """The program from the cache, or compiled."""
    facts, text = stem.with_suffix(".json"), stem.with_suffix(".hlo")
    if not facts.exists():
        print(f"compiling {stem.name} ...", file=sys.stderr, flush=True)
        step = compiled(program.step, program.mesh, topology, compiler_options(topology.facts.chip))
        fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        del fields["mesh"], fields["text"]
        text.write_text(step.text)
        facts.write_text(json.dumps(fields | {"shortage": step.shortage and step.shortage.message}))
    fields = json.loads(facts.read_text())
    shortage = None if fields["shortage"] is None else read_shortage(fields["shortage"])
    fields |= {"parameter_bytes": num_bytes(program.step.parameters), "text": text.read_text(), "shortage": shortage}
    return CompiledStep(program.mesh, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("plan_rl_cache"), help="keeps compiled programs")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    topology, plans, path = find(TOPOLOGY), [], None
    versions = {package: machine.version(package) for package in ("jax", "libtpu")}
    for recipe in RECIPES:
        config = load_recipe(recipe, RLConfig)
        for length in ANSWER_TOKENS:

            def compile_program(name: str, program: Program, config=config, length=length) -> CompiledStep:
                # The trainer's programs depend on the length of its rows, and not on that of answers or on the recipe.
                is_engine, rows = name == "decoding", config.batch.tokens
                stem = f"{config.name}_{length or 'longest'}_{name}" if is_engine else f"trainer_{rows}_{name}"
                return kept(options.cache / stem.replace(" ", "_"), program, topology)

            made = plan_iteration(config, topology, answer_tokens=length, compile_program=compile_program)
            more = "" if length is None else f" --answer-tokens {length}"
            command = f"stepjax plan {recipe} --topology {TOPOLOGY}{more}"
            print(f"\n$ {command}\n{to_text(made)}", flush=True)
            plans.append({"command": command, **to_json(made)})
            path = machine.write("plan_rl", {"versions": versions, "plans": plans})
    assert path is not None
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
