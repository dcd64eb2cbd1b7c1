"""`stepjax pacore run`: its arguments, and a batch run from loading to the summary."""

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
from typing import Annotated, Any, Literal

import tyro

from stepjax.config import DType
from stepjax.errors import ConfigError
from stepjax.inference.config import EngineConfig
from stepjax.inference.request import SamplingParams
from stepjax.pacore.answers import Matching
from stepjax.pacore.baselines import Method, MethodName, ScorerName
from stepjax.pacore.config import Limits, PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.http_sampler import Endpoint, HttpSampler
from stepjax.pacore.journal import Journal, open_journal
from stepjax.pacore.problems import ProblemSet, read_problems
from stepjax.pacore.progress import Progress
from stepjax.pacore.runner import RESULTS, BatchConfig, BatchRun
from stepjax.pacore.sampler import Sampler, SamplerError
from stepjax.pacore.schedule import parse_schedule
from stepjax.pacore.summary import table
from stepjax.pacore.template import Template

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Answer the problems of a file by PaCoRe, or by a method that it is compared with.

    What is done is kept in --out: after an interruption the same command goes on.
    """

    # A .jsonl file, or a .json file with a list: messages (or conversation, or problem), id, ground_truth, responses.
    problems: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROBLEMS")]
    out: Path  # the run's directory
    limit: int | None = None  # take the first N problems alone
    use_responses: bool = False  # the first round sees the problem's `responses`
    retry_failed: bool = False  # draw again what failed in an earlier start of this run

    # Who answers: exactly one of these two.
    model: str | None = None  # a Hugging Face directory, a converted checkpoint, or a run
    upstream: str | None = None  # an OpenAI-compatible endpoint, such as http://localhost:8000/v1

    method: MethodName = "pacore"
    schedule: str = (
        "low"  # pacore: widths of the rounds before the final call, such as 32,4; or low, medium, high, none
    )
    width: int = 16  # majority, best-of-n: trajectories; sequential: rounds; rsa: population
    scorer: ScorerName = "mean-logprob"  # best-of-n; ground-truth is an oracle: pass@n
    references: int = 4  # rsa: how many members of the population a new one sees
    loops: int = 10  # rsa: populations, the first included
    samples: int = 1  # independent answers to each problem; the summary has mean@n
    matching: Matching = "math"  # when answers are the same, for scores, votes and agreement

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_tokens: int | None = None  # of a trajectory; by default as many as the context holds
    # Begin with a thought, or close it at once; the model's own way by default. For an upstream it is sent as
    # chat_template_kwargs.
    thinking: bool | None = None

    order: Literal["shuffle", "length"] = "shuffle"  # of references; length is the released code's
    truncated: Literal["drop", "tail"] = "drop"  # a thought that was cut off: dropped, or its end is passed on
    tail_tokens: int = 1000
    overflow: Literal["shorten", "drop", "fail"] = "shorten"  # references that do not fit the context
    answer_tokens: int = 1024  # that prompts leave room for where there is no --max-tokens
    images: Literal["before", "after"] = "before"  # where they stand beside the text of a synthesis
    template: Path | None = None  # a Jinja file in place of the built-in text
    fallback: bool = True  # when the final call gives nothing, the answer that most messages agree on stands in

    concurrent_problems: int = 64  # under way at a time, so that rounds of different ones overlap
    retries: int = 4  # of a call, after its first try
    backoff_seconds: float = 1.0  # before the first retry, doubled for each
    call_seconds: float | None = None  # for one try
    round_seconds: float | None = None  # after which a round goes on without its last calls, if it has the quorum
    quorum: float = 0.5  # share of a round that must have left a message by then
    agreement: float | None = None  # share of a round whose answers agree that ends a problem

    upstream_model: str | None = None  # by default the first that it lists
    tokenizer: str | None = None  # a tokenizer.json, to count with what references are fitted to
    max_context: int | None = None  # tokens of prompt and answer that the upstream takes; needs --tokenizer
    max_concurrent: int = 256  # calls of the upstream under way
    stream: bool = True  # ask the upstream for streams, which show a dead connection
    send_seed: bool = True
    opens_thought: bool | None = None  # the upstream's template opens <think>, and its content keeps the thought
    upstream_body: str | None = None  # JSON with fields that are added to every request
    silence_seconds: float = 1000.0  # between two parts of an upstream's answer

    dtype: DType = "bfloat16"  # of the model's parameters and of what is computed
    tensor_parallel: int = 1  # devices that share the model and decode one batch together
    data_parallel: int = 1  # copies of the model, each with a cache and batches of its own
    yarn_factor: float = 1.0  # stretches the context beyond the trained one; the report uses 2
    engine: EngineConfig = EngineConfig(max_waiting=65_536)

    def check(self) -> None:
        """
        Raises:
            ConfigError: arguments do not go together, or are out of range. (Raised by the constructor, tyro would take
                it for a failure to parse.)
        """
        if (self.model is None) == (self.upstream is None):
            given = "neither" if self.model is None else "both"
            raise ConfigError(f"{given} of --model and --upstream given: name exactly one, which answers")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: must be at least 1")
        for name in ("tensor_parallel", "data_parallel", "yarn_factor"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        other = _LOCAL if self.model is None else _UPSTREAM
        useless = [f"--{name.replace('_', '-')}" for name in other if getattr(self, name) != defaults[name]]
        if useless:
            there = "--upstream" if self.model is None else "--model"
            raise ConfigError(f"{', '.join(useless)}: of no effect with {there}; leave it out")

    @property
    def batch(self) -> BatchConfig:
        method = Method(
            name=self.method, width=self.width, scorer=self.scorer, references=self.references, loops=self.loops
        )
        return BatchConfig(method=method, samples=self.samples, concurrent_problems=self.concurrent_problems)

    @property
    def config(self) -> PacoreConfig:
        config = PacoreConfig(
            schedule=parse_schedule(self.schedule),
            seed=self.seed,
            sampling=SamplingParams(
                temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=self.max_tokens
            ),
            order=self.order,
            truncated=self.truncated,
            tail_tokens=self.tail_tokens,
            overflow=self.overflow,
            answer_tokens=self.answer_tokens,
            images=self.images,
            template=None if self.template is None else str(self.template),
            fallback=self.fallback,
            limits=Limits(
                retries=self.retries,
                backoff_seconds=self.backoff_seconds,
                call_seconds=self.call_seconds,
                round_seconds=self.round_seconds,
                quorum=self.quorum,
                agreement=self.agreement,
            ),
        )
        return self.batch.method.configured(config)


_LOCAL = ("dtype", "tensor_parallel", "data_parallel", "yarn_factor", "engine")
_UPSTREAM = (
    *("upstream_model", "tokenizer", "max_context", "max_concurrent", "stream", "send_seed", "opens_thought"),
    *("upstream_body", "silence_seconds"),
)


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 well, 1 all problems failed, 130 or 143 stopped by a signal.

    Raises:
        StepjaxError: an argument, the file or the model is not usable, or the directory holds another run.
    """
    args = tyro.cli(RunArguments, args=list(arguments), prog="stepjax pacore run")
    args.check()
    config, batch = args.config, args.batch
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    problems = read_problems(args.problems, use_responses=args.use_responses, limit=args.limit)
    for note in problems.notes:
        print(f"note: {note}", file=sys.stderr)
    _check_queue(args, config, batch)
    endpoint = _endpoint(args)
    settings = _settings(args, config, batch, problems, endpoint)
    free = {"upstream": args.upstream, "problems_file": str(args.problems), "samples": batch.samples}
    try:
        # Before the model is loaded, which takes minutes.
        with open_journal(args.out, settings, free) as journal:
            if args.retry_failed:
                print(f"{journal.forget_failed()} trajectories will be drawn again", file=sys.stderr)
            elif journal.num_known:
                print(f"going on with {args.out}: {journal.num_known} trajectories are there", file=sys.stderr)
            made = _load(args) if endpoint is None else endpoint
            return asyncio.run(_run(args, config, batch, problems, journal, made))
    except KeyboardInterrupt:  # while the model was being loaded, or a second time
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130


