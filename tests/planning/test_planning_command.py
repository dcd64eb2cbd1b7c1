"""`stepjax plan` as it is typed."""

import json

import pytest
from run_files import RECIPE

from stepjax.errors import ConfigError
from stepjax.planning import plan
from stepjax.planning.command import run

BASE = [str(RECIPE), "--topology", "v5p-8"]


@pytest.fixture
def planned(tiny_plan, monkeypatch):
    """The command with the compiler replaced by the plan that was made already; what it was asked for."""
    asked = {}

    def make_plan(config, topology, *, kind, keep_text=None):
        asked.update(config=config, topology=topology, kind=kind, keep_text=keep_text)
        return tiny_plan

    monkeypatch.setattr(plan, "make_plan", make_plan)
    return asked


def test_a_table(planned, capsys):
    assert run([*BASE, "--batch.rows", "8", "--numerics.remat", "dots"]) == 0
    assert planned["config"].batch.rows == 8 and planned["config"].numerics.remat == "dots"
    assert planned["topology"].name == "v5p-8" and planned["kind"] == "train"
    assert "largest costs" in capsys.readouterr().out


def test_another_step_than_training(planned):
    assert run([*BASE, "--step", "decode"]) == 0
    assert planned["kind"] == "decode"


def test_json_is_all_that_is_printed(planned, capsys):
    assert run([*BASE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_the_programs_text_is_kept(planned, tmp_path):
    assert run([*BASE, "--hlo", str(tmp_path / "step.hlo")]) == 0
    assert planned["keep_text"] == tmp_path / "step.hlo"


def test_a_plan_that_does_not_fit_ends_with_1(planned, tiny_plan, monkeypatch, capsys):
    import dataclasses

    from stepjax.planning.compile import Shortage

    step = dataclasses.replace(tiny_plan.step, shortage=Shortage(200.0, 95.73, "RESOURCE_EXHAUSTED"))
    short = dataclasses.replace(tiny_plan, step=step, estimate=None)
    monkeypatch.setattr(plan, "make_plan", lambda *a, **k: short)
    assert run(BASE) == 1
    assert "DOES NOT FIT: 104.3 GiB too much" in capsys.readouterr().out


def test_slices(planned):
    assert run([*BASE, "--slices", "2", "--mesh.slice", "2"]) == 0
    assert planned["topology"].slices == 2 and planned["config"].mesh.slice == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([str(RECIPE), "--topology", "v5p-9"], "v5p-8"),
        (["nowhere.py", "--topology", "v5p-8"], "nowhere.py"),
        ([*BASE, "--budget-minutes", "0"], "--budget-minutes"),
        ([*BASE, "--write", "best.py"], "--search"),
        ([*BASE, "--hlo", "/no/such/directory/a"], "--hlo"),
        ([*BASE, "--search", "--write", "/no/such/directory/a"], "--write"),
    ],
)
def test_mistakes_are_named(arguments, words, planned):
    with pytest.raises(ConfigError, match=words):
        run(arguments)


def test_a_wrong_field_is_answered_by_the_overrides_parser(planned, capsys):
    with pytest.raises(SystemExit):
        run([*BASE, "--batch.rowz", "8"])
    assert "batch.rows" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), ([str(RECIPE)], 2), (["--help"], 0), ([*BASE, "--slices", "x"], 2)]
)
def test_bad_usage_and_help(arguments, status, capsys):
    assert run(arguments) == status
    printed = "".join(capsys.readouterr())
    assert "RECIPE" in printed


def test_search_passes_its_options_on(planned, monkeypatch, tmp_path):
    from stepjax.planning import search

    asked = {}
    monkeypatch.setattr(search, "search_and_print", lambda *a, **k: asked.update(k, args=a) or 0)
    assert run([*BASE, "--search", "--budget-minutes", "5", "--write", str(tmp_path / "best.py")]) == 0
    assert asked["budget_minutes"] == 5 and asked["write"] == tmp_path / "best.py" and not asked["as_json"]
