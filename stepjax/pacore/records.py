"""What PaCoRe is asked, and what it keeps of each call, round and problem: plain data with a JSON form."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

# "ok": the model answered, with whatever. Else the call is not used: it failed for good, or was no longer needed.
Status = Literal["ok", "error", "timeout", "cancelled"]

# Why a trajectory leaves no message: its status; nothing was written; it was cut off within its thought; no room in the
# context of the next round.
LOSSES = ("error", "timeout", "cancelled", "empty", "truncated", "did_not_fit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A conversation to be continued, whose last message is a user's or a tool's, as of OpenAI's API.

    Attributes:
        responses: messages to begin with, of trajectories that were drawn before. The first round then sees them.
        ground_truth: the answer, where it is known.
        extra: what else the record holds; it is passed through.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    ground_truth: Any = None
    responses: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A try of a call that led to nothing.

    Attributes:
        status: "empty" and "truncated" are tried again in the final round alone, which must give an answer.
        output_tokens: that were drawn and are lost, as far as they are known.
    """

    status: str
    error: str
    seconds: float
    output_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A call of the model, the last try of it.

    Attributes:
        round: from 0; the final one is the schedule's length.
        index: from 0 to the round's width - 1.
        content: without the thought; tool calls stand apart.
        start: seconds since the problem was begun; a run that was taken up again counts from there.
        seconds: of the last try; for a local engine the time in its queue included.
        cached_tokens: of the prompt, whose keys and values another call had computed.
        attempts: the tries before.
    """

    round: int
    index: int
    status: Status
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    seed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    mean_logprob: float | None = None
    start: float = 0.0
    seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()

    @property
    def lost_tokens(self) -> int:
        """Drawn by tries that led to nothing."""
        return sum(attempt.output_tokens for attempt in self.attempts)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Trajectory":
        """
        Raises:
            ValueError, TypeError, KeyError: a field is missing, not known, or of another type.
        """
        attempts = tuple(Attempt(**attempt) for attempt in fields["attempts"])
        made = cls(**{**fields, "attempts": attempts, "tool_calls": tuple(fields["tool_calls"])})
        for of in (made, *attempts):
            for field in dataclasses.fields(of):
                value = getattr(of, field.name)
                if not _FITS[field.name](value):
                    raise ValueError(f"{field.name} is {value!r:.100}")
        return made


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_FITS = {
    **dict.fromkeys(("round", "index", "seed", "prompt_tokens", "output_tokens", "cached_tokens"), _is_count),
    **dict.fromkeys(("start", "seconds"), _is_number),
    **dict.fromkeys(("content", "status"), _is_text),
    **dict.fromkeys(("reasoning", "finish_reason", "error"), lambda value: value is None or _is_text(value)),
    "mean_logprob": lambda value: value is None or _is_number(value),
    "tool_calls": lambda value: all(isinstance(call, dict) for call in value),
    "attempts": lambda value: True,  # each is looked at by itself
}


@dataclasses.dataclass(frozen=True)
class Message:
    """What a trajectory tells the next round.

    Attributes:
        index: of the trajectory in its round.
        was_cut: it is only the end of what there was.
    """

    index: int
    text: str
    was_cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """
    Attributes:
        references: what its prompt held, in the order of "Reference 1", "Reference 2" and so on.
        own_references: the same for each trajectory, where each had a prompt of its own; `references` is the first's.
        trajectories: by index.
        messages: of the trajectories that left one, by index.
        losses: how many left none, by reason; see LOSSES. `did_not_fit` counts references that its own prompt had no
            room for.
        cut_references: how many references were shortened to fit.
        cut_answers: messages whose answer was cut off by the limit of tokens; they are passed on all the same.
    """

    number: int
    is_final: bool
    references: tuple[Message, ...]
    trajectories: tuple[Trajectory, ...]
    messages: tuple[Message, ...]
    losses: Mapping[str, int]
    cut_references: int = 0
    cut_answers: int = 0
    own_references: tuple[tuple[Message, ...], ...] = ()

    @property
    def width(self) -> int:
        return len(self.trajectories)

    @property
    def totals(self) -> "Totals":
        return Totals.of(self.trajectories)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "width": self.width, "totals": dataclasses.asdict(self.totals)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over calls.

    Attributes:
        output_tokens: the test-time compute (TTC) of section 2.1: of every trajectory that ended, used or not.
        lost_tokens: drawn by tries that failed; not in `output_tokens`.
        shared_tokens: of the prompts, computed once for several calls.
        seconds: of the calls, one after the other.
    """

    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    output_tokens: int = 0
    lost_tokens: int = 0
    seconds: float = 0.0
    finish_reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, trajectories) -> "Totals":
        trajectories = list(trajectories)
        return cls(
            calls=len(trajectories),
            retries=sum(len(each.attempts) for each in trajectories),
            prompt_tokens=sum(each.prompt_tokens for each in trajectories),
            shared_tokens=sum(each.cached_tokens for each in trajectories),
            output_tokens=sum(each.output_tokens for each in trajectories),
            lost_tokens=sum(each.lost_tokens for each in trajectories),
            seconds=sum(each.seconds for each in trajectories),
            finish_reasons=dict(Counter(each.finish_reason or each.status for each in trajectories)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A problem's answer and all that led to it.

    Attributes:
        content: the answer, without its thought.
        reasoning: the thought behind it.
        answered_by: "synthesis", the final call (or the only one); "agreement", enough messages of a round agreed and
            the rest was not asked; "vote" or "score", a baseline's choice; "fallback", the final call gave nothing, and
            the answer that most messages of the last round agree on stands in.
        chosen: round and index of the trajectory that the answer is of.
    """

    problem: Problem
    sample: int
    content: str
    reasoning: str | None
    tool_calls: tuple[dict[str, Any], ...]
    finish_reason: str | None
    answered_by: Literal["synthesis", "agreement", "vote", "score", "fallback"]
    chosen: tuple[int, int]
    rounds: tuple[Round, ...]
    seconds: float

    @property
    def totals(self) -> Totals:
        return Totals.of(each for round_ in self.rounds for each in round_.trajectories)
