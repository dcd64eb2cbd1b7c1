"""Trackers, with the optional packages replaced by recorders."""

import json
import math
import os
import sys
import types
from typing import Any

import numpy as np
import pytest

from stepjax.config import LoggingConfig
from stepjax.errors import ConfigError
from stepjax.training.trackers import JsonlTracker, make_trackers, truncate_after


def read(path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines_are_on_disk_at_once_and_valid_json(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": np.float32(2.5), "rows": 8, "nan": float("nan"), "up": np.inf, "down": -np.inf})
    (record,) = read(tmp_path / "metrics.jsonl")  # before close
    assert list(record) == ["step", "loss", "rows", "nan", "up", "down"]
    assert (record["step"], record["loss"], record["rows"]) == (1, 2.5, 8)
    assert math.isnan(float(record["nan"])) and float(record["up"]) == math.inf and float(record["down"]) == -math.inf
    tracker.close()


def test_resume_leaves_the_file_of_an_unbroken_run(tmp_path):
    broken, unbroken = tmp_path / "broken.jsonl", tmp_path / "unbroken.jsonl"
    first = JsonlTracker(broken)
    for step in range(1, 8):
        first.log(step, {"loss": 1 / step})
    first.close()
    with open(broken, "a") as file:
        file.write('{"step": 8, "lo')  # the kill
    second = JsonlTracker(broken, resume_step=4)
    whole = JsonlTracker(unbroken)
    for step in range(1, 11):
        whole.log(step, {"loss": 1 / step})
        if step > 4:
            second.log(step, {"loss": 1 / step})
    assert broken.read_bytes() == unbroken.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "unbroken.jsonl"]


def test_truncation_removes_later_steps_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n{"step": 3}\n')
    before = os.stat(path).st_ino
    truncate_after(path, 3)
    assert os.stat(path).st_ino == before  # untouched
    truncate_after(path, 2)
    assert [record["step"] for record in read(path)] == [1, 2, 2]
    # Complete JSON whose newline is missing, and a line torn inside a character.
    for torn in (b'{"step": 2}', b'{"x": "\xe2'):
        path.write_bytes(b'{"step": 1}\n' + torn)
        truncate_after(path, 5)
        assert path.read_text() == '{"step": 1}\n'


def test_damage_that_no_kill_explains_is_refused_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ConfigError, match="line 2"):
        truncate_after(path, 5)
    assert path.read_text().count("\n") == 3


def test_fresh_run_starts_its_file_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 9}\n')
    (tracker,) = make_trackers(LoggingConfig(), tmp_path, {}, None)
    tracker.log(1, {"loss": 1.0})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


class Recorder:
    """Records the calls of any method, with their arguments, and returns itself."""

    def __init__(self):
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def packages(monkeypatch):
    tensorboard, wandb = Recorder(), Recorder()
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=tensorboard.SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=wandb.init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return tensorboard, wandb


ALL = LoggingConfig(tensorboard=True, wandb=True)


def test_all_trackers_record_the_same_numbers(tmp_path, packages):
    tensorboard, wandb = packages
    trackers = make_trackers(ALL, tmp_path / "runs" / "mine", {"seed": 1}, None)
    for tracker in trackers:
        tracker.log(5, {"loss": np.float32(2), "lr": 0.5})
        tracker.close()
    assert read(tmp_path / "runs" / "mine" / "metrics.jsonl") == [{"step": 5, "loss": 2.0, "lr": 0.5}]
    assert [args for args, _ in tensorboard.named("add_scalar")] == [("loss", 2.0, 5), ("lr", 0.5, 5)]
    assert wandb.named("log") == [(({"step": 5, "loss": 2.0, "lr": 0.5},), {})]
    assert tensorboard.named("close") and wandb.named("finish")
    ((_, options),) = wandb.named("init")
    assert (options["project"], options["name"], options["config"]) == ("stepjax", "mine", {"seed": 1})


def test_resumed_run_continues_its_curves(tmp_path, packages):
    tensorboard, wandb = packages
    for resume_step in (None, 30, None):
        make_trackers(ALL, tmp_path, {}, resume_step)
    first, resumed, fresh = (options["id"] for _, options in wandb.named("init"))
    assert first == resumed != fresh
    assert [options["purge_step"] for _, options in tensorboard.named("SummaryWriter")] == [0, 31, 0]


@pytest.mark.parametrize(("field", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_is_refused_with_the_remedy_before_anything_is_touched(tmp_path, monkeypatch, field, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    config = LoggingConfig(tensorboard=field == "tensorboard", wandb=field == "wandb")
    with pytest.raises(ConfigError, match=rf"logging\.{field}=True.*{package}.*pip install stepjax\[tracking\]"):
        make_trackers(config, tmp_path, {}, None)
    assert read(tmp_path / "metrics.jsonl") == [{"step": 9}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert make_trackers(LoggingConfig(), tmp_path / "run", {}, None) == []
    assert not (tmp_path / "run").exists()


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    _, tracker = make_trackers(LoggingConfig(tensorboard=True), tmp_path, {"seed": 1}, 3)
    tracker.log(4, {"loss": 2.0})
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
