"""What observers are told while a problem is worked on: journals, progress lines, streams, live pages."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from stepjax.pacore.records import Attempt, Message, Round, Trajectory
from stepjax.rollouts.sampler import Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """
    Attributes:
        references: of the prompt; where each call has references of its own, those of the first.
        width: how many trajectories will be drawn, those that are known from an earlier run included.
        seconds: since the problem was begun.
    """

    number: int
    is_final: bool
    width: int
    references: tuple[Message, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrajectoryPiece:
    """A part of a message that is being written."""

    round: int
    index: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class AttemptFailed:
    """A try led to nothing; another one may follow."""

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
Pieces = Literal["none", "final", "all"]  # the rounds whose messages are told of while they are written


def ignore(event: Event) -> None:
    pass


def event_json(event: Event) -> dict[str, Any]:
    """`{"type": "round_started", ...}` and so on."""
    names = {
        RoundStarted: "round_started",
        TrajectoryPiece: "trajectory_piece",
        AttemptFailed: "attempt_failed",
        TrajectoryEnded: "trajectory_ended",
        RoundEnded: "round_ended",
    }
    fields = event.round.to_json() if isinstance(event, RoundEnded) else dataclasses.asdict(event)
    return {"type": names[type(event)], **fields}
