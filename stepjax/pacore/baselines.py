"""Other ways to spend test-time compute, over the same calls: for the same seed, the same records and the same costs.

A trajectory's seed derives from (seed, problem, sample, round, index, try) and from nothing else. So all methods that
ask the problem itself draw the same trajectories: those of majority@4 are the first four of majority@16, and the first
round of PaCoRe with [16] is that of majority@16.

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
from collections.abc import Callable, Iterable
from typing import Literal

from stepjax.errors import ConfigError
from stepjax.pacore.answers import in_thread, is_right, plurality
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator, outcome
from stepjax.pacore.events import Notify, ignore
from stepjax.pacore.messages import answers
from stepjax.pacore.records import Message, Outcome, Problem, Trajectory
from stepjax.pacore.rounds import ProblemRun, trajectory_of

MethodName = Literal["pacore", "single", "majority", "best-of-n", "sequential", "rsa"]
ScorerName = Literal["mean-logprob", "shortest", "longest", "ground-truth"]
Scorer = Callable[[Problem, Trajectory], float]  # the trajectory with the highest score is taken, of equals the first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """
    Attributes:
        width: trajectories, rounds (sequential) or members of the population (rsa).
        scorer: for best-of-n; "shortest" and "longest" count all tokens, those of the thought too.
        references, loops: for rsa, K and T of its paper.

    Raises:
        ConfigError: a value is out of range.
    """

    name: MethodName = "pacore"
    width: int = 16
    scorer: ScorerName | Scorer = "mean-logprob"
    references: int = 4
    loops: int = 10

    def __post_init__(self):
        for field in ("width", "references", "loops"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: must be at least 1")

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
        """Calls of one problem at a time; None where the schedule says it."""
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


async def answer(
    coordinator: Coordinator,
    problem: Problem,
    method: Method,
    *,
    sample: int = 0,
    done: Iterable[Trajectory] = (),
    notify: Notify = ignore,
) -> Outcome:
    """Solves a problem by a method; see `Coordinator.solve`.

    Args:
        coordinator: of a configuration that `method.configured` has seen.

    Raises:
        ConfigError: the scorer needs what there is not.
        RecordError, ContextLengthError, RoundFailedError: see `Coordinator.solve`.
    """
    if method.name in ("pacore", "single", "sequential"):
        return await coordinator.solve(problem, sample=sample, done=done, notify=notify)
    if method.needs_truth and problem.ground_truth is None:
        raise ConfigError(f"problem {problem.id!r} has no ground_truth: the scorer ground-truth needs it")
    run = coordinator.begin(problem, sample=sample, done=done, notify=notify)
    if method.name == "rsa":
        return await _aggregated(run, method)
    made = await run.round(method.width, is_final=False)
    if method.name == "majority":
        return await _voted(run)
    scorer = method.scorer if callable(method.scorer) else _scorer(method.scorer, coordinator)
    candidates = answers(made.messages)
    trajectories = [trajectory_of(made, message) for message in candidates]
    scores = await in_thread(lambda: [scorer(problem, each) for each in trajectories])
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    return outcome(run, made, candidates[best], "score")


async def _aggregated(run: ProblemRun, method: Method) -> Outcome:
    await run.round(method.width, is_final=False)
    for loop in range(1, method.loops):
        population = run.rounds[-1].messages
        drawn = [_subset(run, population, method.references, loop, index) for index in range(method.width)]
        await run.round(method.width, is_final=False, references=drawn)
    return await _voted(run)


def _subset(run: ProblemRun, population: tuple[Message, ...], count: int, loop: int, index: int) -> list[Message]:
    generator = random.Random(run.seed("rsa", loop, index))
    return generator.sample(population, min(count, len(population)))


async def _voted(run: ProblemRun) -> Outcome:
    last = run.rounds[-1]
    candidates = answers(last.messages)
    index, _ = await in_thread(plurality, [message.text for message in candidates], run.matching)
    return outcome(run, last, candidates[index], "vote")


def _scorer(name: str, coordinator: Coordinator) -> Scorer:
    def mean_logprob(problem: Problem, trajectory: Trajectory) -> float:
        if trajectory.mean_logprob is None:
            raise ConfigError(
                "the sampler gave no log-probabilities, which the scorer mean-logprob needs: set sampling.logprobs=0, "
                "or choose shortest or longest"
            )
        return trajectory.mean_logprob

    return {
        "mean-logprob": mean_logprob,
        "shortest": lambda problem, trajectory: -trajectory.output_tokens,
        "longest": lambda problem, trajectory: trajectory.output_tokens,
        "ground-truth": lambda problem, trajectory: is_right(
            trajectory.content, problem.ground_truth, coordinator.matching
        ),
    }[name]
