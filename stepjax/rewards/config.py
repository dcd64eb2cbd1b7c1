"""What a rollout is rewarded for."""

import dataclasses

from stepjax.errors import require, require_not_negative, require_positive
from stepjax.rewards.registry import VERIFIER


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """
    Attributes:
        name: "verifier" (the record's own), "judge", "preference", or a function of docs/rewards.md.
    """

    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The judging model of the terms "judge" and "preference".

    Templates may use {question}, {reference} (the gold), {reasoning} and {answer}, or {first} and {second}. The last
    line of a judgement is "Score: N" with N from 0 to 10, or "Better: A", "B" or "equal"; N or A alone will do.

    Raises:
        ConfigError: a value is invalid.
    """

    url: str | None = None  # an OpenAI-compatible endpoint, unless the scorer is given a sampler; key: environment
    run: str | None = None  # instead: a run or checkpoint here, which `stepjax rl` loads and asks in its own process
    model: str | None = None  # its name there; verdicts are cached under it, so without it they are not
    rubric: str | None = None  # template of "judge"; None: rewards.judges.RUBRIC
    preference: str | None = None  # template of "preference"; None: rewards.judges.PREFERENCE
    images: bool = True  # show the question's images
    opponents: int = 4  # of each rollout, within its group
    temperature: float = 0.0
    max_tokens: int = 2048
    retries: int = 2
    seconds: float = 300.0  # for one judgement
    max_concurrent: int = 64

    def __post_init__(self):
        require("reward.judge", self, run=(self.run is None or self.url is None, "omit it, or omit reward.judge.url"))
        require_positive("reward.judge", self, "max_tokens", "seconds", "max_concurrent")
        require_not_negative("reward.judge", self, "retries", "temperature")
        require("reward.judge", self, opponents=(self.opponents >= 2, "must be at least 2"))
        for name, fields in (("rubric", ("answer",)), ("preference", ("first", "second"))):
            template = getattr(self, name)
            lacking = [field for field in fields if template is not None and f"{{{field}}}" not in template]
            require("reward.judge", self, **{name: (not lacking, f"must contain {{{''.join(lacking[:1])}}}")})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """
    Raises:
        ConfigError: a value is invalid.
    """

    terms: tuple[RewardTerm, ...] = (RewardTerm(VERIFIER),)  # a rollout's reward is their weighted sum
    deadline: float = 10.0  # seconds of CPU time for one verdict; six times that by the clock
    workers: int = 2  # verdicts computed at a time
    max_missing: float = 0.2  # share of the last `missing_window` rollouts without a reward above which scoring stops
    missing_window: int = 256
    cache: str | None = None  # SQLite file of verdicts; None: they are forgotten when the scorer closes
    cache_size: int = 1_000_000  # verdicts; the oldest are dropped
    judge: JudgeConfig = JudgeConfig()

    def __post_init__(self):
        names = [term.name for term in self.terms]
        require("reward", self, terms=(bool(names) and len(set(names)) == len(names), "name each function once"))
        require_positive("reward", self, "deadline", "workers", "cache_size", "missing_window")
        require_not_negative("reward", self, "max_missing")
        require("reward", self, max_missing=(self.max_missing <= 1, "must be a share, at most 1"))
