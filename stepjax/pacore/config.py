"""How PaCoRe goes about a problem. The defaults are the paper's, but for the order of the references."""

import dataclasses
import math
from typing import Literal

from stepjax.errors import ConfigError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.schedule import PRESETS, Schedule, check_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """When a call is tried again or given up, and when a round does not wait for its last calls.

    Raises:
        ConfigError: a value is out of range.
    """

    retries: int = 4  # of a call, after its first try
    backoff_seconds: float = 1.0  # before the first retry, doubled for each; a random share of it is waited
    max_backoff_seconds: float = 30.0
    call_seconds: float | None = None  # for one try
    round_seconds: float | None = None  # after which a round goes on with what it has, if that is the quorum
    quorum: float = 0.5  # share of a round's trajectories that must have left a message by then
    agreement: float | None = None  # share of a round's trajectories whose answers agree that ends everything

    def __post_init__(self):
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {remedy}")

        require(self.retries >= 0, "retries", "must not be negative")
        for name in ("backoff_seconds", "max_backoff_seconds"):
            require(0 <= getattr(self, name) < math.inf, name, "must be a number of seconds, not negative")
        for name in ("call_seconds", "round_seconds"):
            seconds = getattr(self, name)
            require(seconds is None or seconds > 0, name, "must be positive, or None for no limit")
        require(0 < self.quorum <= 1, "quorum", "must be above 0 and at most 1")
        require(
            self.agreement is None or 0 < self.agreement <= 1, "agreement", "must be above 0 and at most 1, or None"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreConfig:
    """
    Raises:
        ConfigError: a value is out of range.
    """

    schedule: Schedule = PRESETS["low"]  # widths of the rounds before the final call
    seed: int = 0  # every trajectory's own derives from it, the problem's id, the round and the index
    sampling: SamplingParams = SamplingParams()  # temperature 1, top-p 1, as in section 3.2
    # "shuffle": by a generator seeded for the problem and round. "length": as released, sorted by length and then
    # permuted in one fixed way for each width.
    order: Literal["shuffle", "length"] = "shuffle"
    # A trajectory that was cut off within its thought: "drop" it, or pass on the "tail" of the thought.
    truncated: Literal["drop", "tail"] = "drop"
    tail_tokens: int = 1000
    # References that do not fit the context: "shorten" the longest ones to their ends, "drop" the longest ones, "fail".
    overflow: Literal["shorten", "drop", "fail"] = "shorten"
    answer_tokens: int = 1024  # that a prompt leaves room for where `sampling.max_tokens` is None
    images: Literal["before", "after"] = "before"  # where they stand beside the text of the synthesis; unconfirmed
    template: str | None = None  # a Jinja file in place of the built-in one; see `template`
    fallback: bool = True  # when the final call gives nothing, the plurality of the last messages answers
    limits: Limits = Limits()

    def __post_init__(self):
        check_schedule(self.schedule)
        for name, choices in (
            ("order", ("shuffle", "length")),
            ("truncated", ("drop", "tail")),
            ("overflow", ("shorten", "drop", "fail")),
            ("images", ("before", "after")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")
        for name in ("tail_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be at least 1")
        if self.sampling.n != 1:
            raise ConfigError(
                f"sampling.n={self.sampling.n}: must be 1; the schedule says how many trajectories there are"
            )
