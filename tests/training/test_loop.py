"""The loop in one process: what a run leaves behind, how it ends, and what it refuses."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from run_files import PRETRAIN_ONLY, read_metrics, steps_saved, without_speed
from tiny_recipe import config as tiny

import stepjax.training.loop as loop
from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DigitsSource,
    JsonlSource,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    Phase,
    ScheduleConfig,
    TokenizerConfig,
)
from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError, ConfigError, RecordError, TrainingDivergedError
from stepjax.training.checkpoint import Checkpointer, read_meta
from stepjax.training.loop import pretrain
from stepjax.training.trackers import JsonlTracker

pytest_plugins = ("tiny_run",)

STEPS = tiny.num_steps


def files(directory) -> dict:
    """When each was written last; the lock is of every start, also of one that is refused."""
    paths = (path for path in sorted(directory.rglob("*")) if path.name != "lock")
    return {path: path.stat().st_mtime_ns for path in paths}


# Configurations that differ in these alone share one compiled step.
SHORT = ScheduleConfig(phases=(Phase(tokens=4 * tiny.tokens_per_step, start=1e-3, end=1e-3),))
DIVERGING = dataclasses.replace(
    tiny,
    schedule=ScheduleConfig(phases=(dataclasses.replace(tiny.schedule.phases[0], start=1e30),)),
    optimizer=OptimizerConfig(clip_norm=None),
)


# What a run leaves ---------------------------------------------------------------------------------------------------


def test_metrics_have_every_step_once_with_losses_by_source_and_modality(finished_run):
    rows = read_metrics(finished_run.directory)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert {"loss", "accuracy", "z", "grad_norm", "param_norm", "update_norm", "learning_rate"} <= row.keys()
        # Each source is of one modality here, so the two groupings must agree, and the mean lies between them.
        assert row.get("loss/source/transcribe") == row.get("loss/image")
        assert row.get("loss/source/arithmetic") == row.get("loss/text")
        parts = [row[key] for key in ("loss/image", "loss/text") if key in row]
        assert min(parts) - 1e-5 <= row["loss"] <= max(parts) + 1e-5
    assert any("loss/image" in row for row in rows) and any("loss/text" in row for row in rows)


def test_the_loss_falls_and_warm_up_starts_from_zero(finished_run):
    rows = read_metrics(finished_run.directory)
    assert rows[0]["learning_rate"] == 0 and rows[0]["update_norm"] == 0
    assert rows[2]["learning_rate"] == max(row["learning_rate"] for row in rows)
    assert np.mean([row["loss"] for row in rows[-4:]]) < rows[0]["loss"] - 1


def test_speeds_are_logged_at_the_interval(finished_run):
    for row in read_metrics(finished_run.directory):
        speeds = {key.removeprefix("speed/") for key in row if key.startswith("speed/")}
        if row["step"] % tiny.logging.every:
            assert not speeds
        else:
            assert speeds == {
                "step_seconds",
                "tokens_per_second",
                "images_per_second",
                "data_wait",
                "packing/tokens",
                "packing/vision",
                "mfu",
            }
            assert 0 < row["speed/packing/tokens"] <= 1 and 0 <= row["speed/data_wait"] <= 1
            assert row["speed/tokens_per_second"] <= tiny.tokens_per_step / row["speed/step_seconds"] * 1.001


def test_the_last_checkpoints_are_kept_with_their_configuration(finished_run):
    assert steps_saved(finished_run.directory) == [8, 12, 16]
    meta = read_meta(finished_run.directory / "checkpoints")
    assert meta["step"] == STEPS and meta["config"]["name"] == "tiny"


def test_the_console_tells_what_is_run_and_where(finished_run):
    first = finished_run.stderr.splitlines()[0]
    assert first.startswith(f"tiny: 79,248 parameters, {STEPS} steps of 256 tokens on 1 cpu device(s)")
    assert str(finished_run.directory) in first
    shown = [line.split()[1] for line in finished_run.stderr.splitlines() if line.startswith("step ")]
    assert shown == [f"{step}/{STEPS}" for step in range(2, STEPS + 1, 2)]


def test_a_step_is_logged_before_it_is_saved(tmp_path, monkeypatch, quick_runs):
    """Or a kill after the save would lose its line: the first step after a start is no exception."""
    seen = []
    save = Checkpointer.save

    def checked_save(self, step, *args, **kwargs):
        seen.append((step, [row["step"] for row in read_metrics(tmp_path / "tiny")]))
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", checked_save)
    config = dataclasses.replace(
        tiny,
        out=str(tmp_path),
        checkpoint=CheckpointConfig(every=1),
        logging=LoggingConfig(every=100),
        schedule=SHORT,
    )
    pretrain(config)
    assert seen == [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4])]


def test_profile_and_tensorboard(forked, tmp_path):
    """In a process of its own: JAX's profiler crashes where other tests have loaded libtpu without a TPU."""
    options = ["--logging.profile", "2", "3", "--logging.tensorboard"]
    options += ["--schedule.phases.0.tokens", f"{4 * tiny.tokens_per_step}"]
    log = tmp_path / "log"
    status = forked.start(["pretrain", str(PRETRAIN_ONLY), "--out", str(tmp_path), *options], log).wait()
    assert status == 0, log.read_text()
    assert list((tmp_path / "tiny" / "profile").rglob("*.xplane.pb"))
    (events,) = (tmp_path / "tiny" / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"loss/source/transcribe" in content and b"speed/mfu" in content


def test_evaluation_during_training_sees_the_model_of_its_step(tmp_path, quick_runs):
    calls = []
    evaluation = dataclasses.replace(tiny.evaluation, every=1)
    config = dataclasses.replace(tiny, out=str(tmp_path), evaluation=evaluation, schedule=SHORT)
    pretrain(config, on_evaluation=lambda model, _, step: calls.append((step, norm(model))))
    rows = read_metrics(tmp_path / "tiny")
    assert [step for step, _ in calls] == [1, 2, 3]
    # `param_norm` is that of the parameters that a step starts from.
    for step, value in calls:
        np.testing.assert_allclose(value, rows[step]["param_norm"], rtol=1e-5)


def norm(model) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf))) for leaf in jax.tree.leaves(model))))


