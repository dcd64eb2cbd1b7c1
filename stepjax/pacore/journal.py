"""A run's directory. Results and traces are built from the journal, and nothing is drawn twice.

    DIR/run.json        the settings that must match to resume the run
    DIR/problems.jsonl  the problems as read, with the paths of their images
    DIR/calls.jsonl     the journal; each line ends with its digest
        {"problem": id, "sample": s, "trajectory": {...}}                       a call ended
        {"problem": id, "sample": s, "outcome": {...}}                          the problem was answered or failed
        {"problem": id, "sample": s, "forgotten": [[round, index], ...]}        to be drawn again
    DIR/lock            held while a process writes here

A trajectory is written when it ends, before the rest of the process sees it, and is synced to disk before the next
round, which depends on it, starts. A kill can cut off only the last line; it is then removed and its trajectory drawn
again. Errors name a modified line. Memory holds the positions of lines, not their content.
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
_Place = tuple[int, int]  # a line's offset and length in the file


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    place: _Place
    status: str
    has_answer: bool


class Journal:
    """
    Attributes:
        num_known: trajectories found when it was opened.
        num_unsigned: lines without a digest, from an older version.

    Raises:
        CheckpointError: it cannot be read, or a line was modified.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        """
        Args:
            read_only: another process may be writing, so an incomplete last line is left alone.
        """
        self._path, self._read_only = path, read_only
        try:
            self._file = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        self._calls: dict[Job, dict[tuple[int, int], _Call]] = {}
        self._outcomes: dict[Job, tuple[_Place, str]] = {}  # the line, and its matching
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
            matching: how answers were compared.

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
        """Flushes appended lines to disk."""
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
        """The saved outcome; None if there is none yet or (logged) if calls it refers to are missing. Another thread
        may append meanwhile.

        Args:
            matching: return only an outcome decided with this matching.
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
            _log.warning("problem %r: %s lacks calls that its outcome refers to: %s", problem.id, self._path, error)
            return None
        chosen = None if fields["chosen"] is None else tuple(fields["chosen"])
        given = {name: fields[name] for name in _OUTCOME_FIELDS}
        return Outcome(problem=problem, sample=sample, **{**given, "chosen": chosen, "rounds": tuple(rounds)})

    def forget_failed(self) -> int:
        """Marks failed trajectories to be drawn again; returns how many.

        Later rounds of their problems depend on them and are forgotten too, as is a last round without any answer.
        `cancelled` calls did not fail.
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
        """Indexes the lines and truncates an incomplete last one; returns the end offset."""
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
        """Adds a line to the index."""
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
    """Parses a record and checks its digest.

    Raises:
        ValueError: the line is not a record, or was modified.
    """
    record = json.loads(line)
    signed = _DIGEST.search(line)
    if record.pop("digest", None) is not None:
        if signed is None or _digest(line[: signed.start()] + b"}") != signed[1]:
            raise ValueError("modified: its digest does not match")
    if record.keys() not in [{"problem", "sample", kind} for kind in ("trajectory", "outcome", "forgotten")]:
        raise ValueError(f"unexpected fields {', '.join(map(repr, record))}")
    return record


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


# An outcome's line holds the decision only; its trajectories have their own lines. A reference that is a whole message
# of the previous round is stored as its index.

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
    """The journal of a new or resumed run; the directory is locked until the block exits.

    Args:
        settings: must match to resume the run.
        free: further facts about the run, which may change.

    Raises:
        CheckpointError: another process writes there, the directory has another run, or its files cannot be used.
    """
    with locked(directory):
        _claim(directory, json.loads(json.dumps(settings)), free)
        with replacing(directory / PROBLEMS) as file:
            file.writelines(map(problem_line, problems))
        with contextlib.closing(Journal(directory / CALLS)) as journal:
            yield journal
            journal.sync()


def outcomes(directory: Path) -> Iterator[Outcome]:
    """Yields a run's outcomes so far, in the order of its results, one in memory at a time. The run may be in progress.

    Raises:
        CheckpointError: the directory is not a run, has no outcomes, or has a file that cannot be used.
    """
    try:
        samples = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))["samples"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a run: give the --out of stepjax pacore run") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / SETTINGS} cannot be read, or is of another version: {error!r}") from error
    with contextlib.closing(Journal(directory / CALLS, read_only=True)) as journal:
        if not journal.answered():
            hint = (
                "; if an older version made it, rerun its command: nothing is drawn again" if journal.num_known else ""
            )
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
                f"{directory} has a run with other settings: {'; '.join(differences)}. Use the old ones to resume, or "
                "choose another --out"
            )
    elif (directory / CALLS).exists():
        raise CheckpointError(f"{directory} has a {CALLS} without its {SETTINGS}: restore it, or name another --out")
    write_json(path, {"settings": settings, **free})


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(key for key in here if key not in there)]
        inner = ((f"{name}.{key}" if name else key, there.get(key), here.get(key)) for key in names)
        return [each for key, a, b in inner for each in _differences(a, b, key)]
    return [] if there == here else [f"{name} was {there!r}, now {here!r}"]


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that atomically replaces `path` when the block succeeds.

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
