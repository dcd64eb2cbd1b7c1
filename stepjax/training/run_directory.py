"""Where a run leaves its files: OUT/NAME, which may be in an object store.

Checkpoints go there directly. Metrics grow by a line a step, and objects in a store cannot grow: where OUT is a URL
such as gs://bucket/runs, they and the logs are written to runs/NAME on the first process's machine, `publish` copies
the metrics to OUT/NAME with every checkpoint, and `fetch` brings them to a machine that takes the run over.
"""

from pathlib import Path

from etils import epath

from stepjax.config import PretrainConfig

METRICS = "metrics.jsonl"


def run_directory(config: PretrainConfig) -> epath.Path:
    return epath.Path(config.out) / config.name


def local_directory(config: PretrainConfig) -> Path:
    """The directory of this machine: OUT/NAME itself, or runs/NAME where OUT is a URL."""
    return Path("runs" if is_remote(config) else config.out) / config.name


def is_remote(config: PretrainConfig) -> bool:
    return "://" in config.out


def fetch(directory: epath.Path, local: Path) -> None:
    """Bring the metrics here, unless this machine has the run's already."""
    if (directory / METRICS).exists() and not (local / METRICS).exists():
        local.mkdir(parents=True, exist_ok=True)
        (local / METRICS).write_text((directory / METRICS).read_text())


def publish(directory: epath.Path, local: Path) -> None:
    if (local / METRICS).exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / METRICS).write_text((local / METRICS).read_text())