# How it ends ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_has_nothing_to_train(finished_run, caplog, quick_runs):
    caplog.set_level("INFO")
    before = files(finished_run.directory)
    outcome = pretrain(dataclasses.replace(tiny, out=str(finished_run.out)))
    assert (outcome.step, outcome.stopped_by) == (STEPS, None)
    assert "nothing to train" in caplog.text
    assert files(finished_run.directory).keys() == before.keys()


@pytest.mark.parametrize("moment", ["evaluation", "last save"])
def test_a_signal_at_any_moment_saves_before_leaving(tmp_path, monkeypatch, caplog, finished_run, moment, quick_runs):
    """The next look at signals comes after a step, which is then saved; the same command goes on to an equal end."""
    caplog.set_level("INFO")
    kill = {"evaluation": 6, "last save": STEPS}[moment]
    save = Checkpointer.save

    def save_and_kill(self, step, *args, **kwargs):
        if step == kill:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, step, *args, **kwargs)

    def evaluate_and_kill(model, processor, step):
        if step == kill:
            os.kill(os.getpid(), signal.SIGTERM)

    evaluation = dataclasses.replace(tiny.evaluation, every=2)
    config = dataclasses.replace(tiny, out=str(tmp_path), evaluation=evaluation)
    with monkeypatch.context() as patch:
        if moment == "evaluation":
            outcome = pretrain(config, on_evaluation=evaluate_and_kill)
        else:
            patch.setattr(Checkpointer, "save", save_and_kill)
            outcome = pretrain(config)
    expected = min(kill + 1, STEPS)
    assert (outcome.step, outcome.stopped_by) == (expected, "SIGTERM")
    assert steps_saved(tmp_path / "tiny")[-1] == expected
    assert f"SIGTERM: saved step {expected}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    outcome = pretrain(config)
    assert (outcome.step, outcome.stopped_by) == (STEPS, None)
    rows, unbroken = read_metrics(tmp_path / "tiny"), read_metrics(finished_run.directory)
    assert [without_speed(row) for row in rows] == [without_speed(row) for row in unbroken]


def test_a_second_start_is_refused_and_touches_nothing(finished_run, quick_runs):
    """Also not what a save under way, which looks like one that was killed, has written so far."""
    under_way = finished_run.directory / "checkpoints" / "99.orbax-checkpoint-tmp"
    under_way.mkdir()
    before = files(finished_run.directory)
    try:
        with (
            locked(finished_run.directory),
            pytest.raises(CheckpointError, match=f"being written by process {os.getpid()} on "),
        ):
            pretrain(dataclasses.replace(tiny, out=str(finished_run.out)))
        assert before.items() <= files(finished_run.directory).items()
    finally:
        under_way.rmdir()


