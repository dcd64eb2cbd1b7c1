"""What a rollout is rewarded for."""

import dataclasses

from stepjax.errors import require, require_not_negative, require_positive

# The term that stands for each record's own verifier.
VERIFIER = "verifier"


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """
    Attributes:
        name: "verifier" (the record's own), or a function of docs/rewards.md, such as "math" or "language_mixing".
    """

    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """
    Raises:
        ConfigError: a value is invalid.
    """

    terms: tuple[RewardTerm, ...] = (RewardTerm(VERIFIER),)  # a rollout's reward is their weighted sum
    deadline: float = 10.0  # seconds of CPU time for one verdict; six times that by the clock
    workers: int = 2  # verdicts computed at a time
    max_missing: float = 0.2  # share of a call's rollouts without a reward above which scoring stops
    cache: str | None = None  # SQLite file of verdicts; None: they are forgotten when the scorer closes
    cache_size: int = 1_000_000  # verdicts; the oldest are dropped

    def __post_init__(self):
        names = [term.name for term in self.terms]
        require("reward", self, terms=(bool(names) and len(set(names)) == len(names), "name each function once"))
        require_positive("reward", self, "deadline", "workers", "cache_size")
        require_not_negative("reward", self, "max_missing")
        require("reward", self, max_missing=(self.max_missing <= 1, "must be a share, at most 1"))
