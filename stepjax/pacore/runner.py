"""A batch run: many problems, some at a time, journaled as they go; what is there already is not drawn again.

Rounds of different problems overlap, so that the engine is busy while one of them waits for its slowest trajectory or
for its final call. A problem that fails becomes a row that says so, and stops no other.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError, ConfigError, StepjaxError
from stepjax.inference.request import EngineFailedError
from stepjax.pacore.answers import in_thread
from stepjax.pacore.baselines import Method, answer
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.events import Event, RoundEnded, RoundStarted, TrajectoryEnded
from stepjax.pacore.journal import Journal, write_json
from stepjax.pacore.progress import Progress
from stepjax.pacore.records import Problem, Round
from stepjax.pacore.results import Rows, row, to_line
from stepjax.pacore.rounds import RoundFailedError
from stepjax.pacore.summary import Figures, summarise
from stepjax.pacore.timing import Timing

RESULTS, SUMMARY = "results.jsonl", "summary.json"

_REFRESH_SECONDS = 10.0
_REFRESH_SHARE = 0.05  # of the time, at the most, goes into refreshing the files

_log = logging.getLogger("stepjax.pacore")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """
    Raises:
        ConfigError: a value is out of range.
    """

    method: Method = Method()
    samples: int = 1  # independent answers to each problem
    concurrent_problems: int = 64  # problems (and samples of them) under way

    def __post_init__(self):
        for name in ("samples", "concurrent_problems"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


class BatchRun:
    def __init__(
        self,
        coordinator: Coordinator,
        problems: Sequence[Problem],
        config: BatchConfig,
        journal: Journal,
        directory: Path,
        progress: Progress,
    ):
        """
        Args:
            coordinator: of a configuration that the method has seen; see `Method.configured`.
            journal: of this directory.

        Raises:
            ConfigError: the method needs answers that problems do not have.
        """
        unknown = [problem.id for problem in problems if problem.ground_truth is None]
        if config.method.needs_truth and unknown:
            raise ConfigError(f"problem {unknown[0]!r} has no ground_truth: the scorer ground-truth needs it")
        self._coordinator, self._problems, self._config = coordinator, problems, config
        self._journal, self._directory, self._progress = journal, directory, progress
        self._rows, self._figures = Rows(directory), list[Figures]()
        self._timing = Timing(directory)
        self._answers_before = _num_answers(directory / SUMMARY)

    async def run(self) -> dict[str, Any]:
        """Answers all; returns the summary. When cancelled, it leaves what it has, and the journal.

        Raises:
            CheckpointError: the directory cannot be written.
            EngineFailedError: the local engine failed; nothing is journaled of what it broke off.
        """
        jobs = iter([(place, sample) for place in range(len(self._problems)) for sample in range(self._config.samples)])
        with contextlib.closing(self._rows), contextlib.closing(self._progress):
            helpers = [asyncio.create_task(self._refresh()), asyncio.create_task(self._tell())]
            workers = [asyncio.create_task(self._work(jobs)) for _ in range(self._config.concurrent_problems)]
            is_complete = False
            try:
                await _all(workers, helpers)
                is_complete = True
            finally:
                for task in (*workers, *helpers):
                    task.cancel()
                await asyncio.gather(*workers, *helpers, return_exceptions=True)
                if is_complete or self._has_more:
                    self._save()
            return self._summary()

    async def _work(self, jobs: Iterator[tuple[int, int]]) -> None:
        for place, sample in jobs:
            await self._answer(place, sample)

    async def _answer(self, place: int, sample: int) -> None:
        problem, matching = self._problems[place], self._coordinator.matching
        job = (problem.id, sample)
        done = self._journal.done(job)
        rounds: list[Round] = []
        is_new = False

        def notify(event: Event) -> None:
            nonlocal is_new
            known = 0
            if isinstance(event, TrajectoryEnded):
                is_new = True
                self._journal.append(job, event.trajectory)
                self._timing.drew(event.trajectory.output_tokens)
            elif isinstance(event, RoundEnded):
                self._journal.sync()
                rounds.append(event.round)
            elif isinstance(event, RoundStarted):
                known = sum(each.round == event.number for each in done)
            self._progress.notify(job, event, known)

        outcome = error = None
        try:
            outcome = await answer(
                self._coordinator, problem, self._config.method, sample=sample, done=done, notify=notify
            )
        except (CheckpointError, EngineFailedError):  # the journal's, or the model's: there is no going on
            raise
        except (StepjaxError, RoundFailedError) as failure:
            error = str(failure)
        except Exception as failure:
            _log.exception("problem %r, sample %d failed unexpectedly", problem.id, sample)
            error = f"{type(failure).__name__}: {failure}"
        made = await in_thread(row, problem, sample, rounds, outcome, error, matching)
        self._rows.add((place, sample), to_line(made))
        self._figures.append(Figures.of(place, made))
        self._timing.answered(rounds)
        self._progress.answered(job, made["correct"], is_failed=error is not None, is_new=is_new)

    async def _refresh(self) -> None:
        """Leaves results that can be used if the process is killed."""
        pause, saved = _REFRESH_SECONDS, 0
        while True:
            await asyncio.sleep(pause)
            if len(self._rows) > saved and self._has_more:
                begin, saved = time.monotonic(), len(self._rows)
                summary = self._summary()
                await asyncio.to_thread(self._rows.save, self._directory / RESULTS)
                write_json(self._directory / SUMMARY, summary)
                self._timing.save()
                pause = max(_REFRESH_SECONDS, (time.monotonic() - begin) / _REFRESH_SHARE)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(self._progress.seconds)
            self._progress.tick()

    @property
    def _has_more(self) -> bool:
        """At least as many answers as an earlier process has left, and not only the first ones of its journal."""
        return len(self._rows) >= self._answers_before

    def _save(self) -> None:
        self._rows.save(self._directory / RESULTS)
        write_json(self._directory / SUMMARY, self._summary())
        self._timing.save()

    def _summary(self) -> dict[str, Any]:
        return summarise(
            self._figures,
            method=self._config.method.label(self._coordinator.config),
            num_problems=len(self._problems),
            samples=self._config.samples,
            matching=self._coordinator.matching,
        )


def _num_answers(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["answers"])
    except (OSError, ValueError, KeyError, TypeError):  # there is none yet
        return 0


async def _all(workers: Sequence[asyncio.Task[None]], helpers: Sequence[asyncio.Task[None]]) -> None:
    """Waits for the workers; the first failure of any task is raised."""
    pending = {*workers, *helpers}
    while not all(worker.done() for worker in workers):
        finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            task.result()
