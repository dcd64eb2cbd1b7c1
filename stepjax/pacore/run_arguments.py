"""The arguments of `stepjax pacore run`, and the configurations that they make."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stepjax.config import DType
from stepjax.errors import ConfigError
from stepjax.inference.config import EngineConfig
from stepjax.inference.request import SamplingParams
from stepjax.pacore.answers import Matching
from stepjax.pacore.baselines import Method, MethodName, ScorerName
from stepjax.pacore.config import Limits, PacoreConfig
from stepjax.pacore.runner import BatchConfig
from stepjax.pacore.schedule import parse_schedule


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
