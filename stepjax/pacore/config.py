"""How PaCoRe solves a problem. The defaults are the paper's, except for the order of the references."""

import dataclasses
import math
import re
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from stepjax.errors import ConfigError, require, require_positive
from stepjax.inference.request import SamplingParams

PRESETS: dict[str, tuple[int, ...]] = {"low": (4,), "medium": (16,), "high": (32, 4)}  # section 3.2 of the report

_NUMBERS = re.compile(r"\s*\d{1,6}\s*(,\s*\d{1,6}\s*)*")


def parse_schedule(text: str) -> tuple[int, ...]:
    """Parses a preset's name, "none" (only the final call), or widths such as "32,4"; the final 1 is implied.

    Raises:
        ConfigError: the text is not a schedule.
    """
    name = text.strip().lower()
    if name in PRESETS:
        return PRESETS[name]
    if name == "none":
        return ()
    numbers = text.strip().removeprefix("[").removesuffix("]")
    if not _NUMBERS.fullmatch(numbers):
        raise ConfigError(f"schedule {text!r}: give numbers such as 32,4, or {', '.join(PRESETS)} or none")
    return check_schedule(tuple(int(number) for number in numbers.split(",")))


def check_schedule(schedule: tuple[int, ...]) -> tuple[int, ...]:
    """
    Raises:
        ConfigError: a width is not positive.
    """
    if any(width < 1 for width in schedule):
        raise ConfigError(f"schedule {list(schedule)}: every round needs at least one trajectory")
    return schedule


def num_calls(schedule: tuple[int, ...]) -> int:
    """The number of calls, including the final one."""
    return sum(schedule) + 1


def show(schedule: tuple[int, ...]) -> str:
    return ",".join(map(str, schedule)) or "none"


# K = [K_1, ..., K_R], always followed by one final call. A string on the command line.
Schedule = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SCHEDULE",
        instance_from_str=lambda arguments: parse_schedule(arguments[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [show(value)],
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundLimits:
    """When a call is retried or given up, and when a round stops waiting for its last calls.

    Raises:
        ConfigError: a value is out of range.
    """

    retries: int = 4  # per call, after its first attempt
    backoff_seconds: float = 1.0  # before the first retry; doubles each time, with random jitter
    max_backoff_seconds: float = 30.0
    call_seconds: float | None = None  # per attempt
    round_seconds: float | None = None  # then a round ends without its last calls, if it has the quorum
    quorum: float = 0.5  # share of a round that must have left a message by then
    agreement: float | None = None  # stop early when this share of a round agrees on an answer

    def __post_init__(self):
        call, round_, share = self.call_seconds, self.round_seconds, self.agreement
        finite, positive = "must be a number of seconds, not negative", "must be positive, or None for no limit"
        require(
            "",
            self,
            retries=(self.retries >= 0, "must not be negative"),
            backoff_seconds=(0 <= self.backoff_seconds < math.inf, finite),
            max_backoff_seconds=(0 <= self.max_backoff_seconds < math.inf, finite),
            call_seconds=(call is None or call > 0, positive),
            round_seconds=(round_ is None or round_ > 0, positive),
            quorum=(0 < self.quorum <= 1, "must be above 0 and at most 1"),
            agreement=(share is None or 0 < share <= 1, "must be above 0 and at most 1, or None"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreConfig:
    """
    Raises:
        ConfigError: a value is out of range.
    """

    schedule: Schedule = PRESETS["low"]  # widths of the rounds before the final call: 32,4; low, medium, high; none
    # Every trajectory's seed derives from `sampling.seed` (0 if unset), the problem's id, the round and the index.
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = SamplingParams(seed=0)
    # Order of the references. shuffle: seeded by problem and round. length: as released, sorted by length, then a fixed
    # permutation for each width.
    order: Literal["shuffle", "length"] = "shuffle"
    truncated: Literal["drop", "tail"] = "drop"  # reasoning that was cut off: drop it, or pass on its end
    tail_tokens: int = 1000  # length of that end
    # References that do not fit the context: shorten the longest to their ends, drop the longest, or fail.
    overflow: Literal["shorten", "drop", "fail"] = "shorten"
    answer_tokens: int = 1024  # room a prompt leaves for the answer if max_tokens is not set
    images: Literal["before", "after"] = "before"  # before or after the text of the synthesis prompt
    template: str | None = None  # "short", or a Jinja file, instead of the built-in template
    fallback: bool = True  # if the final call gives no answer, answer with the plurality of the last round
    limits: Annotated[RoundLimits, tyro.conf.arg(name="")] = RoundLimits()

    def __post_init__(self):
        check_schedule(self.schedule)
        choices = {
            "order": ("shuffle", "length"),
            "truncated": ("drop", "tail"),
            "overflow": ("shorten", "drop", "fail"),
            "images": ("before", "after"),
        }
        named = {name: f"must be one of {', '.join(values)}" for name, values in choices.items()}
        require("", self, **{name: (getattr(self, name) in choices[name], named[name]) for name in choices})
        require_positive("", self, "tail_tokens", "answer_tokens")
        if self.sampling.n != 1:
            raise ConfigError(f"n={self.sampling.n}: must be 1; set the number of trajectories with the schedule")

    @property
    def seed(self) -> int:
        return self.sampling.seed or 0
