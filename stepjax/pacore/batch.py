"""A batch run: many problems, several at a time, journaled as they go. Nothing in the journal is drawn again.

Rounds of different problems overlap, which keeps the engine busy while one problem waits for its slowest trajectory or
its final call. A problem that fails gets a row with its error and does not stop the others.
"""

import asyncio
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from stepjax.errors import CheckpointError, ConfigError, StepjaxError, require_positive
from stepjax.figures import human_number
from stepjax.inference.request import EngineFailedError
from stepjax.pacore.answers import in_thread, judge
from stepjax.pacore.baselines import Method, answer
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.journal import Journal, replacing, write_json
from stepjax.pacore.problems import json_line
from stepjax.pacore.records import Event, Outcome, Problem, Round, RoundEnded, RoundStarted, TrajectoryEnded
from stepjax.pacore.results import Tally, row
from stepjax.progress import progress

RESULTS, SUMMARY, TIMING = "results.jsonl", "summary.json", "timing.json"

_REFRESH_SECONDS = 10.0
_REFRESH_SHARE = 0.05  # largest share of the time spent on refreshing the files

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """
    Raises:
        ConfigError: a value is out of range.
    """

    method: Annotated[Method, tyro.conf.arg(name="")] = Method()
    samples: int = 1  # independent answers per problem; the summary reports mean@n
    concurrent_problems: int = 64  # in progress at a time, so that their rounds overlap

    def __post_init__(self):
        require_positive("", self, "samples", "concurrent_problems")


