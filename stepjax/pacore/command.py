"""`stepjax pacore run` and `stepjax pacore trace`."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Any

import tyro

from stepjax.errors import CheckpointError, ConfigError
from stepjax.figures import log_to_stderr, printable
from stepjax.inference.config import EngineConfig
from stepjax.inference.request import EngineFailedError
from stepjax.interop.engines import EngineArguments, load_engines
from stepjax.pacore.answers import Matching
from stepjax.pacore.batch import RESULTS, SUMMARY, BatchConfig, BatchRun
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.journal import CALLS, Journal, open_journal, outcomes
from stepjax.pacore.problems import ProblemSet, read_problems
from stepjax.pacore.results import table
from stepjax.pacore.trace import page_name, table_entry, write_table, write_trace
from stepjax.processing.synthesis import Template
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.rollouts.sampler import Sampler, SamplerError

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# All calls of all problems in progress may wait in the engine's queue.
_LOCAL = EngineArguments(engine=EngineConfig(max_waiting=65_536))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreRun:
    """Answer a file of problems with PaCoRe or a baseline.

    Everything is kept in --out: after an interruption, rerun the same command to resume. Give either --model or
    --upstream.url.
    """

    # A .jsonl file, or a .json file with a list: messages (or conversation, or problem), id, ground_truth, responses.
    problems: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROBLEMS")]
    out: Path  # the run's directory
    limit: int | None = None  # use only the first N problems
    use_responses: bool = False  # show the problem's `responses` to the first round
    retry_failed: bool = False  # redraw trajectories that failed before
    model: str | None = None  # a Hugging Face directory, a converted checkpoint or a training run
    # Reason first, or answer at once; None: the model's default. An upstream gets it in chat_template_kwargs.
    thinking: bool | None = None
    matching: Matching = "math"  # how answers are compared for scores, votes and agreement
    batch: Annotated[BatchConfig, tyro.conf.arg(name="")] = BatchConfig()
    config: Annotated[PacoreConfig, tyro.conf.arg(name="")] = PacoreConfig()
    local: Annotated[EngineArguments, tyro.conf.arg(name="")] = _LOCAL
    upstream: EndpointConfig = EndpointConfig()  # an OpenAI-compatible endpoint instead of --model

    def run(self) -> int:
        """Returns the exit status: 0 success, 1 all problems failed, 70 engine failure, 130 or 143 stopped by a signal.

        Raises:
            StepjaxError: an option, the file or the model cannot be used, or the directory belongs to another run.
        """
        self._check()
        log_to_stderr(logging.WARNING, "%(levelname)s %(name)s: %(message)s")  # clients log each request
        problems = read_problems(self.problems, use_responses=self.use_responses, limit=self.limit)
        for note in problems.notes:
            _say(f"note: {note}")
        config = self.batch.method.configured(self.config)
        free = {"upstream": self.upstream.url, "problems_file": str(self.problems), "samples": self.batch.samples}
        try:
            endpoint = self._endpoint() if self.model is None else None
            settings = self._settings(config, problems, endpoint)
            # Before the model is loaded, which takes minutes.
            with open_journal(self.out, settings, free, problems.problems) as journal:
                if self.retry_failed:
                    _say(f"redrawing {journal.forget_failed()} trajectories")
                elif journal.num_known:
                    _say(f"resuming {self.out} from {journal.num_known} trajectories")
                if journal.num_unsigned:
                    lines = f"{journal.num_unsigned} lines of {CALLS}"
                    _say(f"note: {lines} are from an older version and have no digest: edits to them go unnoticed")
                sampler = self._engine_sampler() if endpoint is None else EndpointSampler(endpoint)
                return asyncio.run(self._answer(config, problems, journal, sampler))
        except KeyboardInterrupt:  # while loading the model, or the second one
            _say("\nStopped. Rerun the same command to resume.")
            return 130

    def _check(self) -> None:
        if (self.model is None) == (self.upstream.url is None):
            given = "neither" if self.model is None else "both"
            raise ConfigError(f"{given} of --model and --upstream.url given: give exactly one")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: must be at least 1")
        self.local.check()
        if self.model is None:
            useless, there = _changed(self.local, _LOCAL, "--"), "--upstream.url"
        else:
            useless, there = _changed(self.upstream, EndpointConfig(), "--upstream."), "--model"
        if useless:
            raise ConfigError(f"{', '.join(useless)}: no effect with {there}; leave it out")
        widest = self.batch.method.widest or max((1, *self.config.schedule))
        most = widest * min(self.batch.concurrent_problems, self.limit or self.batch.concurrent_problems)
        if self.model is not None and most > self.local.engine.max_waiting:
            raise ConfigError(
                f"--engine.max-waiting {self.local.engine.max_waiting}: {self.batch.concurrent_problems} concurrent "
                f"problems may queue {most} calls; raise it, or lower --concurrent-problems"
            )

    def _endpoint(self) -> EndpointConfig:
        """The upstream, with its model's name."""
        endpoint = self.upstream
        if self.thinking is not None:
            kwargs = {**endpoint.body.get("chat_template_kwargs", {}), "enable_thinking": self.thinking}
            endpoint = dataclasses.replace(endpoint, body={**endpoint.body, "chat_template_kwargs": kwargs})

        async def name() -> str:
            async with EndpointSampler(endpoint) as sampler:
                return await sampler.model()

        try:
            return endpoint if endpoint.model else dataclasses.replace(endpoint, model=asyncio.run(name()))
        except SamplerError as error:
            raise ConfigError(f"--upstream.url {endpoint.url}: {error}") from error

    def _settings(self, config: PacoreConfig, problems: ProblemSet, endpoint: EndpointConfig | None) -> dict[str, Any]:
        """The settings that must match to resume a run. Limits, concurrency and the upstream's URL may change."""
        fields = {**dataclasses.asdict(config), "seed": config.seed}
        fields["sampling"]["seed"] = None
        del fields["limits"]
        template = Template(config.template, config.images)  # raises if it is invalid
        if config.template is not None:
            fields["template"] = hashlib.sha256(template.text.encode()).hexdigest()
        if endpoint is not None:
            sampler = {"model": endpoint.model, "body": endpoint.body, "sends_seed": endpoint.sends_seed}
        else:
            assert self.model is not None
            path = self.model if "://" in self.model else str(Path(self.model).expanduser().resolve())
            local = {"dtype": self.local.dtype, "yarn_factor": self.local.yarn_factor}
            sampler = {"model": path, **local, "thinking": self.thinking}
        return {
            "version": 1,
            "method": self.batch.method.settings(),
            "config": fields,
            "problems": {"count": len(problems.problems), "sha256": problems.digest},
            "sampler": sampler,
        }

    def _engine_sampler(self) -> AbstractAsyncContextManager[Sampler]:
        _say(f"loading {self.model}")
        engines, processor = load_engines(str(self.model), self.local)

        @contextlib.asynccontextmanager
        async def running() -> AsyncIterator[Sampler]:
            from stepjax.inference.replicas import AsyncReplicas
            from stepjax.rollouts.engine import EngineSampler

            async with AsyncReplicas(engines) as engine:
                yield EngineSampler(engine, processor, enable_thinking=self.thinking)

        return running()

    async def _answer(
        self,
        config: PacoreConfig,
        problems: ProblemSet,
        journal: Journal,
        sampler: AbstractAsyncContextManager[Sampler],
    ) -> int:
        task, stopped_by = asyncio.current_task(), list[signal.Signals]()
        assert task is not None
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            stopped_by.append(number)
            for each in _STATUS:  # a second signal kills the process
                loop.remove_signal_handler(each)
            task.cancel()

        for each in _STATUS:
            loop.add_signal_handler(each, stop, each)
        try:
            async with sampler as opened:
                coordinator = Coordinator(opened, config, matching=self.matching)
                summary = await BatchRun(coordinator, problems.problems, self.batch, journal, self.out).run()
        except asyncio.CancelledError:
            if not stopped_by:
                raise
            task.uncancel()
            _say(f"Stopped. Rerun the same command to resume from {self.out}.")
            return _STATUS[stopped_by[0]]
        except EngineFailedError as error:
            _say(f"stepjax pacore run: {error}; rerun the same command to resume")
            return error.exit_status
        print(f"{printable(table(summary))}\n\nanswers in {self.out / RESULTS}")
        if summary["failed"]:
            _say(f"{summary['failed']} answers failed; add --retry-failed to redraw them")
        return 1 if summary["failed"] == summary["answers"] else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreTrace:
    """Make an HTML page for every answer of a PaCoRe run: rounds, trajectories, references, tokens and time.

    Pages need no server and no network. The run may still be in progress.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # --out of `stepjax pacore run`
    problem: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="ID")
    ] = ()  # only this problem
    out: Path | None = None  # directory for the pages; default: DIR/traces
    reasoning: bool = True  # include the reasoning; it makes up most of a page

    def run(self) -> int:
        """
        Raises:
            CheckpointError: the directory is not a run, or a page cannot be written.
            ConfigError: the run has no answer for a given problem id.
        """
        directory = self.directory.expanduser()
        out = directory / "traces" if self.out is None else self.out.expanduser()
        summary = _summary(directory / SUMMARY)
        matching, entries, wanted = summary.get("matching", "math"), [], set(self.problem)
        for of in outcomes(directory):
            if self.problem and of.problem.id not in self.problem:
                continue
            wanted.discard(of.problem.id)
            name = page_name(of.problem.id, of.sample)
            has_short_answers = matching == "math" and of.problem.ground_truth is not None
            write_trace(of, out / name, matching="math" if has_short_answers else None, reasoning=self.reasoning)
            entries.append(table_entry(of, name, matching))
        if wanted:
            raise ConfigError(f"--problem {min(wanted)}: {directory} has no answer to a problem with that id")
        if self.problem:
            print("\n".join(str(out / each["page"]) for each in entries))
        else:
            write_table(entries, out / "index.html", title=directory.resolve().name, method=summary.get("method"))
            print(f"{len(entries)} pages, and a table of them in {out / 'index.html'}")
        return 0


def _summary(path: Path) -> dict[str, Any]:
    """The run's summary; empty if there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _changed(given: Any, usual: Any, prefix: str) -> list[str]:
    """The options of a group that differ from their defaults."""
    names = [field.name for field in dataclasses.fields(given)]
    return [f"{prefix}{name.replace('_', '-')}" for name in names if getattr(given, name) != getattr(usual, name)]
