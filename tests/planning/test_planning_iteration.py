"""An iteration of reinforcement learning as a plan: how many calls, what lives beside them, and what they cost."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_rl import config as tiny_rl

from stepjax.cli import main
from stepjax.config import MeshConfig, RunConfig
from stepjax.config_file import load_recipe
from stepjax.data.packing import RowBudget
from stepjax.errors import ConfigError
from stepjax.models.step_vl import abstract_model, num_parameters
from stepjax.planning import iteration
from stepjax.planning.iteration import CACHE, IterationPlan, Phase, plan_iteration, programs_of, work_of
from stepjax.planning.iteration_report import to_json, to_text
from stepjax.planning.steps import CompiledStep, Shortage, num_bytes
from stepjax.planning.topologies import find
from stepjax.post_training.config import AdvantageConfig, RLConfig, UpdateConfig
from stepjax.post_training.episodes import Answer, rows_of_process
from stepjax.post_training.loop import Trainer
from stepjax.post_training.sampling import Collected
from stepjax.post_training.step import RLState
from stepjax.rewards.scorer import Scored
from stepjax.rollouts.rollout import Rollout
from stepjax.sharding import data_parts, engines_mesh, make_mesh
from stepjax.training.footprint import GIB

TINY = str(Path(__file__).parents[1] / "tiny_rl.py")
REPORTED = [Path(__file__).parents[2] / "configs" / "step3_vl_10b" / f"{name}.py" for name in ("rlvr", "rlhf")]
BASE = ["plan", TINY, "--topology", "v5p-8"]


def changed(**sections) -> RLConfig:
    """The tiny recipe with fields of its sections replaced, and prompts of 40 tokens."""
    sections = {"rollout": {}, **sections}
    sections["rollout"] = {"max_prompt_tokens": 40, **sections["rollout"]}
    made = {
        name: dataclasses.replace(getattr(tiny_rl, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(tiny_rl, **made)


# Calls ----------------------------------------------------------------------------------------------------------------


class Counted:
    """The trainer's programs, as counters that compute nothing."""

    def __init__(self, rows: int, tokens: int):
        self.calls: dict[str, int] = {}
        nothing_BT = jax.device_put(np.zeros((rows, tokens), np.float32))
        self.scores = self._counting("scoring", {"old_L": nothing_BT, "values_L": nothing_BT})
        self.policy = self._counting("policy", (None, None), ({}, nothing_BT))
        self.critic = self._counting("critic", None, {})
        self.apply_policy = self._counting("policy step", None, None, 0.0, 0.0)
        self.apply_critic = self._counting("critic step", np.zeros(1), None, 0.0, 0.0)

    def zeros(self, params):
        return (None, None)

    def _counting(self, name: str, *results):
        def call(*arguments, **options):
            self.calls[name] = self.calls.get(name, 0) + 1
            return results[0] if len(results) == 1 else results

        return call


@pytest.mark.parametrize(
    "config",
    [
        changed(),
        changed(rollout=dict(prompts=6), policy=dict(minibatches=3, passes=2), batch=dict(rows=1)),
        changed(advantages=AdvantageConfig(estimator="grpo"), policy=UpdateConfig(), loss=dict(kl=0.0)),
        changed(critic=dict(trunk="shared")),
    ],
    ids=["own critic", "passes", "no critic", "shared trunk"],
)
@pytest.mark.parametrize("length", [6, 2])
def test_calls_are_those_of_the_trainer(config, length):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    work = work_of(config, mesh, engines_mesh(jax.devices()[:1], 1), length)
    episodes = [iteration._episode(40, config.rollout.samples, length) for _ in range(config.rollout.prompts)]
    for each in episodes:
        rollout = Rollout(prompt_ids=(0,) * 40, token_ids=(1,) * length, sampling_logprobs=(-1.0,) * length)
        each.answers = [Answer.of(rollout, Scored(1.0, {})) for _ in each.answers]
    counted: Any = Counted(config.batch.rows, config.batch.tokens)
    nothing: Any = None
    state = RLState(jax.device_put(0), nothing, nothing, np.zeros(1) if config.has_critic else None, nothing)
    with jax.set_mesh(mesh):
        collected = Collected(episodes, 0, [], 0, 1, np.zeros((2, 4)), 0, 0.0)
        Trainer(config, mesh, counted, None).train(state, collected, 5)
    assert counted.calls == {name: calls for name, calls in work.calls.items() if name != "decoding"}


