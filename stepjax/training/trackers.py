"""Metric trackers: `metrics.jsonl` always, TensorBoard and Weights & Biases on request.

Every tracker takes a step and a flat dict of numbers. Only the first process writes. On resume, records after the
restored step are removed, so a run killed and resumed leaves the same file as an uninterrupted one.
"""

import importlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from stepjax.config import LoggingConfig
from stepjax.errors import ConfigError


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of a step: numbers, or 0-d arrays on the host."""
        ...

    def close(self) -> None: ...


def make_trackers(
    config: LoggingConfig, directory: Path, run_config: Mapping[str, Any], resume_step: int | None
) -> list[Tracker]:
    """The trackers of the run in `directory`; none on processes other than the first.

    Args:
        run_config: the configuration as plain data, shown next to the curves.
        resume_step: the restored step; None for a new run, which discards the logs of earlier attempts.

    Raises:
        ConfigError: a package that the configuration requires is not installed; no file has changed.
    """
    if jax.process_index() != 0:
        return []
    tensorboard = _optional("tensorboardX", "logging.tensorboard") if config.tensorboard else None
    wandb = _optional("wandb", "logging.wandb") if config.wandb else None
    directory.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = [JsonlTracker(directory / "metrics.jsonl", resume_step)]
    if tensorboard is not None:
        trackers.append(_TensorBoardTracker(tensorboard, directory / "tensorboard", run_config, resume_step))
    if wandb is not None:
        trackers.append(_WandbTracker(wandb, directory, run_config, resume_step))
    return trackers


def _optional(package: str, field: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{field}=True needs {package!r}: `pip install stepjax[tracking]`, or set {field}=False ({error})"
        ) from error


class JsonlTracker:
    """One JSON object per line, "step" first, flushed at once so that `tail -f` and a kill see whole lines.

    JSON has no NaN: non-finite numbers become the strings "NaN", "Infinity" and "-Infinity", which `float` parses.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        truncate_after(path, -1 if resume_step is None else resume_step)
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        record = {"step": int(step)} | {name: _json_number(value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def _json_number(value: Any) -> int | float | str:
    number = value if type(value) is int else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def truncate_after(path: Path, step: int) -> None:
    """Atomically removes the records after `step` and a torn last line from a metrics file.

    Raises:
        ConfigError: a line before the last is damaged, which a kill cannot cause.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [(line, _step_of(line)) for line in file]
    torn = [number for number, (_, at) in enumerate(lines[:-1], start=1) if at is None]
    if torn:
        raise ConfigError(f"{path}, line {torn[0]}: not a metrics record; repair or remove the line")
    kept = [line for line, at in lines if at is not None and at <= step]
    if len(kept) < len(lines):
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


class _TensorBoardTracker:
    """Scalars for TensorBoard; on resume, TensorBoard purges the steps after the restored one."""

    def __init__(self, package: Any, directory: Path, run_config: Mapping[str, Any], resume_step: int | None):
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = package.SummaryWriter(logdir=str(directory), purge_step=purge_step, flush_secs=10)
        if resume_step is None:
            self._writer.add_text("config", f"```json\n{json.dumps(run_config, indent=2, default=str)}\n```", 0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._writer.close()


class _WandbTracker:
    """Weights & Biases. Respects WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and its other environment variables.

    A resumed run continues under its id, stored in `directory`. Curves use the logged "step", not W&B's own counter,
    which would reject steps repeated after a resume.
    """

    def __init__(self, package: Any, directory: Path, run_config: Mapping[str, Any], resume_step: int | None):
        id_file = directory / "wandb_id"
        if resume_step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "stepjax"),
            name=directory.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(run_config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": int(step)} | {name: float(value) for name, value in metrics.items()})

    def close(self) -> None:
        self._run.finish()
