"""Trackers, with the optional packages replaced by recorders, and the progress line."""

import io
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
from stepjax.figures import human_number, human_time
from stepjax.training.metrics import JsonlTracker, make_trackers, truncate_after
from stepjax.training.progress import ProgressLine, fit, format_progress

# Trackers ------------------------------------------------------------------------------------------------------------


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
    assert second.removed == 4
    whole = JsonlTracker(unbroken)
    for step in range(1, 11):
        whole.log(step, {"loss": 1 / step})
        if step > 4:
            second.log(step, {"loss": 1 / step})
    assert broken.read_bytes() == unbroken.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "unbroken.jsonl"]


def test_truncation_counts_what_it_removes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 3) == 0 and not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n{"step": 3}\n')
    before = os.stat(path).st_ino
    assert truncate_after(path, 3) == 0 and os.stat(path).st_ino == before  # untouched
    assert truncate_after(path, 2) == 1
    assert [record["step"] for record in read(path)] == [1, 2, 2]
    path.write_text('{"step": 1}\n{"step": 2}')  # complete JSON, but the newline is missing
    assert truncate_after(path, 5) == 1 and path.read_text() == '{"step": 1}\n'
    path.write_bytes(b'{"step": 1}\n{"x": "\xe2')  # torn inside a character
    assert truncate_after(path, 5) == 1 and path.read_text() == '{"step": 1}\n'


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


# The progress line ---------------------------------------------------------------------------------------------------

METRICS = {
    "loss": 2.3412,
    "loss/image": 2.5119,
    "loss/text": 2.1043,
    "grad_norm": 0.8311,
    "learning_rate": 4.98e-5,
    "tokens_per_second": 12_345.6,
    "images_per_second": 85.12,
    "mfu": 0.4312,
    "step_seconds": 0.5334,
    "data_wait": 0.0042,
    "packing/tokens": 0.981,
    "packing/vision": 0.842,
    "seconds_since_checkpoint": 62.4,
}
LINE = (
    "step 1200/50000  533ms  loss 2.341 (img 2.51 txt 2.10)  grad 0.831  lr 4.98e-5  12.3k tok/s  85.1 img/s  "
    "mfu 43.1%  wait 0.4%  pack 98/84%  ckpt 62s  eta 7h14m"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_shows_everything_within_160_columns():
    stream = io.StringIO()
    progress = ProgressLine(50_000, stream=stream)
    progress.update(1200, METRICS | {"unknown": 3.0})
    assert stream.getvalue() == LINE + "\n"
    assert len(LINE) <= 160
    fields = format_progress(1200, 50_000, METRICS)
    assert fit(fields, 160) == LINE
    for columns in (160, 120, 100):
        assert len(fit(fields, columns)) <= columns
    assert fit(fields, len(LINE) - 1) == LINE.replace("  pack 98/84%", "")
    assert all(text in fit(fields, 120) for text in ("step 1200", "loss 2.341", "12.3k tok/s", "mfu", "eta"))


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, "step 3/9"),
        ({"loss/text": 1.5}, "step 3/9  loss (txt 1.50)"),
        ({"packing/tokens": 0.5}, "step 3/9  pack 50/-%"),
        ({"loss": float("nan"), "grad_norm": float("inf")}, "step 3/9  loss nan  grad inf"),
        ({"tokens_per_second": float("nan"), "mfu": float("nan")}, "step 3/9  nan tok/s  mfu nan%"),
        ({"step_seconds": float("nan")}, "step 3/9  nan  eta nan"),
        ({"step_seconds": np.float32(2.0)}, "step 3/9  2.00s  eta 12s"),
    ],
)
def test_only_what_is_present_is_shown_and_nan_is_shown_as_nan(metrics, expected):
    assert "  ".join(format_progress(3, 9, metrics).values()) == expected


def test_log_files_get_a_line_per_interval_and_the_last():
    stream = io.StringIO()
    progress = ProgressLine(25, every=10, stream=stream)
    for step in range(1, 26):
        progress.update(step, {"loss": step})
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["10/25", "20/25", "25/25"]


def test_terminal_line_is_refreshed_in_place_and_messages_do_not_tear_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    progress = ProgressLine(25, every=10, stream=stream)
    progress.update(1, METRICS)
    progress.update(2, METRICS)
    assert "\n" not in stream.getvalue()
    progress.print("saved step 2")
    progress.update(3, {"loss": 1.0})
    progress.close()
    progress.close()
    # What the terminal shows: each "\r\x1b[2K" starts its line again.
    lines = [line.split("\x1b[2K")[-1] for line in stream.getvalue().split("\n")]
    assert lines == ["saved step 2", "step 3/25  loss 1.000", ""]
    assert all(len(part.rstrip("\r")) < 60 for line in stream.getvalue().split("\n") for part in line.split("\x1b[2K"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0.00"), (0.5, "0.50"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (999.4, "999"), (999.6, "1.00k")]
    + [(12_345, "12.3k"), (999_600, "1.00M"), (1.2e12, "1.20T"), (4e15, "4000T"), (-1500, "-1.50k"), (math.inf, "inf")],
)
def test_numbers_have_three_digits_and_a_suffix(value, expected):
    assert human_number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0042, "4ms"), (0.9996, "1.00s"), (9.99, "9.99s"), (9.996, "10s"), (62.4, "62s"), (119.6, "2m00s")]
    + [(3599.6, "1h00m"), (26_031, "7h14m"), (48 * 3600, "2d00h"), (273_700, "3d04h"), (math.nan, "nan")],
)
def test_times_have_two_units(seconds, expected):
    assert human_time(seconds) == expected