def _check_queue(args: RunArguments, config: PacoreConfig, batch: BatchConfig) -> None:
    widest = batch.method.widest or max((1, *config.schedule))
    most = widest * min(batch.concurrent_problems, args.limit or batch.concurrent_problems)
    if args.model is not None and most > args.engine.max_waiting:
        raise ConfigError(
            f"--engine.max-waiting {args.engine.max_waiting}: {batch.concurrent_problems} problems at a time may have "
            f"{most} calls waiting; raise it, or lower --concurrent-problems"
        )


async def _run(
    args: RunArguments,
    config: PacoreConfig,
    batch: BatchConfig,
    problems: ProblemSet,
    journal: Journal,
    answering: "Endpoint | _Local",
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
    print(f"{table(summary)}\n\nanswers in {args.out / RESULTS}")
    if summary["failed"]:
        print(f"{summary['failed']} answers failed; --retry-failed draws what failed again", file=sys.stderr)
    return 1 if summary["failed"] == summary["answers"] else 0


@contextlib.asynccontextmanager
async def _sampler(answering: "Endpoint | _Local", args: RunArguments) -> AsyncIterator[Sampler]:
    if isinstance(answering, Endpoint):
        async with HttpSampler(answering) as sampler:
            yield sampler
        return
    from stepjax.inference.replicas import AsyncReplicas
    from stepjax.pacore.local_sampler import LocalSampler

    async with AsyncReplicas(answering.engines) as engine:
        yield LocalSampler(engine, answering.processor, enable_thinking=args.thinking)


def _settings(
    args: RunArguments, config: PacoreConfig, batch: BatchConfig, problems: ProblemSet, endpoint: Endpoint | None
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
        sampler = {"model": path, "dtype": args.dtype, "yarn_factor": args.yarn_factor, "thinking": args.thinking}
    return {
        "version": 1,
        "method": batch.method.settings(),
        "config": fields,
        "problems": {"count": len(problems.problems), "sha256": problems.digest},
        "sampler": sampler,
    }


def _endpoint(args: RunArguments) -> Endpoint | None:
    """The upstream, with the name of its model."""
    if args.upstream is None:
        return None
    body = _body(args.upstream_body)
    if args.thinking is not None:
        body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), "enable_thinking": args.thinking}
    endpoint = Endpoint(
        url=args.upstream,
        model=args.upstream_model,
        body=body,
        max_concurrent=args.max_concurrent,
        streams=args.stream,
        sends_seed=args.send_seed,
        silence_seconds=args.silence_seconds,
        max_context=args.max_context,
        tokenizer=args.tokenizer,
        opens_thought=args.opens_thought,
    )

    async def name() -> str:
        async with HttpSampler(endpoint) as sampler:
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


