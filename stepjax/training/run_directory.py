"""A run's directory: OUT/NAME, which may be in an object store.

Checkpoints go there directly. Metrics grow by one line per step, and objects in a store cannot grow: if OUT is a URL
such as gs://bucket/runs, the first process writes metrics and logs to runs/NAME on its machine. `publish` copies the
metrics to OUT/NAME with every checkpoint, and `fetch` copies them to a machine that takes over the run.

The first process locks its local directory. If OUT is a URL, that prevents a second start only on the same machine.
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from stepjax.config import RunConfig
from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError, StepjaxError

METRICS = "metrics.jsonl"
INIT_FROM = "init_from.json"  # where the parameters came from: stepjax.interop.init_from


def is_remote(config: RunConfig) -> bool:
    return "://" in config.out


def run_directory(config: RunConfig) -> epath.Path:
    """OUT/NAME, visible to every process."""
    return epath.Path(config.out) / config.name


def local_directory(config: RunConfig) -> Path:
    """The local directory: OUT/NAME itself, or runs/NAME if OUT is a URL."""
    return Path("runs" if is_remote(config) else config.out) / config.name


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Locks a local directory for this run until the block ends. Every process calls this; if one fails, all do.

    Raises:
        CheckpointError: another run holds the directory, or it cannot be created.
    """
    with contextlib.ExitStack() as stack:
        refused = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(directory))
            except CheckpointError as error:
                refused = error
        if jax.process_count() > 1 and np.max(multihost_utils.process_allgather(np.array(refused is not None))):
            refused = refused or CheckpointError("the first process cannot use the run's directory; see its log")
        if refused is not None:
            raise refused
        yield


def fetch(directory: epath.Path, local: Path) -> None:
    """Copies the metrics to this machine, unless it already has them."""
    if (directory / METRICS).exists() and not (local / METRICS).exists():
        local.mkdir(parents=True, exist_ok=True)
        (local / METRICS).write_text((directory / METRICS).read_text())


def publish(directory: epath.Path, local: Path) -> None:
    """Copies this machine's metrics to the shared directory."""
    if (local / METRICS).exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / METRICS).write_text((local / METRICS).read_text())


@contextlib.contextmanager
def explaining_disk_errors(checkpoints: epath.Path) -> Iterator[None]:
    """Turns a full or lost disk into one line that names the last step saved."""
    # Orbax's thread also logs the traceback of such errors, and its tasks log them again at exit.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_full_disk)
    try:
        yield
    except StepjaxError:
        raise
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore raises ValueError
        if not isinstance(error, OSError) and code is None:
            raise
        place = getattr(error, "filename", None) or checkpoints
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
        with contextlib.suppress(OSError):
            steps = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]
            reason = f"{reason}; the last step saved is {max(steps, default='none')}"
        raise CheckpointError(f"{place}: {reason}. Fix that, and rerun the same command to resume") from error


def _is_no_full_disk(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "os_error_code=" not in str(error) and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT)