class _FullDisk:
    """What TensorStore, and what a file, says of a disk without room."""

    tensorstore = ValueError("RESOURCE_EXHAUSTED: Error writing local file \"x\" [os_error_code='28']")
    file = OSError(28, "No space left on device", "metrics.jsonl")


@pytest.mark.parametrize(("full", "safe"), [("save", 4), ("first save", "none"), ("metrics", 4)])
def test_a_full_disk_is_one_line_that_names_the_last_step_saved(tmp_path, monkeypatch, full, safe, quick_runs):
    save, log = Checkpointer.save, JsonlTracker.log

    def failing_save(self, step, *args, **kwargs):
        if full == "first save" or (full == "save" and step == 8):
            raise _FullDisk.tensorstore
        return save(self, step, *args, **kwargs)

    def failing_log(self, step, *args, **kwargs):
        if full == "metrics" and step == 7:
            raise _FullDisk.file
        return log(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", failing_save)
        patch.setattr(JsonlTracker, "log", failing_log)
        with pytest.raises(CheckpointError, match=f"No space left on device; the last step saved is {safe}. Fix that"):
            pretrain(dataclasses.replace(tiny, out=str(tmp_path)))
    assert pretrain(dataclasses.replace(tiny, out=str(tmp_path))).step == STEPS


def test_divergence_stops_the_run_and_saves_nothing_more(tmp_path, quick_runs):
    """Also where the bad step is the first after a start, and every step is a checkpoint."""
    config = dataclasses.replace(DIVERGING, out=str(tmp_path), checkpoint=CheckpointConfig(every=1))
    for _ in range(2):
        with pytest.raises(TrainingDivergedError, match=r"not finite at step 2 \(checked steps 2 to 2\)"):
            pretrain(config)
        assert steps_saved(tmp_path / "tiny") == [1]
    assert [row["step"] for row in read_metrics(tmp_path / "tiny")] == [1]


def test_divergence_between_checks_names_the_range(tmp_path, quick_runs):
    logging, checkpoint = LoggingConfig(every=5), CheckpointConfig(every=5)
    config = dataclasses.replace(DIVERGING, out=str(tmp_path), logging=logging, checkpoint=checkpoint)
    with pytest.raises(TrainingDivergedError, match=r"not finite at step 2 \(checked steps 1 to 5\)"):
        pretrain(config)
    assert steps_saved(tmp_path / "tiny") == []


# Going on with another configuration ---------------------------------------------------------------------------------

WIDER = dataclasses.replace(tiny.model, decoder=dataclasses.replace(tiny.model.decoder, width=48))
OTHER_DATA = (tiny.data.sources[0], dataclasses.replace(tiny.data.sources[1], weight=0.25))
DECISIVE = [
    (dict(model=WIDER), ["model.decoder.width: 32 -> 48"]),
    (
        dict(schedule=SHORT, seed=1, data=dataclasses.replace(tiny.data, sources=OTHER_DATA)),
        ["data.sources.1.weight: 0.5 -> 0.25", "schedule.phases.0.start: 0.003 -> 0.001", "seed: 0 -> 1"],
    ),
    (dict(optimizer=OptimizerConfig(freeze=("vision",))), ["optimizer.freeze: () -> ('vision',)"]),
]


@pytest.mark.parametrize(("changes", "named"), DECISIVE, ids=("model", "data and schedule", "freeze"))
def test_what_decides_the_result_may_not_change(finished_run, changes, named, quick_runs):
    before = files(finished_run.directory)
    with pytest.raises(CheckpointError, match="another configuration") as error:
        pretrain(dataclasses.replace(tiny, out=str(finished_run.out), **changes))
    message = str(error.value)
    assert all(change in message for change in named) and "logging" not in message
    assert "--name" in message and "\n" not in message
    assert files(finished_run.directory) == before


def test_what_does_not_decide_it_may(finished_run):
    """Eight devices instead of one among it; here without the fixture that takes one."""
    config = dataclasses.replace(
        tiny,
        out=str(finished_run.out),
        logging=LoggingConfig(every=7),
        checkpoint=CheckpointConfig(every=5, keep=9),
        mesh=MeshConfig(data=2, fsdp=1, context=4),
        data=dataclasses.replace(tiny.data, num_workers=1, prefetch=2, bad_records="skip"),
        evaluation=dataclasses.replace(tiny.evaluation, examples=8),
    )
    outcome = pretrain(config)
    assert outcome.step == STEPS
    assert len(jax.tree.leaves(outcome.model)[0].devices()) == 8


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path):
    """A source of sums and of images, two of them broken."""
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "white.png").read_bytes()[:40])
    with open(tmp_path / "records.jsonl", "w") as file:
        for i in range(12):
            image = {5: "broken.png", 8: "missing.png"}.get(i, "white.png")
            question = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Picture {i}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return JsonlSource(name="pictures", weight=1.0, path=str(tmp_path / "records.jsonl"))