class BatchRun:
    def __init__(
        self,
        coordinator: Coordinator,
        problems: Sequence[Problem],
        config: BatchConfig,
        journal: Journal,
        directory: Path,
    ):
        """
        Args:
            coordinator: its configuration comes from `Method.configured`.
            journal: the directory's.

        Raises:
            ConfigError: the method needs ground truth that a problem lacks.
        """
        unknown = [problem.id for problem in problems if problem.ground_truth is None]
        if config.method.needs_truth and unknown:
            raise ConfigError(f"problem {unknown[0]!r} has no ground_truth: the scorer ground-truth needs it")
        self._coordinator, self._problems, self._config = coordinator, problems, config
        self._journal, self._directory = journal, directory
        self._begin = time.monotonic()
        self._seconds_before = float(_field(directory / TIMING, "seconds") or 0)
        self._answers_before = int(_field(directory / SUMMARY, "answers") or 0)
        self._saving = threading.Lock()  # a refresh may still be writing at the end
        self._num_calls = self._num_tokens = self._num_right = self._num_scored = self._num_failed = 0
        self._jobs = [(problem, sample) for problem in problems for sample in range(config.samples)]
        self._progress = progress(len(self._jobs), unit="answer", description="pacore run")

    async def run(self) -> dict[str, Any]:
        """Answers all problems and returns the summary. Cancelling still saves the results so far.

        Raises:
            CheckpointError: the directory cannot be written.
            EngineFailedError: the local engine failed; interrupted calls are not journaled.
        """
        jobs = iter(self._jobs)
        with self._progress:
            refreshing = asyncio.create_task(self._refresh())
            workers = [asyncio.create_task(self._work(jobs)) for _ in range(self._config.concurrent_problems)]
            tasks = {refreshing, *workers}
            try:
                while not all(worker.done() for worker in workers):
                    pending = {task for task in tasks if not task.done()}
                    for task in (await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))[0]:
                        task.result()  # the first failure of any task is raised
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                summary = self._save()
            return summary

    async def _work(self, jobs: Iterator[tuple[Problem, int]]) -> None:
        for problem, sample in jobs:
            await self._answer(problem, sample)

    async def _answer(self, problem: Problem, sample: int) -> None:
        # Keep a saved outcome unless it failed or was chosen by the ground truth, which may have changed.
        matching = self._coordinator.matching
        saved = self._journal.outcome(problem, sample, matching=matching)
        if saved is None or saved.error is not None or self._config.method.needs_truth:
            outcome = await self._solve(problem, sample)
        else:
            outcome = saved
        correct = None
        if problem.ground_truth is not None:  # a failed problem counts as wrong
            correct = await in_thread(judge, outcome.content, problem.ground_truth, matching)
        outcome = dataclasses.replace(outcome, correct=correct)
        if outcome != saved:
            self._journal.append_outcome(outcome, matching)
        self._num_failed += outcome.error is not None
        self._num_scored += correct is not None
        self._num_right += bool(correct)
        self._tell(1)

    async def _solve(self, problem: Problem, sample: int) -> Outcome:
        """The outcome, also if the problem failed."""
        job, rounds, under_way = (problem.id, sample), list[Round](), 0
        done = self._journal.done(job)

        def notify(event: Event) -> None:
            nonlocal under_way
            if isinstance(event, RoundStarted):
                under_way = event.width - sum(each.round == event.number for each in done)
                self._num_calls += under_way
            elif isinstance(event, TrajectoryEnded):
                self._journal.append(job, event.trajectory)
                under_way -= 1
                self._num_calls -= 1
                self._num_tokens += event.trajectory.rollout.num_tokens
            elif isinstance(event, RoundEnded):
                self._journal.sync()
                rounds.append(event.round)
            self._tell()

        try:
            return await answer(
                self._coordinator, problem, self._config.method, sample=sample, done=done, notify=notify
            )
        except (CheckpointError, EngineFailedError):  # the journal or the engine failed: no other problem can succeed
            raise
        except (StepjaxError, RoundFailedError) as failure:
            error = str(failure)
        except Exception as failure:
            _log.exception("problem %r, sample %d failed unexpectedly", problem.id, sample)
            error = f"{type(failure).__name__}: {failure}"
        finally:
            self._num_calls -= under_way
        ends = (each.rollout.start + each.rollout.seconds for round_ in rounds for each in round_.trajectories)
        return Outcome(
            problem=problem, sample=sample, rounds=tuple(rounds), seconds=max(ends, default=0.0), error=error
        )

    def _tell(self, num_answers: int = 0) -> None:
        note = f"{self._num_calls} calls in progress, {human_number(self._num_tokens)} tok"
        if self._num_scored:
            note = f"{100 * self._num_right / self._num_scored:.1f}% right, {note}"
        if self._num_failed:
            note += f", {self._num_failed} failed"
        self._progress.update(num_answers, note)

    async def _refresh(self) -> None:
        """Saves usable results regularly, in case the process is killed."""
        pause, saved = _REFRESH_SECONDS, 0
        while True:
            await asyncio.sleep(pause)
            if self._progress.n > saved:
                begin, saved = time.monotonic(), self._progress.n
                await asyncio.to_thread(self._save)
                pause = max(_REFRESH_SECONDS, (time.monotonic() - begin) / _REFRESH_SHARE)

    def _save(self) -> dict[str, Any]:
        """Writes results, summary and timing from the journal; returns the summary.

        Fewer answers never replace more: a resumed run of an older version starts with fewer.
        """
        known = set(self._journal.answered())  # a copy: another thread may be appending
        answered = [(problem, sample) for problem, sample in self._jobs if (problem.id, sample) in known]
        if len(answered) < min(len(self._jobs), self._answers_before):
            return {}
        tally = Tally()
        with self._saving:
            with replacing(self._directory / RESULTS) as file:
                for problem, sample in answered:
                    outcome = self._journal.outcome(problem, sample)
                    if outcome is not None:
                        file.write(json_line(row(outcome)))
                        tally.add(outcome)
            summary = tally.summary(
                method=self._config.method.label(self._coordinator.config),
                num_problems=len(self._problems),
                samples=self._config.samples,
                matching=self._coordinator.matching,
            )
            write_json(self._directory / SUMMARY, summary)
            write_json(self._directory / TIMING, tally.timing(self._seconds_before + time.monotonic() - self._begin))
        return summary


def _field(path: Path, name: str) -> Any:
    """A field of an earlier process's JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
