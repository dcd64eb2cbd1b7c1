"""The arguments of `stepjax pacore run`, and the configurations that they make."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from stepjax.errors import ConfigError
from stepjax.inference.config import EngineConfig
from stepjax.inference.request import SamplingParams
from stepjax.interop.engines import EngineArguments
from stepjax.pacore.answers import Matching
from stepjax.pacore.arguments import RoundArguments, UpstreamArguments
from stepjax.pacore.baselines import Method, MethodName, ScorerName
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.runner import BatchConfig

# All calls of all problems under way may wait in the engine's queue.
_LOCAL = EngineArguments(engine=EngineConfig(max_waiting=65_536))


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

    concurrent_problems: int = 64  # under way at a time, so that rounds of different ones overlap
    upstream_body: str | None = None  # JSON with fields that are added to every request of the upstream

    rounds: Annotated[RoundArguments, tyro.conf.arg(name="")] = RoundArguments()
    endpoint: Annotated[UpstreamArguments, tyro.conf.arg(name="")] = UpstreamArguments()
    local: Annotated[EngineArguments, tyro.conf.arg(name="")] = _LOCAL

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
        self.local.check()
        useless = _changed(self.local, _LOCAL) if self.model is None else _changed(self.endpoint, UpstreamArguments())
        if self.model is not None and self.upstream_body is not None:
            useless.append("--upstream-body")
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
        sampling = SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=self.max_tokens
        )
        return self.batch.method.configured(self.rounds.config(seed=self.seed, sampling=sampling))


def _changed(given: Any, usual: Any) -> list[str]:
    """The options of a group that are not as usual."""
    names = [field.name for field in dataclasses.fields(given)]
    return [f"--{name.replace('_', '-')}" for name in names if getattr(given, name) != getattr(usual, name)]