def test_skipped_records_are_counted_and_named(tmp_path, jsonl, caplog, quick_runs):
    caplog.set_level("INFO")
    data = DataConfig(sources=(jsonl,), bad_records="skip")
    pretrain(dataclasses.replace(tiny, out=str(tmp_path), data=data, schedule=SHORT))
    named = [line for line in caplog.messages if line.startswith("skipped ")]
    assert {line.split(":")[0] for line in named} == {"skipped pictures/5", "skipped pictures/8"}
    assert "missing.png" in next(line for line in named if "pictures/8" in line)
    assert sum(row.get("skipped", 0) for row in read_metrics(tmp_path / "tiny")) == len(named)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_record_stops_the_run_by_default(tmp_path, jsonl, num_workers, quick_runs):
    data = DataConfig(sources=(jsonl,), num_workers=num_workers)
    with pytest.raises(
        RecordError, match=r"record 'pictures/(5|8)': image 0, messages.*data.bad_records=skip"
    ) as error:
        pretrain(dataclasses.replace(tiny, out=str(tmp_path), data=data))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_found_before_anything_is_compiled(tmp_path, monkeypatch, quick_runs):
    data = DataConfig(sources=(JsonlSource(name="docs", weight=1.0, path=str(tmp_path / "none.jsonl")),))
    with pytest.raises(RecordError, match="source 'docs': .*none.jsonl cannot be read"):
        pretrain(dataclasses.replace(tiny, out=str(tmp_path), data=data))
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


# Devices and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mesh=MeshConfig()), r"batch.rows=2: .* divisible by 8 devices"),
        (
            dict(mesh=MeshConfig(data=2, fsdp=1, context=4), batch=BatchConfig(rows=2, tokens=128, accumulation=2)),
            r"batch.rows=2: .*batch.accumulation=2 micro-batches must be divisible by 2 devices",
        ),
        (
            dict(mesh=MeshConfig(data=2, fsdp=1, context=4), batch=BatchConfig(rows=2, tokens=126)),
            r"batch.tokens=126: must be divisible by 4 devices",
        ),
        (dict(mesh=MeshConfig(data=3)), r"mesh=\[1, 3, -1, 1, 1\]: .*8 devices"),
        (dict(optimizer=OptimizerConfig(freeze=("visoin",))), r"'visoin' matches no parameter name"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(dataclasses.replace(tiny, out=str(tmp_path), **changes))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    decoder = dataclasses.replace(tiny.model.decoder, vocab_size=100)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, decoder=decoder))
    with pytest.raises(ConfigError, match=r"model.decoder.vocab_size=100: the tokenizer has \d+ ids"):
        loop.make_processor(config)
    with pytest.raises(ValueError, match="nowhere"):
        loop.make_processor(dataclasses.replace(tiny, tokenizer=TokenizerConfig(path="nowhere")))


def test_one_row_in_a_batch_and_one_step(tmp_path, quick_runs):
    """The smallest run there is: its only step is first and last."""
    source = DigitsSource(name="sums", weight=1.0, task="arithmetic")
    config = dataclasses.replace(
        tiny,
        out=str(tmp_path),
        data=DataConfig(sources=(source,)),
        batch=BatchConfig(rows=1, tokens=64, global_views=0, crops=0),
        schedule=ScheduleConfig(phases=(Phase(tokens=64, start=1e-3, end=1e-3),)),
    )
    pretrain(config)
    (row,) = read_metrics(tmp_path / "tiny")
    assert row["step"] == 1 and row["loss"] == row["loss/text"] == row["loss/source/sums"]
    assert steps_saved(tmp_path / "tiny") == [1]
