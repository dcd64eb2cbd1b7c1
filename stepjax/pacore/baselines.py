"""Other ways to spend test-time compute, over the same calls: for the same seed, the same records and the same costs.

A trajectory's seed derives from (seed, problem, sample, round, index, attempt) alone. So all methods that ask the
problem itself draw the same trajectories: those of majority@4 are the first four of majority@16, and the first round of
PaCoRe with [16] is that of majority@16.

- single: one call.
- majority: the answer that most of `width` trajectories agree on (self-consistency, arXiv 2203.11171).
- best-of-n: the one of `width` trajectories that a scorer prefers. With the scorer "ground-truth" it is pass@n.
- sequential: `width` rounds of one trajectory, each of which sees the one before; then the final call.
- rsa: recursive self-aggregation (arXiv 2509.26626). A population of `width` trajectories; in each of `loops` - 1 more
  rounds it is replaced by as many new ones, each of which sees `references` members of the old one, drawn at random.
  The answer that most of the last population agree on counts.
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
Scorer = Callable[[Problem, Trajectory], float]  # the trajectory with the highest score is taken, of equals the first

_NAMED: Any = tyro.conf.arg(constructor=cast(Any, ScorerName))  # on the command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """
    Raises:
        ConfigError: a value is out of range.
    """

    name: Annotated[MethodName, tyro.conf.arg(name="method")] = "pacore"
    width: int = 16  # majority, best-of-n: trajectories; sequential: rounds; rsa: population
    # best-of-n. shortest and longest count all tokens, reasoning included; ground-truth is an oracle: pass@n.
    scorer: Annotated[ScorerName | Scorer, _NAMED] = "mean-logprob"
    references: int = 4  # rsa: how many members of the population a new one sees (K)
    loops: int = 10  # rsa: populations, the first included (T)

    def __post_init__(self):
        require_positive("", self, "width", "references", "loops")

    @property
    def needs_truth(self) -> bool:
        return self.name == "best-of-n" and self.scorer == "ground-truth"

    def label(self, config: PacoreConfig) -> str:
        """For tables. An oracle is called one."""
        if self.name == "pacore":
            return f"PaCoRe {list(config.schedule)}"
        if self.name == "best-of-n":
            scorer = self.scorer if isinstance(self.scorer, str) else getattr(self.scorer, "__name__", "a scorer")
            return f"pass@{self.width} (oracle)" if self.needs_truth else f"best of {self.width} by {scorer}"
        if self.name == "rsa":
            return f"RSA N={self.width} K={self.references} T={self.loops}"
        return self.name if self.name == "single" else f"{self.name}@{self.width}"

    def configured(self, config: PacoreConfig) -> PacoreConfig:
        """The configuration with what the method needs: its schedule, and log-probabilities for their scorer."""
        schedules = {"pacore": config.schedule, "sequential": (1,) * self.width}
        config = dataclasses.replace(config, schedule=schedules.get(self.name, ()))
        if self.name == "best-of-n" and self.scorer == "mean-logprob" and config.sampling.logprobs is None:
            config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, logprobs=0))
        return config

    @property
    def widest(self) -> int | None:
        """Calls of one problem at a time; None if the schedule says it."""
        return {"pacore": None, "single": 1, "sequential": 1}.get(self.name, self.width)

    def settings(self) -> dict[str, object]:
        """What makes two runs by this method different ones."""
        fields: dict[str, tuple[str, ...]] = {
            "majority": ("width",),
            "best-of-n": ("width", "scorer"),
            "rsa": ("width", "references", "loops"),
        }
        named = {field: getattr(self, field) for field in fields.get(self.name, ())}
        return {"name": self.name, **named}


async def answer(coordinator: Coordinator, problem: Problem, method: Method, **options: Any) -> Outcome:
    """Solves a problem by a method; for the options see `ProblemRun`.

    Args:
        coordinator: of a configuration that `method.configured` has seen.

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
                "the sampler gave no log-probabilities, which the scorer mean-logprob needs: set sampling.logprobs=0, "
                "or choose shortest or longest"
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
