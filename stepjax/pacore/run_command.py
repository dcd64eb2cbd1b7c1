"""`stepjax pacore run`: a batch run from its arguments to the summary."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from stepjax.errors import ConfigError
from stepjax.figures import log_to_stderr, printable
from stepjax.inference.request import EngineFailedError
from stepjax.interop.engines import load_engines
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.journal import CALLS, Journal, open_journal
from stepjax.pacore.problems import ProblemSet, read_problems
from stepjax.pacore.progress import Progress
from stepjax.pacore.run_arguments import RunArguments
from stepjax.pacore.runner import RESULTS, BatchConfig, BatchRun
from stepjax.pacore.summary import table
from stepjax.pacore.template import Template
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.rollouts.sampler import Sampler, SamplerError

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 well, 1 all problems failed, 70 the engine failed, 130 or 143 stopped by a signal.

    Raises:
        StepjaxError: an argument, the file or the model is not usable, or the directory holds another run.
    """
    args = tyro.cli(RunArguments, args=list(arguments), prog="stepjax pacore run")
    args.check()
    config, batch = args.config, args.batch
    log_to_stderr(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    problems = read_problems(args.problems, use_responses=args.use_responses, limit=args.limit)
    for note in problems.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    _check_queue(args, config, batch)
    free = {"upstream": args.upstream, "problems_file": str(args.problems), "samples": batch.samples}
    try:
        endpoint = _endpoint(args)
        settings = _settings(args, config, batch, problems, endpoint)
        # Before the model is loaded, which takes minutes.
        with open_journal(args.out, settings, free) as journal:
            if args.retry_failed:
                print(f"{journal.forget_failed()} trajectories will be drawn again", file=sys.stderr)
            elif journal.num_known:
                print(f"going on with {args.out}: {journal.num_known} trajectories are there", file=sys.stderr)
            if journal.num_unsigned:
                print(
                    f"note: {journal.num_unsigned} lines of {CALLS} are an older version's, without a digest: "
                    "were they changed, nothing would tell",
                    file=sys.stderr,
                )
            if endpoint is None:
                print(f"loading {args.model}", file=sys.stderr)
            made = load_engines(str(args.model), args.local) if endpoint is None else endpoint
            return asyncio.run(_run(args, config, batch, problems, journal, made))
    except KeyboardInterrupt:  # while the model was being loaded, or a second time
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130


def _check_queue(args: RunArguments, config: PacoreConfig, batch: BatchConfig) -> None:
    widest = batch.method.widest or max((1, *config.schedule))
    most = widest * min(batch.concurrent_problems, args.limit or batch.concurrent_problems)
    if args.model is not None and most > args.local.engine.max_waiting:
        raise ConfigError(
            f"--engine.max-waiting {args.local.engine.max_waiting}: {batch.concurrent_problems} problems at a time may "
            f"have {most} calls waiting; raise it, or lower --concurrent-problems"
        )


async def _run(
    args: RunArguments,
    config: PacoreConfig,
    batch: BatchConfig,
    problems: ProblemSet,
    journal: Journal,
    answering: EndpointConfig | tuple[list[Any], Any],
) -> int:
    task, stopped_by = asyncio.current_task(), list[signal.Signals]()
    assert task is not None
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        stopped_by.append(number)
        for each in _STATUS:  # a second one ends the process at once
            loop.remove_signal_handler(each)
        task.cancel()

    for each in _STATUS:
        loop.add_signal_handler(each, stop, each)
    try:
        async with _sampler(answering, args) as sampler:
            coordinator = Coordinator(sampler, config, matching=args.matching)
            progress = Progress(len(problems.problems) * batch.samples)
            summary = await BatchRun(coordinator, problems.problems, batch, journal, args.out, progress).run()
    except asyncio.CancelledError:
        if not stopped_by:
            raise
        task.uncancel()
        print(f"stopped; the same command goes on with {args.out}", file=sys.stderr)
        return _STATUS[stopped_by[0]]
    except EngineFailedError as error:
        print(f"stepjax pacore run: {printable(str(error))}; rerun the same command to resume", file=sys.stderr)
        return error.exit_status
    print(f"{printable(table(summary))}\n\nanswers in {args.out / RESULTS}")
    if summary["failed"]:
        print(f"{summary['failed']} answers failed; --retry-failed draws what failed again", file=sys.stderr)
    return 1 if summary["failed"] == summary["answers"] else 0


@contextlib.asynccontextmanager
async def _sampler(answering: EndpointConfig | tuple[list[Any], Any], args: RunArguments) -> AsyncIterator[Sampler]:
    if isinstance(answering, EndpointConfig):
        async with EndpointSampler(answering) as sampler:
            yield sampler
        return
    from stepjax.inference.replicas import AsyncReplicas
    from stepjax.rollouts.engine import EngineSampler

    engines, processor = answering
    async with AsyncReplicas(engines) as engine:
        yield EngineSampler(engine, processor, enable_thinking=args.thinking)


def _settings(
    args: RunArguments, config: PacoreConfig, batch: BatchConfig, problems: ProblemSet, endpoint: EndpointConfig | None
) -> dict[str, Any]:
    """What must be the same for a run to go on. Limits, how many go on at a time, and the upstream's URL may change."""
    fields = dataclasses.asdict(config)
    del fields["limits"]
    Template(config)  # refuses one that cannot be used
    if config.template is not None:
        fields["template"] = hashlib.sha256(Path(config.template).expanduser().read_bytes()).hexdigest()
    if endpoint is not None:
        sampler = {"model": endpoint.model, "body": endpoint.body, "sends_seed": endpoint.sends_seed}
    else:
        assert args.model is not None
        path = args.model if "://" in args.model else str(Path(args.model).expanduser().resolve())
        local = {"dtype": args.local.dtype, "yarn_factor": args.local.yarn_factor}
        sampler = {"model": path, **local, "thinking": args.thinking}
    return {
        "version": 1,
        "method": batch.method.settings(),
        "config": fields,
        "problems": {"count": len(problems.problems), "sha256": problems.digest},
        "sampler": sampler,
    }


def _endpoint(args: RunArguments) -> EndpointConfig | None:
    """The upstream, with the name of its model."""
    if args.upstream is None:
        return None
    body = _body(args.upstream_body)
    if args.thinking is not None:
        body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), "enable_thinking": args.thinking}
    endpoint = args.endpoint.endpoint(args.upstream, body=body)

    async def name() -> str:
        async with EndpointSampler(endpoint) as sampler:
            return await sampler.model()

    try:
        return endpoint if endpoint.model else dataclasses.replace(endpoint, model=asyncio.run(name()))
    except SamplerError as error:
        raise ConfigError(f"--upstream {args.upstream}: {error}") from error


def _body(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--upstream-body {text!r}: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise ConfigError(f"--upstream-body {text!r}: must be an object of JSON")
    return body
