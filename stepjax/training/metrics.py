"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked for.

Every tracker takes the same thing: a step and a flat dict of numbers. Only the first process writes. On resume the
records after the restored step are taken out, so that a run killed and resumed leaves the file of an unbroken one.
"""

import importlib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
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
    config: LoggingConfig, out_dir: str | os.PathLike, run_config: Mapping[str, Any], resume_step: int | None
) -> list[Tracker]:
    """The trackers of a run that lives in `out_dir`; on processes other than the first, none.

    `run_config` is the configuration as plain data, shown beside the curves. `resume_step` is the step that was
    restored, or None for a run from the start: then what an earlier attempt logged there is taken out.

    Raises ConfigError when a package that the configuration asks for is not installed.
    """
    if jax.process_index() != 0:
        return []
    out_dir = pathlib.Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Optional packages first: when one is missing, nothing was touched.
    tensorboard = _optional("tensorboardX", "logging.tensorboard") if config.tensorboard else None
    wandb = _optional("wandb", "logging.wandb") if config.wandb else None
    trackers: list[Tracker] = [JsonlTracker(out_dir / "metrics.jsonl", resume_step)]
    if tensorboard is not None:
        trackers.append(TensorBoardTracker(tensorboard, out_dir / "tensorboard", run_config, resume_step))
    if wandb is not None:
        trackers.append(WandbTracker(wandb, out_dir, run_config, resume_step))
    return trackers


def _optional(package: str, field: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{field}=True needs {package!r}: `pip install stepjax[tracking]`, or set {field}=False ({error})"
        ) from error


class JsonlTracker:
    """One JSON object a line, with "step" first, written at once so that `tail -f` and a kill see whole lines.

    JSON has no NaN: numbers that are not finite are written as the strings "NaN", "Infinity", "-Infinity", which
    `float` reads back.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        self.path = pathlib.Path(path)
        self.removed = truncate_after(self.path, -1 if resume_step is None else resume_step)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)

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


def truncate_after(path: str | os.PathLike, step: int) -> int:
    """Takes the records after `step`, and a torn last line, out of a metrics file; returns how many lines that was.

    The file is replaced in one move, or left alone when nothing is to go. A missing file counts as empty. Raises
    ConfigError for a damaged line elsewhere than at the end: that is not the mark of a kill.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    records = list(_records(path))
    kept = [line for line, record_step in records if record_step is not None and record_step <= step]
    if len(kept) < len(records):
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return len(records) - len(kept)


def _records(path: pathlib.Path) -> Iterator[tuple[str, int | None]]:
    """Lines and their steps; None for a last line that was not completed."""
    with open(path, encoding="utf-8", errors="replace") as file:
        torn = None
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise ConfigError(f"{path}, line {torn}: not a metrics record; repair or remove the line")
            try:
                step = json.loads(line)["step"] if line.endswith("\n") else None
            except (json.JSONDecodeError, KeyError, TypeError):
                step = None
            if step is None:
                torn = number
            yield line, step


class TensorBoardTracker:
    """Scalars for TensorBoard; steps after the restored one are marked void, as TensorBoard does for restarts."""

    def __init__(self, package: Any, directory: pathlib.Path, run_config: Mapping[str, Any], resume_step: int | None):
        self._writer = package.SummaryWriter(
            logdir=str(directory), purge_step=0 if resume_step is None else resume_step + 1, flush_secs=10
        )
        if resume_step is None:
            self._writer.add_text("config", f"```json\n{json.dumps(run_config, indent=2, default=str)}\n```", 0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the rest of its environment keep their meaning.

    A resumed run goes on under its id, which is kept in `out_dir`. Curves are drawn over the logged "step" and not over
    W&B's own counter, which would refuse the steps that are taken again after a resume.
    """

    def __init__(self, package: Any, out_dir: pathlib.Path, run_config: Mapping[str, Any], resume_step: int | None):
        id_file = out_dir / "wandb_id"
        if resume_step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "stepjax"),
            name=out_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(out_dir),
            config=dict(run_config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": int(step)} | {name: float(value) for name, value in metrics.items()})

    def close(self) -> None:
        self._run.finish()
