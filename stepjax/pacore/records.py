"""What PaCoRe is asked and what it keeps: problems, trajectories, rounds and outcomes; and events that tell of them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pydantic

from stepjax.rollouts.rollout import Count, Number, Rollout, Text, validated
from stepjax.rollouts.sampler import Piece

# "ok": the call returned, whatever the model wrote. Else it failed after its retries, or was cancelled.
Status = Literal["ok", "error", "timeout", "cancelled"]

# "synthesis": the final call (or the only one). "agreement": enough messages of a round agreed, and the rest was not
# asked. "fallback": the final call gave nothing, and the answer that most messages of the last round agree on stands
# in. "vote", "score": a baseline's choice.
AnsweredBy = Literal["synthesis", "agreement", "vote", "score", "fallback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A conversation to continue, whose last message is a user's or a tool's, as in OpenAI's API.

    Attributes:
        responses: messages of earlier trajectories, which the first round then sees.
        ground_truth: the answer, if it is known.
        extra: all else that the record holds; it is passed through.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    ground_truth: Any = None
    responses: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def given(self) -> "tuple[Reference, ...]":
        """What the first round sees."""
        return tuple(Reference(i, text) for i, text in enumerate(self.responses))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """An attempt of a call that came to nothing.

    Attributes:
        status: "error" or "timeout"; in the final round, which must give an answer, also "empty" and "truncated".
        output_tokens: drawn and lost, as far as they are known.
    """

    status: Text
    error: Text
    seconds: Number
    output_tokens: Count = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A call of the model: its last attempt, and what became of those before.

    Attributes:
        round: from 0; the final one is the schedule's length.
        index: from 0 to the round's width - 1.
        rollout: without token ids. If the call did not return, only what is known of it (seed, time, tokens so far),
            with the status as its finish_reason. `start` counts from the beginning of the problem.
        attempts: those that failed; the last one, too, if the call was given up.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    round: Count
    index: Count
    status: Status = "ok"
    rollout: Rollout = Rollout()
    error: Text | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def has_answer(self) -> bool:
        return self.status == "ok" and self.rollout.has_answer

    @property
    def finish_reason(self) -> str | None:
        """None if the call did not return."""
        return self.rollout.finish_reason if self.status == "ok" else None

    @property
    def lost_tokens(self) -> int:
        """Drawn by attempts that came to nothing."""
        return sum(attempt.output_tokens for attempt in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """Fields that have their default are left out."""
        given = {"round": self.round, "index": self.index, "status": self.status, "rollout": self.rollout.to_json()}
        if self.error is not None:
            given["error"] = self.error
        if self.attempts:
            given["attempts"] = [dataclasses.asdict(attempt) for attempt in self.attempts]
        return given

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Trajectory":
        """What `to_json` gave, now or in an older version.

        Raises:
            RecordError, KeyError, TypeError: a field is missing, unknown or of another type.
        """
        fields = dict(fields) if "rollout" in fields else _of_older_version(fields)
        return validated(_TRAJECTORY, {**fields, "rollout": Rollout.from_json(fields["rollout"])}, "trajectory")


_TRAJECTORY = pydantic.TypeAdapter(Trajectory)


def _of_older_version(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Before there were rollouts, a trajectory had their fields itself."""
    names = {
        **{name: name for name in ("content", "reasoning", "tool_calls", "seed", "mean_logprob", "start", "seconds")},
        **{"prompt_tokens": "num_prompt_tokens", "cached_tokens": "num_cached_tokens", "output_tokens": "num_tokens"},
    }
    rollout = {new: fields[old] for old, new in names.items() if old in fields}
    reason = fields["finish_reason"] if fields["finish_reason"] is not None else fields["status"]
    rest = {name: value for name, value in fields.items() if name not in (*names, "finish_reason")}
    return {**rest, "rollout": {"version": 1, **rollout, "finish_reason": "stop" if reason == "ok" else reason}}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a trajectory tells the next round: its compacted message.

    Attributes:
        index: of the trajectory in its round.
        was_cut: only the end is left.
    """

    index: int
    text: str
    was_cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """
    Attributes:
        references: what its prompt held, in the order of "Reference 1", "Reference 2" and so on.
        own_references: the same for each trajectory, if each had a prompt of its own; `references` is the first's.
        trajectories: by index.
        messages: of the trajectories that left one, by index.
        losses: how many left none, by reason: a status; "empty", nothing was written; "truncated", cut off in the
            reasoning. `did_not_fit` counts references that its own prompt had no room for.
        cut_references: how many references were shortened to fit.
        cut_answers: messages whose answer was cut off by the limit of tokens; they are passed on all the same.
    """

    number: int
    is_final: bool
    references: tuple[Reference, ...]
    trajectories: tuple[Trajectory, ...]
    messages: tuple[Reference, ...]
    losses: Mapping[str, int]
    cut_references: int = 0
    cut_answers: int = 0
    own_references: tuple[tuple[Reference, ...], ...] = ()

    @property
    def width(self) -> int:
        return len(self.trajectories)

    @property
    def totals(self) -> "Totals":
        return Totals.of(self.trajectories)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over calls.

    Attributes:
        output_tokens: the test-time compute (TTC) of section 2.1: of every trajectory that ended, used or not.
        lost_tokens: drawn by attempts that failed; not in `output_tokens`.
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
    def of(cls, trajectories: Iterable[Trajectory]) -> "Totals":
        trajectories = list(trajectories)
        rollouts = [each.rollout for each in trajectories]
        return cls(
            calls=len(trajectories),
            retries=sum(len(each.attempts) for each in trajectories),
            prompt_tokens=sum(each.num_prompt_tokens for each in rollouts),
            shared_tokens=sum(each.num_cached_tokens for each in rollouts),
            output_tokens=sum(each.num_tokens for each in rollouts),
            lost_tokens=sum(each.lost_tokens for each in trajectories),
            seconds=sum(each.seconds for each in rollouts),
            finish_reasons=dict(Counter(each.finish_reason for each in rollouts)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a problem came to, and all that led to it.

    Attributes:
        chosen: round and index of the trajectory whose answer counts; None if the problem failed.
        error: why it failed, in a batch run.
        correct: whether the answer is right, in a batch run; None if that is not known.
    """

    problem: Problem
    sample: int = 0
    rounds: tuple[Round, ...] = ()
    answered_by: AnsweredBy | None = None
    chosen: tuple[int, int] | None = None
    seconds: float = 0.0
    error: str | None = None
    correct: bool | None = None

    @property
    def rollout(self) -> Rollout:
        """That of the chosen trajectory."""
        return Rollout() if self.chosen is None else self.rounds[self.chosen[0]].trajectories[self.chosen[1]].rollout

    @property
    def content(self) -> str:
        """The answer, without reasoning. If all that there is is reasoning that was cut off, its end."""
        if self.chosen is None or self.rollout.has_answer:
            return self.rollout.content
        number, index = self.chosen
        return next((each.text for each in self.rounds[number].messages if each.index == index), "")

    @property
    def totals(self) -> Totals:
        return Totals.of(each for round_ in self.rounds for each in round_.trajectories)


# What observers are told while a problem is worked on: journals, progress, streams, live pages.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """
    Attributes:
        references: of the prompt; if each call has references of its own, those of the first.
        width: how many trajectories will be drawn, those known from an earlier run included.
        seconds: since the problem began.
    """

    number: int
    is_final: bool
    width: int
    references: tuple[Reference, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrajectoryPiece:
    """A part of a message that is being written."""

    round: int
    index: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class AttemptFailed:
    """Another attempt may follow."""

    round: int
    index: int
    attempt: Attempt


@dataclasses.dataclass(frozen=True)
class TrajectoryEnded:
    """A trajectory of this run; those of an earlier run are not told again."""

    trajectory: Trajectory


@dataclasses.dataclass(frozen=True)
class RoundEnded:
    round: Round


Event = RoundStarted | TrajectoryPiece | AttemptFailed | TrajectoryEnded | RoundEnded
Notify = Callable[[Event], None]
Pieces = Literal["none", "final", "all"]  # the rounds whose messages observers see while they are written


def ignore(event: Event) -> None:
    pass
