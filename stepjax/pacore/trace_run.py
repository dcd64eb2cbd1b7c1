"""Outcomes of a batch run from its directory, for traces: the run once more, with its journal in place of a model.

What a round's prompt held follows from the trajectories and the settings, and where references were shortened or left
out for want of room, from the results. Where exactly the end of a thought begins that is passed on needs a tokenizer:
`notes` says so.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError, RecordError, StepjaxError
from stepjax.pacore.baselines import Method, answer
from stepjax.pacore.config import Limits, PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.events import Event, RoundEnded
from stepjax.pacore.journal import BAD_LINE, CALLS, SETTINGS, Job, read_line
from stepjax.pacore.problems import read_problems
from stepjax.pacore.records import Message, Outcome, Problem, Round, Trajectory
from stepjax.pacore.rounds import RoundFailedError
from stepjax.pacore.runner import RESULTS, SUMMARY
from stepjax.pacore.template import with_ends
from stepjax.pacore.trace_data import Failure
from stepjax.rollouts.sampler import PreparedPrompt, SamplerError


class TracedRun:
    """
    Attributes:
        summary: as the run last wrote it; empty where it has not.
        matching: how the run compares answers.

    Raises:
        CheckpointError: the directory is not that of a run, or has no answers yet.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        if not (directory / RESULTS).exists():
            there = "has no answers yet" if (directory / SETTINGS).exists() else "is not the directory of a run"
            raise CheckpointError(f"{directory} {there}: `stepjax pacore run` writes {RESULTS} to its --out")
        self._run = _read_json(directory / SETTINGS)
        self.summary = _read_json(directory / SUMMARY) if (directory / SUMMARY).exists() else {}
        self.matching = self.summary.get("matching", "math")
        try:
            settings = self._run["settings"]
            fields = {name: value for name, value in settings["config"].items() if name not in ("sampling", "template")}
            fields["schedule"] = tuple(fields["schedule"])
            # Without retries: what the journal lacks is not waited for.
            config = PacoreConfig(**fields, limits=Limits(retries=0))
            self._method = Method(**settings["method"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{directory / SETTINGS} is of another version: {error!r}") from error
        self._coordinator = Coordinator(_Recorded(), config, matching=self.matching)
        self._problems = self._asked()
        self._calls = _places(directory / CALLS)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of results.jsonl."""
        with open(self._directory / RESULTS, "rb") as file:
            for line in file:
                yield json.loads(line)

    def outcome(self, row: Mapping[str, Any]) -> Outcome | Failure:
        """
        Raises:
            CheckpointError: the journal does not have the calls of the row; it may be that they are drawn again.
        """
        problem, done = self._problem(row), self._trajectories((row["id"], row["sample"]))
        rounds = asyncio.run(self._replay(problem, row, done))
        known = {(each.round, each.index) for each in done}
        found = [[(each["seed"], each["status"]) for each in responses] for responses in row["round_responses"]]
        if [[(each.seed, each.status) for each in round_.trajectories] for round_ in rounds] != found or not all(
            (each.round, each.index) in known for round_ in rounds for each in round_.trajectories
        ):
            raise CheckpointError(f"problem {row['id']!r}: {CALLS} does not have the calls that {RESULTS} speaks of")
        seconds = max((each.start + each.seconds for each in done), default=0.0)
        if row["error"] is not None:
            return Failure(
                problem=problem, sample=row["sample"], rounds=rounds, error=row["error"], seconds=seconds or None
            )
        round_, index = row["chosen"]
        return Outcome(
            problem=problem,
            sample=row["sample"],
            content=row["final_response"],
            reasoning=row["final_reasoning_content"],
            tool_calls=tuple(row.get("final_tool_calls", ())),
            finish_reason=next(each.finish_reason for each in rounds[round_].trajectories if each.index == index),
            answered_by=row["answered_by"],
            chosen=(round_, index),
            rounds=rounds,
            seconds=seconds,
        )

    def notes(self) -> list[str]:
        """What traces do not show."""
        if self._coordinator.config.truncated == "tail":
            return ["Where the end of a thought that was cut off is passed on, its beginning is not exact here."]
        return []

    async def _replay(self, problem: Problem, row: Mapping[str, Any], done: Sequence[Trajectory]) -> tuple[Round, ...]:
        rounds: list[Round] = []

        def notify(event: Event) -> None:
            if isinstance(event, RoundEnded):
                rounds.append(event.round)

        # It may go on where the run ended: by agreement, or at a prompt that was too long.
        with contextlib.suppress(StepjaxError, RoundFailedError):
            await answer(self._coordinator, problem, self._method, sample=row["sample"], done=done, notify=notify)
        counted = zip(rounds, row["losses"], row["cut_references"], row["cut_answers"], strict=False)
        made: list[Round] = []
        for round_, losses, references, answers in counted:
            seen = _seen(row["references"][round_.number], made[-1].messages if made else _given(problem), round_)
            made.append(
                dataclasses.replace(round_, losses=losses, cut_references=references, cut_answers=answers, **seen)
            )
        return tuple(made)

    def _trajectories(self, job: Job) -> list[Trajectory]:
        made = []
        with open(self._directory / CALLS, "rb") as file:
            for offset in self._calls.get(job, {}).values():
                file.seek(offset)
                try:
                    made.append(Trajectory.from_json(read_line(file.readline())["trajectory"]))
                except BAD_LINE as error:
                    raise CheckpointError(
                        f"problem {job[0]!r}: {CALLS} holds what is no trajectory ({error})"
                    ) from error
        return made

    def _problem(self, row: Mapping[str, Any]) -> Problem:
        asked = self._problems.get(row["id"])
        return asked if asked is not None else Problem(
            id=row["id"],
            messages=tuple(row["conversation"]),
            tools=tuple(row.get("tools", ())),
            ground_truth=row["ground_truth"],
            extra=row.get("extra", {}),
        )  # fmt: skip

    def _asked(self) -> dict[str, Problem]:
        """From the run's own file, where it is still there and the same: it has the messages that were given."""
        try:
            file, expected = self._run["problems_file"], self._run["settings"]["problems"]
            for use_responses in (False, True):
                with contextlib.suppress(RecordError):
                    found = read_problems(file, use_responses=use_responses, limit=expected["count"])
                    if found.digest == expected["sha256"]:
                        return {problem.id: problem for problem in found.problems}
        except (KeyError, TypeError):
            pass
        return {}


class _Recorded:
    """A sampler that has nothing to add to the journal."""

    max_context = None

    class tokens:
        """A token is taken for four characters."""

        @staticmethod
        def count(text: str) -> int:
            return len(text) // 4

        @staticmethod
        def tail(text: str, count: int) -> str:
            return text[-4 * count :]

    @contextlib.asynccontextmanager
    async def prompt(self, messages, tools, *, answer_tokens):
        yield PreparedPrompt(None, None)

    async def sample(self, prompt, params, listener):
        raise SamplerError("it is not in the journal", is_temporary=False)


def _given(problem: Problem) -> list[Message]:
    return [Message(i, text) for i, text in enumerate(problem.responses)]


def _seen(listed: Sequence[Sequence[Any]], sources: Sequence[Message], round_: Round) -> dict[str, Any]:
    """A round's references as its prompts held them; see `results.row`. Without their sources they stay as they are."""
    by_index = {message.index: message for message in sources}
    if any(index not in by_index for references in listed for index, _ in references):
        return {}

    def shown(index: int, kept: int | None) -> Message:
        whole = by_index[index]
        return whole if kept is None else with_ends(whole, whole.text[-kept:] if kept else "")

    seen = tuple(tuple(shown(index, kept) for index, kept in references) for references in listed)
    return {"references": seen[0], "own_references": seen if round_.own_references else ()}


def _places(path: Path) -> dict[Job, dict[tuple[int, int], int]]:
    """Where the journal's trajectories are. It may be in use: nothing is repaired, and what is half-written is left."""
    places: dict[Job, dict[tuple[int, int], int]] = {}
    offset = number = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    break
                record = read_line(line)
                there = places.setdefault((record["problem"], record["sample"]), {})
                if "forgotten" in record:
                    for at in record["forgotten"]:
                        there.pop(tuple(at), None)
                else:
                    there[record["trajectory"]["round"], record["trajectory"]["index"]] = offset
                offset += len(line)
    except (OSError, *BAD_LINE) as error:
        raise CheckpointError(f"{path}, line {number}, cannot be read: {error!r}") from error
    return places


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not what `stepjax pacore run` writes")
    return value
