"""Where a run leaves its files: OUT/NAME, which may be in an object store.

Checkpoints go there directly. Metrics grow by a line a step, and objects in a store cannot grow: where OUT is a URL
such as gs://bucket/runs, they and the logs are written to runs/NAME on the first process's machine, `publish` copies
the metrics to OUT/NAME with every checkpoint, and `fetch` brings them to a machine that takes the run over.

The first process locks its directory. Where OUT is a URL, that keeps a second start on the same machine off, not one on
another.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from stepjax.config import PretrainConfig
from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError

METRICS = "metrics.jsonl"
INIT_FROM = "init_from.json"  # where the parameters came from: stepjax.interop.init_from


def run_directory(config: PretrainConfig) -> epath.Path:
    return epath.Path(config.out) / config.name


def local_directory(config: PretrainConfig) -> Path:
    """The directory of this machine: OUT/NAME itself, or runs/NAME where OUT is a URL."""
    return Path("runs" if is_remote(config) else config.out) / config.name


def is_remote(config: PretrainConfig) -> bool:
    return "://" in config.out


@contextlib.contextmanager
def owned(local: Path) -> Iterator[None]:
    """The directory is this run's until the block ends. Every process calls this, and all are refused with the first.

    Raises:
        CheckpointError: another run has it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        refused = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(local))
            except CheckpointError as error:
                refused = error
        if jax.process_count() > 1 and np.max(multihost_utils.process_allgather(np.array(refused is not None))):
            refused = refused or CheckpointError("the first process cannot use the run's directory; it says why")
        if refused is not None:
            raise refused
        yield


def fetch(directory: epath.Path, local: Path) -> None:
    """Bring the metrics here, unless this machine has the run's already."""
    if (directory / METRICS).exists() and not (local / METRICS).exists():
        local.mkdir(parents=True, exist_ok=True)
        (local / METRICS).write_text((directory / METRICS).read_text())


def publish(directory: epath.Path, local: Path) -> None:
    if (local / METRICS).exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / METRICS).write_text((local / METRICS).read_text())
