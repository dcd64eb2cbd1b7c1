"""Rounds as clients see them: stream events, and the field `pacore` of a whole answer.

The request's `include` sets the detail of each trajectory: counts, plus its message, or plus its full text. The final
call reports counts only, since its text is the answer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from stepjax.pacore.compaction import citations, compact
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import (
    AttemptFailed,
    Event,
    Outcome,
    Reference,
    Round,
    RoundEnded,
    RoundStarted,
    Trajectory,
    TrajectoryEnded,
)
from stepjax.rollouts.sampler import TokenCounter

Include = Literal["summary", "messages", "full"]


class RoundsJson:
    def __init__(self, config: PacoreConfig, tokens: TokenCounter | None, include: Include):
        """
        Args:
            tokens: the sampler's token counter.
        """
        self._config, self._tokens, self._include = config, tokens, include
        self._num_references: dict[int, int] = {}  # in each round's prompt

    def event(self, event: Event) -> dict[str, Any] | None:
        """The JSON of an event; None for pieces of messages, which are sent as deltas."""
        if isinstance(event, RoundStarted):
            self._num_references[event.number] = len(event.references)
            return {
                "type": "round_started",
                "round": event.number,
                "is_final": self._is_final(event.number),
                "width": event.width,
                "references": _references(event.references),
                "seconds": round(event.seconds, 3),
            }
        if isinstance(event, AttemptFailed):
            place = {"round": event.round, "index": event.index, "is_final": self._is_final(event.round)}
            return {"type": "attempt_failed", **place, **_as_dict(event.attempt)}
        if isinstance(event, TrajectoryEnded):
            return {"type": "trajectory_ended", **self._trajectory(event.trajectory)}
        if isinstance(event, RoundEnded):
            return {"type": "round_ended", **self._round(event.round)}
        return None

    def result(self, outcome: Outcome) -> dict[str, Any]:
        """The result as a whole, without the rounds."""
        return {
            "schedule": list(self._config.schedule),
            "seed": self._config.seed,
            "answered_by": outcome.answered_by,
            "chosen": outcome.chosen and list(outcome.chosen),
            "seconds": round(outcome.seconds, 3),
            "totals": _as_dict(outcome.totals),
        }

    def rounds(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Every round, with its trajectories."""
        self._num_references = {each.number: len(each.references) for each in outcome.rounds}
        return [
            {
                **self._round(each),
                "references": _references(each.references),
                "trajectories": [self._trajectory(trajectory) for trajectory in each.trajectories],
            }
            for each in outcome.rounds
        ]

    def _is_final(self, number: int) -> bool:
        return number == len(self._config.schedule)

    def _round(self, round_: Round) -> dict[str, Any]:
        return {
            "round": round_.number,
            "is_final": self._is_final(round_.number),
            "width": round_.width,
            "messages": len(round_.messages),
            "losses": dict(round_.losses),
            "cut_references": round_.cut_references,
            "cut_answers": round_.cut_answers,
            "cites": self._cites(round_.number, *round_.trajectories),
            "totals": _as_dict(round_.totals),
        }

    def _trajectory(self, trajectory: Trajectory) -> dict[str, Any]:
        left, rollout = compact(trajectory, self._config, self._tokens), trajectory.rollout
        told = {
            "round": trajectory.round,
            "index": trajectory.index,
            "status": trajectory.status,
            "loss": None if isinstance(left, Reference) else left,
            "finish_reason": trajectory.finish_reason,
            "error": trajectory.error,
            "seed": rollout.seed,
            "retries": len(trajectory.attempts),
            "prompt_tokens": rollout.num_prompt_tokens,
            "cached_tokens": rollout.num_cached_tokens,
            "output_tokens": rollout.num_tokens,
            "start": round(rollout.start, 3),
            "seconds": round(rollout.seconds, 3),
            "cites": self._cites(trajectory.round, trajectory),
        }
        if self._is_final(trajectory.round) or self._include == "summary":
            return told
        told["message"] = left.text if isinstance(left, Reference) else None
        if self._include == "full":
            told["content"] = rollout.content
            told["reasoning_content"] = rollout.reasoning
            told["tool_calls"] = list(rollout.tool_calls)
        return told

    def _cites(self, number: int, *trajectories: Trajectory) -> dict[str, int]:
        """How often reasoning and answer cite each reference, by its number in the prompt."""
        text = "\n".join(f"{each.rollout.reasoning or ''}\n{each.rollout.content}" for each in trajectories)
        found = citations(text, self._num_references.get(number, 0))
        return {str(reference): count for reference, count in found.items()}


def _references(references: Sequence[Reference]) -> list[dict[str, Any]]:
    """Which trajectories of the previous round they come from; the first is "Reference 1"."""
    return [{"index": reference.index, "was_cut": reference.was_cut} for reference in references]


def _as_dict(record: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(record)
    return {**fields, "seconds": round(fields["seconds"], 3)}
