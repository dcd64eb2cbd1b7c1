"""PaCoRe's records (problems, trajectories, rounds, outcomes) and the events that report them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pydantic

from stepjax.rollouts.rollout import Count, Number, Rollout, Text, validated
from stepjax.rollouts.sampler import Piece

# "ok": the call returned; otherwise it failed after retries or was cancelled.
Status = Literal["ok", "error", "timeout", "cancelled"]

# "synthesis": the final call (or the only one). "agreement": enough messages of a round agreed, and later rounds were
# skipped. "fallback": the final call gave no answer; the most frequent answer of the last round is used instead.
# "vote", "score": a baseline's choice.
AnsweredBy = Literal["synthesis", "agreement", "vote", "score", "fallback"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A conversation to continue, whose last message is a user's or a tool's, as in OpenAI's API.

    Attributes:
        responses: messages of earlier trajectories, shown to the first round.
        ground_truth: the answer, if known.
        extra: the record's other fields, passed through.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    ground_truth: Any = None
    responses: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def given(self) -> "tuple[Reference, ...]":
        """The references of the first round."""
        return tuple(Reference(i, text) for i, text in enumerate(self.responses))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A failed attempt of a call.

    Attributes:
        status: "error" or "timeout"; in the final round, which must give an answer, also "empty" and "truncated".
        output_tokens: sampled and lost, if known.
    """

    status: Text
    error: Text
    seconds: Number
    output_tokens: Count = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A call of the model: its last attempt, and the failed ones before it.

    Attributes:
        round: from 0; the final one is the schedule's length.
        index: from 0 to the round's width - 1.
        rollout: without token ids. If the call did not return, only what is known (seed, time, tokens so far), with the
            status as finish_reason. `start` counts from the beginning of the problem.
        attempts: the failed attempts, including the last one if the call was given up.
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
        """Tokens of failed attempts."""
        return sum(attempt.output_tokens for attempt in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """The JSON form; fields with their default value are omitted."""
        given = {"round": self.round, "index": self.index, "status": self.status, "rollout": self.rollout.to_json()}
        if self.error is not None:
            given["error"] = self.error
        if self.attempts:
            given["attempts"] = [dataclasses.asdict(attempt) for attempt in self.attempts]
        return given

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Trajectory":
        """The inverse of `to_json`, also for older versions.

        Raises:
            RecordError, KeyError, TypeError: a field is missing, unknown or of the wrong type.
        """
        fields = dict(fields) if "rollout" in fields else _of_older_version(fields)
        return validated(_TRAJECTORY, {**fields, "rollout": Rollout.from_json(fields["rollout"])}, "trajectory")


_TRAJECTORY = pydantic.TypeAdapter(Trajectory)


def _of_older_version(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the older form, in which a trajectory had the rollout's fields itself."""
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
    """A trajectory's compacted message, as the next round sees it.

    Attributes:
        index: the trajectory's index in its round.
        was_cut: only the end is left.
    """

    index: int
    text: str
    was_cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """
    Attributes:
        references: those in its prompt, in the order of "Reference 1", "Reference 2" and so on.
        own_references: the same for each trajectory, if each had its own prompt; `references` is then the first's.
        trajectories: by index.
        messages: of the trajectories that left one, by index.
        losses: the number that left none, by reason: a status; "empty", nothing was written; "truncated", cut off in
            the reasoning. `did_not_fit` counts references that did not fit this round's prompt.
        cut_references: references shortened to fit.
        cut_answers: messages whose answer was cut off by the token limit; they are passed on anyway.
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
        lost_tokens: of failed attempts; not in `output_tokens`.
        shared_tokens: prompt tokens computed once for several calls.
        seconds: the sum of the calls' durations.
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
    """The result of a problem, with all its rounds.

    Attributes:
        chosen: round and index of the trajectory that gives the answer; None if the problem failed.
        error: why it failed, in a batch run.
        correct: whether the answer is right, in a batch run; None if unknown.
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
        """The chosen trajectory's rollout."""
        return Rollout() if self.chosen is None else self.rounds[self.chosen[0]].trajectories[self.chosen[1]].rollout

    @property
    def content(self) -> str:
        """The answer, without reasoning; the end of the reasoning if that was cut off before an answer."""
        if self.chosen is None or self.rollout.has_answer:
            return self.rollout.content
        number, index = self.chosen
        return next((each.text for each in self.rounds[number].messages if each.index == index), "")

    @property
    def totals(self) -> Totals:
        return Totals.of(each for round_ in self.rounds for each in round_.trajectories)


# Events for observers of a problem: the journal, progress, streams, live pages.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """
    Attributes:
        references: those in the prompt; if each call has its own, the first call's.
        width: the number of trajectories, including those known from an earlier run.
        seconds: since the problem began.
    """

    number: int
    is_final: bool
    width: int
    references: tuple[Reference, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrajectoryPiece:
    """A streamed part of a message."""

    round: int
    index: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class AttemptFailed:
    """An attempt failed; another may follow."""

    round: int
    index: int
    attempt: Attempt


@dataclasses.dataclass(frozen=True)
class TrajectoryEnded:
    """A trajectory of this run ended; those of an earlier run are not reported again."""

    trajectory: Trajectory


@dataclasses.dataclass(frozen=True)
class RoundEnded:
    round: Round


Event = RoundStarted | TrajectoryPiece | AttemptFailed | TrajectoryEnded | RoundEnded
Notify = Callable[[Event], None]
Pieces = Literal["none", "final", "all"]  # the rounds whose messages are streamed to observers


def ignore(event: Event) -> None:
    pass