@dataclasses.dataclass(frozen=True)
class _Local:
    """Engines in this process."""

    engines: list[Any]
    processor: Any


def _load(args: RunArguments) -> _Local:
    import jax

    from stepjax.config import MeshConfig, NumericsConfig
    from stepjax.inference.engine import Engine
    from stepjax.inference.long_context import stretched
    from stepjax.interop.load import load
    from stepjax.sharding import data_parts, make_mesh

    assert args.model is not None
    needed, there = args.tensor_parallel * args.data_parallel, len(jax.devices())
    if needed > there:
        raise ConfigError(
            f"--tensor-parallel {args.tensor_parallel} --data-parallel {args.data_parallel}: need {needed} devices, "
            f"and there are {there}"
        )
    print(f"loading {args.model}", file=sys.stderr)
    shape = MeshConfig(data=args.data_parallel, fsdp=1, tensor=args.tensor_parallel)
    parts = data_parts(make_mesh(shape, jax.devices()[:needed]))
    numerics = NumericsConfig(param_dtype=args.dtype, compute_dtype=args.dtype, remat="none")
    model, processor = load(args.model, numerics=numerics, mesh=parts[0])
    model = stretched(model, args.yarn_factor)
    return _Local([Engine(model, processor, args.engine, mesh=part) for part in parts], processor)
