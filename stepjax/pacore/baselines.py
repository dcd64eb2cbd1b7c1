"""Other ways to spend test-time compute, over the same calls, with the same seeds, records and cost accounting.

A trajectory's seed depends only on (seed, problem, sample, round, index, attempt). So all methods draw the same
trajectories for the bare problem: majority@4 uses the first four of majority@16, and PaCoRe with [16] has the same
first round as majority@16.

- single: one call.
- majority: the most frequent answer of `width` trajectories (self-consistency, arXiv 2203.11171).
- best-of-n: the trajectory of `width` that a scorer prefers. With the scorer "ground-truth" it is pass@n.
- sequential: `width` rounds of one trajectory, each seeing the previous one; then the final call.
- rsa: recursive self-aggregation (arXiv 2509.26626). A population of `width` trajectories is replaced in each of
  `loops` - 1 more rounds; every new member sees `references` random members of the old population. The most frequent
  answer of the last population wins.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

import tyro

from stepjax.errors import ConfigError, require_positive
from stepjax.pacore.answers import in_thread, is_right
from stepjax.pacore.compaction import answers
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.records import Outcome, Problem, Trajectory

MethodName = Literal["pacore", "single", "majority", "best-of-n", "sequential", "rsa"]
ScorerName = Literal["mean-logprob", "shortest", "longest", "ground-truth"]
Scorer = Callable[[Problem, Trajectory], float]  # the highest score wins; ties go to the first

_NAMED: Any = tyro.conf.arg(constructor=cast(Any, ScorerName))  # on the command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """
    Raises:
        ConfigError: a value is out of range.
    """

    name: Annotated[MethodName, tyro.conf.arg(name="method")] = "pacore"
    width: int = 16  # majority, best-of-n: trajectories; sequential: rounds; rsa: population
    # best-of-n. shortest and longest count all tokens, including reasoning; ground-truth is an oracle (pass@n).
    scorer: Annotated[ScorerName | Scorer, _NAMED] = "mean-logprob"
    references: int = 4  # rsa: members of the population that a new one sees (K)
    loops: int = 10  # rsa: populations, including the first (T)

    def __post_init__(self):
        require_positive("", self, "width", "references", "loops")

    @property
    def needs_truth(self) -> bool:
        return self.name == "best-of-n" and self.scorer == "ground-truth"

    def label(self, config: PacoreConfig) -> str:
        """The method's name in tables; marks an oracle as one."""
        if self.name == "pacore":
            return f"PaCoRe {list(config.schedule)}"
        if self.name == "best-of-n":
            scorer = self.scorer if isinstance(self.scorer, str) else getattr(self.scorer, "__name__", "a scorer")
            return f"pass@{self.width} (oracle)" if self.needs_truth else f"best of {self.width} by {scorer}"
        if self.name == "rsa":
            return f"RSA N={self.width} K={self.references} T={self.loops}"
        return self.name if self.name == "single" else f"{self.name}@{self.width}"

    def configured(self, config: PacoreConfig) -> PacoreConfig:
        """The configuration with the method's schedule and, for mean-logprob, log-probabilities."""
        schedules = {"pacore": config.schedule, "sequential": (1,) * self.width}
        config = dataclasses.replace(config, schedule=schedules.get(self.name, ()))
        if self.name == "best-of-n" and self.scorer == "mean-logprob" and config.sampling.logprobs is None:
            config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, logprobs=0))
        return config

    @property
    def widest(self) -> int | None:
        """Concurrent calls of one problem; None if the schedule sets it."""
        return {"pacore": None, "single": 1, "sequential": 1}.get(self.name, self.width)

    def settings(self) -> dict[str, object]:
        """The settings that must match to resume a run."""
        fields: dict[str, tuple[str, ...]] = {
            "majority": ("width",),
            "best-of-n": ("width", "scorer"),
            "rsa": ("width", "references", "loops"),
        }
        named = {field: getattr(self, field) for field in fields.get(self.name, ())}
        return {"name": self.name, **named}


async def answer(coordinator: Coordinator, problem: Problem, method: Method, **options: Any) -> Outcome:
    """Solves a problem with a method; for the options see `ProblemRun`.

    Args:
        coordinator: its configuration comes from `method.configured`.

    Raises:
        ConfigError: the scorer lacks what it needs.
        RecordError, ContextLengthError, RoundFailedError: see `ProblemRun.solve`.
    """
    run = coordinator.begin(problem, **options)
    if method.name in ("pacore", "single", "sequential"):
        return await run.solve()
    if method.needs_truth and problem.ground_truth is None:
        raise ConfigError(f"problem {problem.id!r} has no ground_truth: the scorer ground-truth needs it")
    made = await run.round(method.width)
    if method.name == "best-of-n":
        scorer = method.scorer if callable(method.scorer) else _scorer(method.scorer, coordinator)
        candidates = [made.trajectories[message.index] for message in answers(made.messages)]
        scores = await in_thread(lambda: [scorer(problem, each) for each in candidates])
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        return run.outcome(made, candidates[best].index, "score")
    for loop in range(1, method.loops if method.name == "rsa" else 1):
        count = min(method.references, len(made.messages))
        drawn = [random.Random(run.seed("rsa", loop, i)).sample(made.messages, count) for i in range(method.width)]
        made = await run.round(method.width, references=drawn)
    return await run.vote(made, "vote")


def _scorer(name: str, coordinator: Coordinator) -> Scorer:
    def mean_logprob(problem: Problem, trajectory: Trajectory) -> float:
        if trajectory.rollout.mean_logprob is None:
            raise ConfigError(
                "the scorer mean-logprob needs log-probabilities, but the sampler returned none: set "
                "sampling.logprobs=0, or choose shortest or longest"
            )
        return trajectory.rollout.mean_logprob

    def is_correct(problem: Problem, trajectory: Trajectory) -> float:
        return is_right(trajectory.rollout.content, problem.ground_truth, coordinator.matching)

    return {
        "mean-logprob": mean_logprob,
        "shortest": lambda problem, trajectory: -trajectory.rollout.num_tokens,
        "longest": lambda problem, trajectory: trajectory.rollout.num_tokens,
        "ground-truth": is_correct,
    }[name]
