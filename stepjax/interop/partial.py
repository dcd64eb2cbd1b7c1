"""A directory that is filled under a temporary name, renamed when complete, and resumable after a kill.

A journal in the directory records progress: its first line identifies the conversion, and every other line names a
finished tensor and its contribution to its array's digest.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepjax.directory_lock import LOCK, locked
from stepjax.errors import CheckpointError

SUFFIX = ".partial"
REPLACED = ".replaced"
JOURNAL = "journal.jsonl"


class Partial:
    """Unfinished work. `directory` is where to write; `done` maps finished tensors to their digests."""

    def __init__(self, directory: Path, conversion: dict[str, Any], done: dict[str, int | None], length: int):
        self.directory, self.done, self._lock = directory, done, threading.Lock()
        self._first = _line(conversion)
        self._journal = (directory / JOURNAL).open("ab", buffering=0)
        self._journal.truncate(length)  # drop a partial last line
        if not length:
            self._journal.write(self._first)

    def mark(self, name: str, digest: int | None) -> None:
        """Records that a tensor is on disk. Thread-safe."""
        with self._lock:
            self._journal.write(_line([name, digest]))
            self.done[name] = digest

    def forget(self) -> None:
        """Makes the work so far non-resumable."""
        self._journal.truncate(len(self._first))
        self.done.clear()

    def close(self) -> None:
        self._journal.close()


@contextlib.contextmanager
def partial(destination: Path, conversion: dict[str, Any], *, overwrite: bool) -> Iterator[Partial]:
    """Fills `destination`, or resumes filling it. It gets its name when the block ends without an error.

    `conversion` identifies the work; only work with the same value is resumed. `overwrite` removes existing work, and
    an old destination at the last moment, but only directories that a conversion may have made.

    Raises:
        CheckpointError: the destination or another conversion's work exists, or a conversion is running.
    """
    if os.path.lexists(destination):
        if not overwrite:
            raise CheckpointError(
                f"{destination} exists already: name another place, or pass --overwrite to replace it"
            )
        if not _is_output(destination):
            raise CheckpointError(
                f"--overwrite would delete {destination}, which is not a conversion's output ({_listed(destination)}): "
                "name another place, or remove it yourself"
            )
    directory = destination.with_name(destination.name + SUFFIX)
    inside = set(os.listdir(directory)) if directory.is_dir() else set()
    if directory.is_symlink() or not (inside <= {LOCK} or JOURNAL in inside):
        raise CheckpointError(
            f"{directory} is in the way and is not a conversion's work: name another place, or move it"
        )
    with locked(directory):
        conversion = {"journal": 2} | json.loads(json.dumps(conversion))
        work = Partial(directory, conversion, *_resumed(directory, conversion, overwrite))
        try:
            yield work
        except CheckpointError:
            if not work.done:  # nothing to resume
                shutil.rmtree(directory)
            raise
        finally:
            work.close()
        for name in (JOURNAL, LOCK):
            (directory / name).unlink()
        _take_name(directory, destination)


def _resumed(directory: Path, conversion: dict[str, Any], overwrite: bool) -> tuple[dict[str, int | None], int]:
    """This conversion's finished tensors and the length of its journal; empties the directory if there is none."""
    journal = directory / JOURNAL
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []  # a kill may have cut the last line
    is_same = False
    with contextlib.suppress(ValueError, TypeError):  # an unreadable journal is another conversion's
        is_same = bool(lines) and json.loads(lines[0]) == conversion
        if is_same and len(lines) > 1:
            return dict(json.loads(line) for line in lines[1:]), sum(len(line) + 1 for line in lines)
    others = [path for path in directory.iterdir() if path.name not in (JOURNAL, LOCK)]
    if (lines or others) and not (is_same or overwrite):
        raise CheckpointError(
            f"{directory} holds the unfinished work of another conversion, or of a source that has changed since: "
            "remove it, or pass --overwrite to start over"
        )
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {}, 0


def _line(entry: Any) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _is_output(path: Path) -> bool:
    """Whether a conversion may have made this: an empty directory, a converted checkpoint, or files with weights."""
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


def _take_name(directory: Path, destination: Path) -> None:
    if destination.exists():
        old = destination.with_name(destination.name + REPLACED)
        destination.rename(old)
        directory.rename(destination)
        shutil.rmtree(old)
    else:
        directory.rename(destination)
    parent = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # the new name is on disk
    finally:
        os.close(parent)
