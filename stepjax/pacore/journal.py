"""A run's directory. Everything is in the journal: results and traces are made of it, and nothing is drawn twice.

    DIR/run.json        what must be the same for a run to be resumed
    DIR/problems.jsonl  the problems as they were read, with the paths of their images
    DIR/calls.jsonl     the journal; each line has a digest of itself
        {"problem": id, "sample": s, "trajectory": {...}}                       a call ended
        {"problem": id, "sample": s, "outcome": {...}}                          the problem is answered, or failed
        {"problem": id, "sample": s, "forgotten": [[round, index], ...]}        to be drawn again
    DIR/lock            held while a process writes here

A trajectory's line is written when it ends, before any other part of the process knows of it, and is on the disk before
the next round, which depends on it, is asked. Only the last line can be cut off by a kill; it is removed then, and its
trajectory is drawn again. A line that was changed is named. Memory holds where lines are, not what they say.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError
from stepjax.pacore.problems import problem_line, saved_problems
from stepjax.pacore.records import Outcome, Problem, Reference, Round, Trajectory

SETTINGS, PROBLEMS, CALLS = "run.json", "problems.jsonl", "calls.jsonl"

_DIGEST = re.compile(rb',"digest":"([0-9a-f]{16})"\}\n\Z')
_BAD_LINE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

_log = logging.getLogger(__name__)

Job = tuple[str, int]  # a problem's id and a sample of it
_Place = tuple[int, int]  # of a line in the file: offset and length


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    place: _Place
    status: str
    has_answer: bool


class Journal:
    """
    Attributes:
        num_known: trajectories that it had when it was opened.
        num_unsigned: lines without a digest, of an older version.

    Raises:
        CheckpointError: it cannot be read, or a line of it is not what was written.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        """
        Args:
            read_only: another process may be writing: a last line that is not whole is left alone.
        """
        self._path, self._read_only = path, read_only
        try:
            self._file = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        self._calls: dict[Job, dict[tuple[int, int], _Call]] = {}
        self._outcomes: dict[Job, tuple[_Place, str]] = {}  # and the matching that decided
        self._is_synced = True
        self.num_unsigned = 0
        try:
            self._end = self._scan()
        except BaseException:
            self.close()
            raise
        self.num_known = sum(map(len, self._calls.values()))

    def close(self) -> None:
        os.close(self._file)

    def append(self, job: Job, trajectory: Trajectory) -> None:
        """
        Raises:
            CheckpointError: it cannot be written.
        """
        self._append(job, {"trajectory": trajectory.to_json()})

    def append_outcome(self, outcome: Outcome, matching: str) -> None:
        """
        Args:
            matching: by which votes were counted.

        Raises:
            CheckpointError: it cannot be written.
        """
        fields = {name: getattr(outcome, name) for name in _OUTCOME_FIELDS}
        rounds, sources = [], outcome.problem.given
        for each in outcome.rounds:
            rounds.append(_round_json(each, sources))
            sources = each.messages
        job = (outcome.problem.id, outcome.sample)
        self._append(job, {"outcome": {"matching": matching, **fields, "rounds": rounds}})

    def sync(self) -> None:
        """Brings what was appended to the disk."""
        if not self._is_synced:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise CheckpointError(f"{self._path} cannot be written: {error.strerror}") from error
            self._is_synced = True

    def done(self, job: Job) -> list[Trajectory]:
        calls = sorted(self._calls.get(job, {}).items())
        return [Trajectory.from_json(self._read(call.place)["trajectory"]) for _, call in calls]

    def answered(self) -> Collection[Job]:
        """The jobs that have an outcome."""
        return self._outcomes.keys()

    def outcome(self, problem: Problem, sample: int, *, matching: str | None = None) -> Outcome | None:
        """None if there is none yet, or calls that it speaks of are not here, which is logged. A thread may read while
        another one writes.

        Args:
            matching: only an outcome that was decided by it.
        """
        job = (problem.id, sample)
        if job not in self._outcomes or matching not in (None, self._outcomes[job][1]):
            return None
        fields = self._read(self._outcomes[job][0])["outcome"]
        trajectories = {(each.round, each.index): each for each in self.done(job)}
        rounds, sources = [], problem.given
        try:
            for number, each in enumerate(fields["rounds"]):
                made = [trajectories[number, index] for index in range(each["width"])]
                rounds.append(_round(number, each, made, sources))
                sources = rounds[-1].messages
        except KeyError as error:
            _log.warning("problem %r: %s lacks what its outcome speaks of: %s", problem.id, self._path, error)
            return None
        chosen = None if fields["chosen"] is None else tuple(fields["chosen"])
        given = {name: fields[name] for name in _OUTCOME_FIELDS}
        return Outcome(problem=problem, sample=sample, **{**given, "chosen": chosen, "rounds": tuple(rounds)})

    def forget_failed(self) -> int:
        """Has trajectories that failed drawn again; returns how many those are.

        Later rounds of their problems depend on them, and are forgotten with them. So is a round of which no trajectory
        has an answer. What was not waited for (`cancelled`) is no failure.
        """
        count = 0
        for job, calls in self._calls.items():
            first = min((at[0] for at, call in calls.items() if call.status in ("error", "timeout")), default=None)
            last = max(at[0] for at in calls) if calls else 0
            if first is None and not any(call.has_answer for at, call in calls.items() if at[0] == last):
                first = last
            if first is None:
                continue
            again = [at for at, call in calls.items() if at[0] > first or (at[0] == first and not call.has_answer)]
            if again:
                self._append(job, {"forgotten": sorted(again)})
            count += len(again)
        self.sync()
        return count

    def _append(self, job: Job, fields: Mapping[str, Any]) -> None:
        record = {"problem": job[0], "sample": job[1], **fields}
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
                f"{self._path} cannot be written: {error.strerror}; make room, and rerun the same command to resume"
            ) from error
        self._end += len(line)
        self._is_synced = False
        self._take(record, (offset, len(line)))

    def _read(self, place: _Place) -> dict[str, Any]:
        return _record(os.pread(self._file, place[1], place[0]))

    def _scan(self) -> int:
        """Finds the lines, and cuts off a last one that is not whole; returns where they end."""
        offset = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not self._read_only:
                        os.ftruncate(self._file, offset)
                        os.fsync(self._file)
                    break
                try:
                    self._take(_record(line), (offset, len(line)))
                except _BAD_LINE as error:
                    raise CheckpointError(
                        f"{self._path}, line {number}: not a trajectory ({type(error).__name__}: {error}); restore the "
                        "line, or remove it to have its call drawn again"
                    ) from error
                self.num_unsigned += _DIGEST.search(line) is None
                offset += len(line)
        return offset

    def _take(self, record: Mapping[str, Any], place: _Place) -> None:
        """Notes where a line is."""
        job = (record["problem"], record["sample"])
        if "outcome" in record:
            self._outcomes[job] = (place, record["outcome"]["matching"])
        elif "forgotten" in record:
            self._outcomes.pop(job, None)
            for at in record["forgotten"]:
                self._calls[job].pop(tuple(at), None)
        else:
            made = Trajectory.from_json(record["trajectory"])
            call = _Call(place, made.status, made.has_answer)
            self._calls.setdefault(job, {})[made.round, made.index] = call


