"""`stepjax plan` as it is typed."""

import json
from collections import Counter

import pytest
from run_files import RECIPE

from stepjax.cli import main
from stepjax.config_file import load_recipe
from stepjax.planning import plan, search
from stepjax.planning.estimate import Estimate
from stepjax.planning.plan import StepPlan
from stepjax.planning.steps import CompiledStep, Shortage
from stepjax.training.footprint import Memory

BASE = ["plan", str(RECIPE), "--topology", "v5p-8"]


@pytest.fixture
def planned(monkeypatch):
    """The command without the compiler: what a plan was asked for, and `shortage`, which the plan then has."""
    asked = {"shortage": None}

    def make_plan(config, topology, *, kind="train", weights=None, keep_text=None):
        asked.update(config=config, topology=topology, kind=kind, weights=weights, keep_text=keep_text)
        shortage = asked["shortage"]
        step = CompiledStep(mesh=None, total_bytes=2**30, shortage=shortage)  # type: ignore[arg-type]
        estimate = None if shortage else Estimate(1.0 / config.batch.rows, (), (), Counter())
        return StepPlan(config, topology, step, Memory(1.0), estimate, kind)

    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(search.search, "__kwdefaults__", {"plan": make_plan})
    return asked


def test_int8_weights_are_for_steps_of_the_engine(planned, capsys):
    assert main([*BASE, "--step", "decode", "--weights", "int8"]) == 0
    assert planned["weights"] == "int8"
    assert main([*BASE, "--weights", "int8"]) == 1
    assert "--weights int8" in capsys.readouterr().err


def test_a_table(planned, capsys):
    assert main([*BASE, "--batch.rows", "8", "--numerics.remat", "dots"]) == 0
    assert planned["config"].batch.rows == 8 and planned["config"].numerics.remat == "dots"
    assert planned["topology"].name == "v5p-8" and planned["kind"] == "train"
    assert "largest costs" in capsys.readouterr().out


def test_another_step_than_training(planned):
    assert main([*BASE, "--step", "decode"]) == 0
    assert planned["kind"] == "decode"


def test_json_is_all_that_is_printed(planned, capsys):
    assert main([*BASE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_the_programs_text_is_kept(planned, tmp_path):
    assert main([*BASE, "--hlo", str(tmp_path / "step.hlo")]) == 0
    assert planned["keep_text"] == tmp_path / "step.hlo"


def test_a_plan_that_does_not_fit_ends_with_1(planned, capsys):
    planned["shortage"] = Shortage(200.0, 95.73, "RESOURCE_EXHAUSTED")
    assert main(BASE) == 1
    assert "DOES NOT FIT: 104.3 GiB too much" in capsys.readouterr().out


def test_slices(planned):
    assert main([*BASE, "--slices", "2", "--mesh.slice", "2"]) == 0
    assert planned["topology"].slices == 2 and planned["config"].mesh.slice == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", str(RECIPE), "--topology", "v5p-9"], "v5p-8"),
        (["plan", "nowhere.py", "--topology", "v5p-8"], "nowhere.py"),
        ([*BASE, "--budget-minutes", "0"], "--budget-minutes"),
        ([*BASE, "--write", "best.py"], "--search"),
        ([*BASE, "--hlo", "/no/such/directory/a"], "--hlo"),
        ([*BASE, "--search", "--write", "/no/such/directory/a"], "--write"),
        ([*BASE, "--search", "--step", "decode"], "--step decode"),
    ],
)
def test_mistakes_are_named(arguments, words, planned, capsys):
    assert main(arguments) == 1
    assert words in capsys.readouterr().err and "config" not in planned


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["plan"], 2, "RECIPE"),
        (["plan", str(RECIPE)], 2, "--topology"),
        (["plan", "--help"], 0, "--budget-minutes"),
        ([*BASE, "--slices", "x"], 2, "--slices"),
        ([*BASE, "--batch.rowz", "8"], 2, "batch.rows"),
    ],
)
def test_bad_usage_and_help(arguments, status, words, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == status and words in "".join(capsys.readouterr())


def test_the_best_of_a_search_is_written_as_a_recipe(planned, tmp_path, capsys):
    best = tmp_path / "best.py"
    assert main([*BASE, "--search", "--budget-minutes", "5", "--batch.rows", "8", "--write", str(best)]) == 0
    printed = capsys.readouterr().out
    assert " 0 not tried" in printed and f"stepjax pretrain {best}" in printed
    written, base = load_recipe(best), load_recipe(RECIPE)
    assert written.batch.rows == 8 and written.name == base.name and written.model == base.model
    assert main([*BASE, "--search", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["fits"] is True


def test_a_search_in_which_nothing_fits_ends_with_1(planned, tmp_path, capsys):
    planned["shortage"] = Shortage(200.0, 95.73, "RESOURCE_EXHAUSTED")
    assert main([*BASE, "--search", "--write", str(tmp_path / "best.py")]) == 1
    assert "no compiled layout fits" in capsys.readouterr().out and not list(tmp_path.iterdir())
