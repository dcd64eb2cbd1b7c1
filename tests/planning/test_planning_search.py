"""The search, with plans that are made up where the compiler is not the point."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import RECIPE

from stepjax.config import RematPolicy
from stepjax.config_file import load_recipe, override
from stepjax.errors import ConfigError
from stepjax.planning.estimate import Estimate
from stepjax.planning.plan import StepPlan
from stepjax.planning.search import Search, candidates, overrides, search, write_recipe
from stepjax.planning.steps import CompiledStep, Shortage
from stepjax.planning.topologies import find
from stepjax.sharding import axis_size
from stepjax.training.footprint import predict_memory

CHIP = find("v5e-16")


@pytest.fixture
def wide(tiny):
    """The tiny recipe with rows enough for sixteen devices."""
    model = dataclasses.replace(
        tiny.model,
        vision=dataclasses.replace(tiny.model.vision, width=64, num_heads=4),
        decoder=dataclasses.replace(tiny.model.decoder, width=64, num_heads=4, num_kv_heads=2),
    )
    return dataclasses.replace(tiny, model=model, batch=dataclasses.replace(tiny.batch, rows=64))


def made_up(seconds, gib, fits=True):
    """A planner whose plans take seconds(config) and gib(config)."""

    def plan(config, topology):
        size = int(gib(config) * 2**30)
        shortage = None if fits is True or fits(config) else Shortage(gib(config), 15.75, "RESOURCE_EXHAUSTED")
        step = CompiledStep(mesh=None, total_bytes=size, shortage=shortage)  # type: ignore[arg-type]
        estimate = None if shortage else Estimate(seconds(config), (), (), {})  # type: ignore[arg-type]
        return StepPlan(config, topology, step, predict_memory(config, topology.num_devices), estimate)

    return plan


def keeps(policy: RematPolicy) -> int:
    return ("full", "attention", "qkv", "dots", "none").index(policy)


def test_candidates_can_run(wide):
    found, _ = candidates(wide, CHIP)
    assert found
    for candidate in found:
        config = candidate.config
        slices, data, fsdp, context, tensor = config.mesh.shape(16)
        assert slices * data * fsdp * context * tensor == 16
        assert config.batch.rows == wide.batch.rows, "the global batch is the recipe's"
        assert config.batch.rows // config.batch.accumulation % (slices * data * fsdp) == 0
        assert config.model.decoder.num_kv_heads % tensor == 0
        assert candidate.rows_per_device * config.batch.accumulation * slices * data * fsdp == wide.batch.rows
    assert {c.config.numerics.remat for c in found} == {"none", "attention", "qkv", "dots", "full"}
    assert len({c.config.mesh for c in found}) > 4
    assert len({(c.config.mesh, c.config.batch, c.config.numerics) for c in found}) == len(found)


def test_what_cannot_fit_is_dropped_with_a_reason(wide):
    heavy = dataclasses.replace(wide, batch=dataclasses.replace(wide.batch, tokens=2**20, global_views=6000))
    found, dropped = candidates(heavy, CHIP)
    assert dropped and all("GiB of 15.8" in reason for _, reason in dropped), dropped[:3]
    assert len(found) < len(candidates(wide, CHIP)[0])


def test_rows_that_no_mesh_takes(tiny):
    odd = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, rows=3))
    with pytest.raises(ConfigError, match="batch.rows=3"):
        candidates(odd, find("v5e-256"))


def test_several_slices_are_in_every_mesh(wide):
    found, _ = candidates(wide, find("v5e-4", slices=2))
    assert {c.config.mesh.slice for c in found} == {2}


def test_the_search_keeps_its_budget_and_finds_the_fastest(wide):
    said = []
    plan = made_up(lambda c: 9.0 - keeps(c.numerics.remat) - keeps(c.numerics.policy_of_encoder), lambda c: 1.0)
    found = search(wide, CHIP, budget_seconds=3600, say=said.append, plan=plan)
    assert found.untried == 0 and found.best is not None
    assert found.best.config.numerics.remat == found.best.config.numerics.encoder_remat == "none"
    assert len(said) == 1 + len(found.plans), "every candidate is reported as it is done"
    short = search(wide, CHIP, budget_seconds=0, say=said.append, plan=plan)
    assert len(short.plans) == 1, "one is compiled in any case"
    assert short.untried == len(found.plans) - 1


def test_the_frontier_has_no_plan_that_another_beats(wide):
    def seconds(config):
        return 5.0 - keeps(config.numerics.remat)

    def gib(config):
        return {"full": 1.0, "attention": 4.0, "qkv": 4.0, "dots": 3.0, "none": 8.0}[config.numerics.remat]

    found = search(wide, CHIP, budget_seconds=3600, say=lambda _: None, plan=made_up(seconds, gib))
    assert [p.config.numerics.remat for p in found.frontier] == ["none", "dots", "full"]


def test_what_needs_more_than_a_plan_that_did_not_fit_is_not_tried(wide):
    # Large enough that arithmetic finds some candidates certain to fit, and some only possible.
    config = dataclasses.replace(wide, batch=dataclasses.replace(wide.batch, tokens=2**22))
    waiting = candidates(config, CHIP)[0]
    limit = CHIP.facts.hbm_limit_gib
    assert {c.predicted_gib > limit for c in waiting} == {True, False}
    tried = []

    def plan(config, topology):
        tried.append(config)
        return made_up(lambda c: 1.0, lambda c: 99.0, fits=lambda c: False)(config, topology)

    found = search(config, CHIP, budget_seconds=3600, say=lambda _: None, plan=plan)
    spared = [reason for _, reason in found.dropped if reason.startswith("needs more than")]
    assert spared and len(tried) + len(spared) == len(waiting)
    assert found.best is None and not found.frontier


def test_a_candidate_that_is_refused_does_not_end_the_search(wide):
    def plan(config, topology):
        if config.mesh.tensor > 1:
            raise ConfigError("no such thing")
        return made_up(lambda c: 1.0, lambda c: 1.0)(config, topology)

    found = search(wide, CHIP, budget_seconds=3600, say=lambda _: None, plan=plan)
    assert found.refused and {reason for _, reason in found.refused} == {"no such thing"}
    assert found.plans


def test_nothing_fits(wide):
    assert "no compiled layout fits" in Search((), (("a", "b"),), (), untried=0, seconds=1.0).to_text(wide)


def test_the_summary_shows_layouts_as_overrides_of_the_recipe(wide, tiny):
    plan = made_up(lambda c: c.batch.accumulation + c.mesh.tensor, lambda c: 1.0)
    found = search(wide, find("v5e-4"), budget_seconds=60, say=lambda _: None, plan=plan)
    text, fields = found.to_text(tiny), found.to_json()
    best = next(line for line in text.splitlines() if line.startswith("best: "))
    assert override(tiny, shlex.split(best.removeprefix("best: ")), prog="test") == found.best.config
    assert fields["best"]["fits"] and len(fields["tried"]) == len(found.plans) and fields["untried"] == 0


# Every kind of value that the command line can set: strings, empty and longer tuples, pairs, None, booleans, negatives.
OVERRIDES = [
    *("--name", 'with "quotes" and spaces', "--seed", "7", "--mesh.fsdp", "-1", "--mesh.tensor", "2"),
    *("--optimizer.freeze", "vision/", "projector", "--optimizer.clip_norm", "None", "--logging.wandb"),
    *("--optimizer.learning_rate_scales", "vision/.*", "0.5", "decoder/embed", "2.0", "--logging.profile", "2", "3"),
    *("--data.sources.0.weight", "2.5", "--numerics.encoder_remat", "dots", "--images.max_crops", "None"),
]


def test_a_written_recipe_holds_every_override(tmp_path):
    base = load_recipe(RECIPE)
    config = override(base, OVERRIDES, prog="test")
    assert config.optimizer.learning_rate_scales == (("vision/.*", 0.5), ("decoder/embed", 2.0))
    (tmp_path / "found").mkdir()
    path = tmp_path / "found" / "best.py"
    write_recipe(path, Path(RECIPE), config, 'a headline with "quotes"')
    assert load_recipe(path) == config
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['config'].mesh.tensor)"  # a program of its own
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr
    write_recipe(path, Path(RECIPE), base, "nothing changes")
    assert load_recipe(path) == base and overrides(base, base) == []


@pytest.mark.slow
def test_a_search_with_the_compiler(tiny, tmp_path):
    pytest.importorskip("libtpu")
    said = []
    found = search(tiny, find("v5e-4"), budget_seconds=1, say=said.append)
    assert len(found.plans) == 1 and found.best is not None
    assert "tokens/s per chip" in said[1]
    assert axis_size("batch", found.best.step.mesh) >= 1