def _record(line: bytes) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        ValueError: it is none, or was changed since.
    """
    record = json.loads(line)
    signed = _DIGEST.search(line)
    if record.pop("digest", None) is not None:
        if signed is None or _digest(line[: signed.start()] + b"}") != signed[1]:
            raise ValueError("it was changed since it was written, as its digest tells")
    if record.keys() not in [{"problem", "sample", kind} for kind in ("trajectory", "outcome", "forgotten")]:
        raise ValueError(f"it has {', '.join(map(repr, record))}")
    return record


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


# An outcome's line: what was decided. Its trajectories have lines of their own; a reference that is a whole message of
# the round before is its index.

_OUTCOME_FIELDS = ("answered_by", "chosen", "seconds", "error", "correct")
_ROUND_FIELDS = ("is_final", "losses", "cut_references", "cut_answers")


def _round_json(round_: Round, sources: Sequence[Reference]) -> dict[str, Any]:
    whole = {each.index: each for each in sources}

    def listed(references: Sequence[Reference]) -> list[Any]:
        return [each.index if whole.get(each.index) == each else dataclasses.astuple(each) for each in references]

    return {
        **{name: getattr(round_, name) for name in ("width", *_ROUND_FIELDS)},
        "references": listed(round_.references),
        "own_references": [listed(each) for each in round_.own_references],
        "messages": [dataclasses.astuple(each) for each in round_.messages],
    }


def _round(
    number: int, fields: Mapping[str, Any], trajectories: Iterable[Trajectory], sources: Sequence[Reference]
) -> Round:
    whole = {each.index: each for each in sources}

    def listed(references: Sequence[Any]) -> tuple[Reference, ...]:
        return tuple(whole[each] if isinstance(each, int) else Reference(*each) for each in references)

    return Round(
        number=number,
        trajectories=tuple(trajectories),
        references=listed(fields["references"]),
        own_references=tuple(listed(each) for each in fields["own_references"]),
        messages=tuple(Reference(*each) for each in fields["messages"]),
        **{name: fields[name] for name in _ROUND_FIELDS},
    )


# The directory.


@contextlib.contextmanager
def open_journal(
    directory: Path, settings: Mapping[str, Any], free: Mapping[str, Any], problems: Sequence[Problem] = ()
) -> Iterator[Journal]:
    """The journal of a run, new or resumed; the directory is this process's until the block ends.

    Args:
        settings: what must be the same for the run to be resumed.
        free: what else is worth knowing of the run; may change.

    Raises:
        CheckpointError: another process writes there, the run there is another one, or its files cannot be used.
    """
    with locked(directory):
        _claim(directory, json.loads(json.dumps(settings)), free)
        with replacing(directory / PROBLEMS) as file:
            file.writelines(map(problem_line, problems))
        with contextlib.closing(Journal(directory / CALLS)) as journal:
            yield journal
            journal.sync()


def outcomes(directory: Path) -> Iterator[Outcome]:
    """What a run has come to so far, in the order of its results; one at a time is in memory. The run may be going on.

    Raises:
        CheckpointError: it is not the directory of a run, has no outcomes, or a file of it cannot be used.
    """
    try:
        samples = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))["samples"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not the directory of a run: give the --out of stepjax pacore run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / SETTINGS} cannot be read, or is of another version: {error!r}") from error
    with contextlib.closing(Journal(directory / CALLS, read_only=True)) as journal:
        if not journal.answered():
            hint = "; rerun the command of an older version's run: nothing is drawn again" if journal.num_known else ""
            raise CheckpointError(f"{directory} has no answers yet{hint}")
        for problem in saved_problems(directory / PROBLEMS):
            for sample in range(samples):
                outcome = journal.outcome(problem, sample)
                if outcome is not None:
                    yield outcome


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
                f"{directory} holds a run with other settings: {'; '.join(differences)}. Give those again to resume, "
                "or name another --out"
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
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` in one move when the block ends well.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