def test_engines_decode_their_share():
    config = changed()
    devices = jax.devices()[:2]
    mesh = make_mesh(MeshConfig(), devices)
    work = work_of(config, mesh, engines_mesh(devices, 1))
    # Two engines with two of four prompts each: 8 answers of 6 tokens, 4 sequences at once, 2 tokens a call.
    assert (work.at_once, work.calls["decoding"]) == (4, 8 * 6 // (4 * 2))
    assert work.cached == 40 // 4 + 6 // 2
    short = work_of(changed(rollout=dict(cache_tokens=39)), mesh, engines_mesh(devices, 1))
    assert (short.at_once, short.calls["decoding"]) == (3, 8)
    with pytest.raises(ConfigError, match=r"--answer-tokens 7: must be from 1 to rollout.max_tokens=6"):
        work_of(config, mesh, engines_mesh(devices, 1), 7)


# Processes ------------------------------------------------------------------------------------------------------------


def test_an_engine_is_on_one_host():
    pytest.importorskip("libtpu")
    devices = find("v5p-128").devices()
    for tensor in (1, 2, 4):
        parts = data_parts(engines_mesh(devices, tensor))
        assert len(parts) == 64 // tensor
        assert {len({device.process_index for device in part.devices.flat}) for part in parts} == {1}
    with pytest.raises(ConfigError, match=r"rollout.tensor=8: an engine would span processes \[0, 1\]"):
        engines_mesh(devices, 8)
    with pytest.raises(ConfigError, match=r"rollout.tensor=3: must divide the 64 devices"):
        engines_mesh(devices, 3)


def test_rows_that_processes_would_share_are_refused():
    pytest.importorskip("libtpu")
    devices = find("v5p-128").devices()
    batch = dataclasses.replace(tiny_rl.batch, rows=64)
    assert rows_of_process(batch, make_mesh(MeshConfig(), devices), 3) == 4
    with pytest.raises(ConfigError, match=r"would share a row.*lower mesh.context"):
        rows_of_process(batch, make_mesh(MeshConfig(context=8), devices), 3)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    pytest.importorskip("libtpu")
    config = changed(batch=dict(rows=4))
    devices = find("v5p-8").devices()
    mesh, engines = make_mesh(config.mesh, devices), engines_mesh(devices, 1)
    return config, *programs_of(config, mesh, engines, work_of(config, mesh, engines))


def test_what_is_held_is_the_state_and_the_engines(made):
    config, programs, held = made
    parameters = num_parameters(abstract_model(config.model, config.numerics))
    assert 4 * parameters / 4 <= held["policy"] < 4 * parameters
    assert held["reference"] == held["policy"]
    assert held["policy's optimizer"] == pytest.approx(2 * held["policy"], abs=64)
    assert held[CACHE] == num_bytes(programs["decoding"].step.arguments[1])
    assert set(programs) == {"decoding", "scoring", "policy", "policy step", "critic", "critic step"}


def test_a_program_holds_its_arguments(made):
    _, programs, held = made
    for name, program in programs.items():
        own = sum(held[each] for each in program.holds)
        assert own <= num_bytes(program.step.arguments), name
    assert num_bytes(programs["policy"].step.arguments[0]) == held["policy"], "gradients are sharded as parameters"


def plan_with(config: RLConfig, held: dict[str, float], own: dict[str, float | Shortage]) -> IterationPlan:
    """A plan without a compiler: GiB of every program, of which the cache is beside all but decoding."""
    topology = find("v5p-8")
    work = iteration.Work(6, dict.fromkeys(own, 10), 4, 20, 100.0)
    phases = []
    for name, size in own.items():
        is_short = isinstance(size, Shortage)
        step = CompiledStep(
            None,  # type: ignore[arg-type]
            total_bytes=0 if is_short else round(size * GIB),
            shortage=size if is_short else None,
        )
        beside = {each: gib for each, gib in held.items() if (each == CACHE) != (name == "decoding")}
        estimate: Any = None if is_short else SimpleNamespace(seconds=0.5, unknown={"a loop": 1})
        phases.append(Phase(name, step, 10, beside, estimate))
    return IterationPlan(config, topology, work, held, 100_000, tuple(phases))


def test_programs_must_fit_beside_what_is_held():
    plan = plan_with(tiny_rl, {"policy": 5.0, CACHE: 50.0}, {"decoding": 52.0, "policy": 40.0, "critic": 45.0})
    assert plan.fits and plan.seconds == 15.0 and plan.seconds_of("sampling") == 5.0
    assert [phase.hbm_gib for phase in plan.phases] == [57.0, 90.0, 95.0]
    text, fields = to_text(plan), json.loads(json.dumps(to_json(plan)))
    assert "DOES NOT FIT" not in text and "240.00 iterations an hour" in text and "NOT UNDERSTOOD in policy" in text
    assert fields["fits"] and fields["programs"]["critic"]["hbm_gib"] == 95.0 and fields["iterations_per_hour"] == 240.0

    plan = plan_with(tiny_rl, {"policy": 5.0, CACHE: 50.0}, {"decoding": 52.0, "policy": 55.0})
    assert not plan.fits and plan.fits_without_cache
    text = to_text(plan)
    assert "DOES NOT FIT" in text and "if the engines drop their caches (50.0 GiB)" in text
    assert "--rollout.cache-tokens 81456 (now 100000)" in text

    refused = Shortage(None, 95.73, "RESOURCE_EXHAUSTED")
    plan = plan_with(tiny_rl, {"policy": 5.0, CACHE: 50.0}, {"decoding": 52.0, "policy": refused})
    assert not plan.fits and not plan.fits_without_cache and plan.seconds is None
    text = to_text(plan)
    assert "shorter or fewer rows" in text and "cache-tokens" not in text and "iterations an hour" not in text
    assert json.loads(json.dumps(to_json(plan)))["days"] is None


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: path.stem)
def test_the_reports_recipes(path):
    config = load_recipe(path, RLConfig)
    rollout = config.rollout
    stated = {"rlvr": (600, 512, 16, 24 * 1024), "rlhf": (300, 512, 8, 32 * 1024)}[path.stem]
    assert (config.iterations, rollout.prompts, rollout.samples, rollout.max_tokens) == stated
    assert (config.policy.learning_rate, config.critic.update.learning_rate) == (2e-6, 5e-6)
    assert (config.policy.minibatches, config.loss.correction_bounds[1], config.advantages.lam) == (4, 8.0, 1.0)
    assert config.has_critic and config.critic.trunk == "own" and config.loss.kl == 0
    assert rollout.samples * rollout.max_tokens > 0 and (rollout.cache_tokens or 0) > config.batch.tokens
    assert RowBudget.of(config.batch, config.images).tokens <= config.model.decoder.max_positions


