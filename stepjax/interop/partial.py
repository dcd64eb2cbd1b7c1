"""A directory that is filled under another name and takes its own when it is whole.

A journal beside the work names what is done, so that a conversion that was killed goes on where it stopped: its first
line says which conversion it is, every other one a finished tensor.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError

SUFFIX = ".partial"
JOURNAL = "journal.jsonl"


class Partial:
    """Work under way. `directory` is where to write; `done` are the names that were finished before."""

    def __init__(self, directory: Path, journal: int, done: set[str]):
        self.directory, self.done = directory, done
        self._journal, self._lock = journal, threading.Lock()

    def mark(self, name: str) -> None:
        """Note that a tensor is on disk. Threads may call this."""
        with self._lock:
            os.write(self._journal, json.dumps(name).encode() + b"\n")
            self.done.add(name)


@contextlib.contextmanager
def partial(destination: Path, conversion: dict[str, Any], *, overwrite: bool) -> Iterator[Partial]:
    """Fill `destination`, or go on with it; it appears under its name when the block ends without an error.

    `conversion` says what is made of what: work of another one is not gone on with. With `overwrite`, what is in the
    way is removed, the old destination at the last moment.

    Raises:
        CheckpointError: the destination is there, another conversion's work is, or one is under way.
    """
    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} is there already: name another place, or pass --overwrite to replace it")
    directory = destination.with_name(destination.name + SUFFIX)
    directory.mkdir(parents=True, exist_ok=True)
    journal = os.open(directory / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{directory} is being written by another process: wait for it, or stop it"
            ) from error
        done = _resume(directory, journal, json.loads(json.dumps(conversion)), overwrite)
        work = Partial(directory, journal, done)
        try:
            yield work
        except CheckpointError:
            if not work.done:  # there is nothing to go on with
                shutil.rmtree(directory)
            raise
        if destination.exists():
            _replace(destination, directory)
        else:
            directory.rename(destination)
        (destination / JOURNAL).unlink()
        _sync(destination.parent)
    finally:
        os.close(journal)


def _resume(directory: Path, journal: int, conversion: dict[str, Any], overwrite: bool) -> set[str]:
    """The names that the journal has, if it is of this conversion; a journal with its first line if there is none."""
    with os.fdopen(os.dup(journal), "rb") as file:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline was being written when it was killed
    if lines and json.loads(lines[0]) == conversion:
        os.ftruncate(journal, sum(len(line) + 1 for line in lines))
        os.lseek(journal, 0, os.SEEK_END)
        return {json.loads(line) for line in lines[1:]}
    others = [path for path in directory.iterdir() if path.name != JOURNAL]
    if (lines or others) and not overwrite:
        raise CheckpointError(
            f"{directory} holds the unfinished work of another conversion, or of a source that has changed since: "
            "remove it, or pass --overwrite to start anew"
        )
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.ftruncate(journal, 0)
    os.lseek(journal, 0, os.SEEK_SET)
    os.write(journal, json.dumps(conversion).encode() + b"\n")
    return set()


def _replace(destination: Path, directory: Path) -> None:
    old = destination.with_name(destination.name + ".replaced")
    destination.rename(old)
    directory.rename(destination)
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
