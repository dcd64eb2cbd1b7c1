"""A directory that is filled under another name and takes its own when it is whole.

A journal beside the work names what is done, so that a conversion that was killed goes on where it stopped: its first
line says which conversion it is, every other one a finished tensor and what it adds to its array's digest.
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
REPLACED = ".replaced"
JOURNAL = "journal.jsonl"


class Partial:
    """Work under way. `directory` is where to write; `done` has what was finished, by name, with its digest."""

    def __init__(self, directory: Path, journal: int, done: dict[str, int | None]):
        self.directory, self.done = directory, done
        self._journal, self._lock = journal, threading.Lock()

    def mark(self, name: str, digest: int | None) -> None:
        """Note that a tensor is on disk. Threads may call this."""
        with self._lock:
            os.write(self._journal, json.dumps([name, digest]).encode() + b"\n")
            self.done[name] = digest


@contextlib.contextmanager
def partial(destination: Path, conversion: dict[str, Any], *, overwrite: bool) -> Iterator[Partial]:
    """Fill `destination`, or go on with it; it appears under its name when the block ends without an error.

    `conversion` says what is made of what: work of another one is not gone on with. With `overwrite`, what is in the
    way is removed, the old destination at the last moment; but only a directory that a conversion may have made.

    Raises:
        CheckpointError: the destination is there, another conversion's work is, or one is under way.
    """
    if os.path.lexists(destination):
        if not overwrite:
            raise CheckpointError(
                f"{destination} is there already: name another place, or pass --overwrite to replace it"
            )
        if not _is_output(destination):
            raise CheckpointError(
                f"--overwrite would delete {destination}, which no conversion has made ({_listed(destination)}): name "
                "another place, or remove it yourself"
            )
    directory = destination.with_name(destination.name + SUFFIX)
    if directory.is_symlink() or (directory.exists() and any(directory.iterdir()) and not _journal(directory).exists()):
        raise CheckpointError(
            f"{directory} is in the way, and no conversion has made it: name another place, or move it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    journal = os.open(_journal(directory), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{directory} is being written by another process: wait for it, or stop it"
            ) from error
        done = _resume(directory, journal, {"journal": 2} | json.loads(json.dumps(conversion)), overwrite)
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


def _resume(directory: Path, journal: int, conversion: dict[str, Any], overwrite: bool) -> dict[str, int | None]:
    """What the journal has, if it is of this conversion; a journal with its first line if there is none."""
    with os.fdopen(os.dup(journal), "rb") as file:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline was being written when it was killed
    with contextlib.suppress(ValueError, TypeError):  # a journal that nobody can read is of another conversion
        if lines and json.loads(lines[0]) == conversion:
            done = dict(json.loads(line) for line in lines[1:])
            os.ftruncate(journal, sum(len(line) + 1 for line in lines))
            os.lseek(journal, 0, os.SEEK_END)
            return done
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
    return {}


def _journal(directory: Path) -> Path:
    return directory / JOURNAL


def _is_output(path: Path) -> bool:
    """Whether a conversion may have made this: nothing, a converted checkpoint, or files beside weights."""
    if path.is_symlink() or not path.is_dir():
        return False
    entries = {entry.name: entry for entry in path.iterdir()}
    if entries.keys() <= {"0", "hf", "hf_headers.json"} and (not entries or (path / "0" / "state").is_dir()):
        return True
    is_flat = all(entry.is_file() or entry.name == ".cache" for entry in entries.values())
    return is_flat and "config.json" in entries and any(name.endswith(".safetensors") for name in entries)


def _listed(path: Path) -> str:
    if path.is_symlink() or not path.is_dir():
        return "a link" if path.is_symlink() else "a file"
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _replace(destination: Path, directory: Path) -> None:
    old = destination.with_name(destination.name + REPLACED)
    destination.rename(old)
    directory.rename(destination)
    shutil.rmtree(old)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