def test_the_reports_recipes_train_with_the_same_programs():
    """benchmarks/plan_rl.py compiles them once."""
    rlvr, rlhf = (load_recipe(path, RLConfig) for path in REPORTED)
    same = {"name", "init_from", "data", "iterations", "rollout", "reward"}
    for field in dataclasses.fields(rlvr):
        assert field.name in same or getattr(rlvr, field.name) == getattr(rlhf, field.name), field.name
    assert rlvr.policy.decay == rlvr.critic.update.decay == "constant"
    assert rlvr.rollout.temperature == rlhf.rollout.temperature


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--search"], "--search: not for recipes of `stepjax rl`"),
        (["--step", "decode", "--weights", "int8"], "--step decode, --weights int8: not for recipes"),
        (["--hlo", "program.txt"], "--hlo: not for recipes"),
    ],
)
def test_options_for_steps_are_refused(options, words, capsys):
    assert main([*BASE, *options]) == 1
    assert words in capsys.readouterr().err


def test_the_length_of_answers_is_for_reinforcement_learning(capsys):
    recipe = str(Path(TINY).with_name("tiny_recipe.py"))
    assert main(["plan", recipe, "--topology", "v5p-8", "--answer-tokens", "5"]) == 1
    assert "--answer-tokens 5: only for recipes of `stepjax rl`" in capsys.readouterr().err


def test_the_command_plans_an_iteration(monkeypatch, capsys):
    asked: dict[str, Any] = {}

    def planned(config, topology, *, answer_tokens):
        asked.update(config=config, topology=topology, answer_tokens=answer_tokens)
        return plan_with(config, {"policy": 5.0, CACHE: asked["cache"]}, {"decoding": 20.0, "policy": 40.0})

    monkeypatch.setattr(iteration, "plan_iteration", planned)
    asked["cache"] = 10.0
    assert main([*BASE, "--answer-tokens", "3", "--batch.rows", "8"]) == 0
    assert asked["config"].batch.rows == 8 and asked["answer_tokens"] == 3
    assert "tiny_rl on v5p-8" in capsys.readouterr().out
    assert main([*BASE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True
    asked["cache"] = 60.0
    assert main(BASE) == 1


def test_every_kind_of_recipe_has_a_plan():
    assert isinstance(load_recipe(TINY, RunConfig), RLConfig)


@pytest.mark.slow
def test_a_plan_of_real_programs():
    pytest.importorskip("libtpu")
    config = changed(batch=dict(rows=4), numerics=dict(compute_dtype="bfloat16", remat="full"), loss=dict(kl=0.0))
    plan = plan_iteration(config, find("v5p-8"))
    assert plan.fits and [phase.name for phase in plan.phases] == list(plan.work.calls)
    for phase in plan.phases:
        assert phase.estimate is not None and phase.estimate.seconds > 0 and not phase.estimate.unknown
    assert 0 < sum(phase.seconds or 0 for phase in plan.phases) == pytest.approx(plan.seconds)
