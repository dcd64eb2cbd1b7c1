"""The journal of a batch run: every trajectory that ended, one line each, so that none is drawn twice.

    DIR/run.json     what must be the same for a run to go on
    DIR/calls.jsonl  {"problem": id, "sample": s, "trajectory": {...}, "digest": of the line without it}
                     {"problem": id, "sample": s, "forgotten": [[round, index], ...], ...}   to be drawn again
    DIR/lock         held while a process writes here

A line is written when its trajectory ends, before any other part of the process knows of it, and is on the disk before
the next round, which depends on it, is asked. Only the last line can be cut off by a kill; it is removed then, and its
trajectory is drawn again. A line that was changed is named. Memory holds where lines are, not what they say.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError
from stepjax.pacore.records import Trajectory

SETTINGS, CALLS = "run.json", "calls.jsonl"

_DIGEST = re.compile(rb',"digest":"([0-9a-f]{16})"\}\n\Z')

Job = tuple[str, int]  # a problem's id and a sample of it


@dataclasses.dataclass(frozen=True)
class _Line:
    offset: int
    length: int
    status: str
    has_answer: bool


class Journal:
    """
    Attributes:
        num_known: trajectories that were there when it was opened.
        num_unsigned: lines without a digest, of an older version.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lines: dict[Job, dict[tuple[int, int], _Line]] = {}
        self._is_synced = True
        self.num_unsigned = 0
        try:
            self._end = self._scan()
        except BaseException:
            self.close()
            raise
        self.num_known = sum(map(len, self._lines.values()))

    def close(self) -> None:
        os.close(self._file)

    def append(self, job: Job, trajectory: Trajectory) -> None:
        """
        Raises:
            CheckpointError: it cannot be written.
        """
        line = self._write({"problem": job[0], "sample": job[1], "trajectory": trajectory.to_json()})
        self._lines.setdefault(job, {})[trajectory.round, trajectory.index] = _Line(
            *line, trajectory.status, _has_answer(trajectory)
        )

    def sync(self) -> None:
        """Brings what was appended to the disk."""
        if not self._is_synced:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise CheckpointError(f"{self._path} cannot be written: {error.strerror}") from error
            self._is_synced = True

    def done(self, job: Job) -> list[Trajectory]:
        lines = sorted(self._lines.get(job, {}).items())
        return [
            Trajectory.from_json(read_line(os.pread(self._file, line.length, line.offset))["trajectory"])
            for _, line in lines
        ]

    def forget_failed(self) -> int:
        """Trajectories that failed will be drawn again; returns how many those are.

        Later rounds of their problems depend on them, and are forgotten with them. So is a round of which no trajectory
        has an answer. What was not waited for (`cancelled`) is no failure.
        """
        count = 0
        for job, lines in self._lines.items():
            first = min((at[0] for at, line in lines.items() if line.status in ("error", "timeout")), default=None)
            last = max(at[0] for at in lines) if lines else 0
            if first is None and not any(line.has_answer for at, line in lines.items() if at[0] == last):
                first = last
            if first is None:
                continue
            again = [at for at, line in lines.items() if at[0] > first or (at[0] == first and not line.has_answer)]
            self._write({"problem": job[0], "sample": job[1], "forgotten": sorted(again)})
            for at in again:
                del lines[at]
            count += len(again)
        self.sync()
        return count

    def _write(self, record: dict[str, Any]) -> tuple[int, int]:
        body = json.dumps(record, separators=(",", ":")).encode()
        line = body[:-1] + b',"digest":"' + _digest(body) + b'"}\n'
        offset, left = self._end, memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, offset)
            raise CheckpointError(
                f"{self._path} cannot be written: {error.strerror}; make room, and start the run again to go on"
            ) from error
        self._end += len(line)
        self._is_synced = False
        return offset, len(line)

    def _scan(self) -> int:
        """Finds the lines, and cuts off a last one that is not whole; returns where they end."""
        offset = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, offset)
                    os.fsync(self._file)
                    break
                try:
                    self._take(read_line(line), offset, len(line))
                except BAD_LINE as error:
                    raise CheckpointError(
                        f"{self._path}, line {number}: not a trajectory ({type(error).__name__}: {error}); restore the "
                        "line, or remove it to have its call drawn again"
                    ) from error
                self.num_unsigned += _DIGEST.search(line) is None
                offset += len(line)
        return offset

    def _take(self, record: Mapping[str, Any], offset: int, length: int) -> None:
        lines = self._lines.setdefault((record["problem"], record["sample"]), {})
        if "forgotten" in record:
            for at in record["forgotten"]:
                lines.pop(tuple(at), None)
            return
        trajectory = Trajectory.from_json(record["trajectory"])
        lines[trajectory.round, trajectory.index] = _Line(offset, length, trajectory.status, _has_answer(trajectory))


BAD_LINE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def read_line(line: bytes) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        BAD_LINE: it is none, or was changed since.
    """
    record = json.loads(line)
    signed = _DIGEST.search(line)
    if record.pop("digest", None) is not None:
        if signed is None or _digest(line[: signed.start()] + b"}") != signed[1]:
            raise ValueError("it was changed since it was written, as its digest tells")
    if record.keys() not in ({"problem", "sample", "trajectory"}, {"problem", "sample", "forgotten"}):
        raise ValueError(f"it has {', '.join(map(repr, record))}")
    return record


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


def _has_answer(trajectory: Trajectory) -> bool:
    return trajectory.status == "ok" and bool(trajectory.content.strip() or trajectory.tool_calls)


@contextlib.contextmanager
def open_journal(directory: Path, settings: Mapping[str, Any], free: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a run, new or gone on with; its directory is this process's until the block ends.

    Args:
        settings: what must be the same for the run to go on.
        free: what else is worth knowing of the run; may change.

    Raises:
        CheckpointError: another process writes there, the run there is another one, or its files cannot be used.
    """
    with locked(directory):
        _claim(directory, json.loads(json.dumps(settings)), free)
        with contextlib.closing(Journal(directory / CALLS)) as journal:
            yield journal
            journal.sync()


def _claim(directory: Path, settings: dict[str, Any], free: Mapping[str, Any]) -> None:
    path = directory / SETTINGS
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): restore it, or name another --out") from error
        differences = _differences(there, settings)
        if differences:
            raise CheckpointError(
                f"{directory} holds a run with other settings: {'; '.join(differences)}. Give those again to go on, or "
                "name another --out"
            )
    elif (directory / CALLS).exists():
        raise CheckpointError(f"{directory} has a {CALLS} without its {SETTINGS}: restore it, or name another --out")
    write_json(path, {"settings": settings, **free})


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(key for key in here if key not in there)]
        inner = ((f"{name}.{key}" if name else key, there.get(key), here.get(key)) for key in names)
        return [each for key, a, b in inner for each in _differences(a, b, key)]
    return [] if there == here else [f"{name} was {there!r}, and is {here!r} now"]


def write_json(path: Path, value: Any) -> None:
    """Replaces a file in one move."""
    replace_file(path, [(json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")])


def replace_file(path: Path, parts: Any) -> None:
    """Replaces a file, in one move, by one of these parts, each of bytes.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
