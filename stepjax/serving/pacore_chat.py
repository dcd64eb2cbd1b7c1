"""A chat that is answered with PaCoRe: rounds of calls, then an answer that is one of OpenAI's like any other.

In a stream the rounds are told by chunks whose delta is empty, with a field `pacore` of their own; clients that do not
know it see an answer that takes its time.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from stepjax.errors import ContextLengthError
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator, ProblemRun, RoundFailedError
from stepjax.pacore.records import (
    AttemptFailed,
    Event,
    Notify,
    Outcome,
    Pieces,
    Problem,
    RoundEnded,
    TrajectoryEnded,
    TrajectoryPiece,
    ignore,
)
from stepjax.rollouts.sampler import Piece, Sampler
from stepjax.serving.context import Context
from stepjax.serving.errors import ApiError, TooLongError, busy
from stepjax.serving.generation import Usage
from stepjax.serving.metrics import Metrics
from stepjax.serving.pacore_json import Teller
from stepjax.serving.pacore_sampler import BUSY
from stepjax.serving.replies import ChatReply
from stepjax.serving.schemas import ChatRequest, PacoreOptions

PROGRESS_SECONDS = 1.0  # between two events that tell how many tokens there are

# Seeds depend on a problem's name; here the request's seed alone decides.
_NAME = "request"
# What an upstream says of a request that it will never take.
_REFUSED = re.compile(r"status (400|404|413|422)\b")


class PacoreChat:
    """
    Raises:
        ConfigError: the sampler cannot do what the configuration asks for.
    """

    def __init__(self, context: Context, request: ChatRequest, name: str, config: PacoreConfig, sampler: Sampler):
        """
        Args:
            name: what the request calls the model.
        """
        options = request.pacore or PacoreOptions()
        tools = request.tools if request.uses_tools else None
        self._metrics = context.metrics
        self._config = config
        self._coordinator = Coordinator(sampler, config)
        self._run: ProblemRun | None = None
        self._teller = Teller(config, sampler.tokens, options.include)
        self._reply = ChatReply(request, name)
        self._problem = Problem(
            id=_NAME,
            messages=tuple(message.model_dump(exclude_none=True) for message in request.messages),
            tools=tuple(tool.model_dump(exclude_none=True) for tool in tools or ()),
        )

    async def whole(self) -> dict[str, Any]:
        solved = await self._solve(ignore, "none")
        message = {"role": "assistant", "content": None if solved.rollout.tool_calls else "", **_message(solved)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": solved.rollout.finish_reason}
        told = {**self._teller.result(solved), "rounds": self._teller.rounds(solved)}
        return {**self._reply.whole([choice], _usage(solved)), "pacore": told}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        events: asyncio.Queue[Event | None] = asyncio.Queue()  # bounded by what the calls may write
        solving = asyncio.create_task(self._solve(events.put_nowait, "final"))
        solving.add_done_callback(lambda _: events.put_nowait(None))
        delta: Piece = {"role": "assistant", "content": ""}  # the first says whose words will follow
        try:
            async with contextlib.aclosing(self._told(events)) as parts:
                async for piece, event in parts:
                    yield self._chunk({**delta, **piece}, event)
                    delta = {}
            solved = await solving
            if solved.answered_by != "synthesis":  # else it has been sent as it was written
                message = _message(solved)
                calls = message.pop("tool_calls", ())
                for field, value in message.items():
                    yield self._chunk({field: value})
                if calls:
                    yield self._chunk({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
            yield self._chunk({}, {"type": "done", **self._teller.result(solved)}, solved.rollout.finish_reason)
            for chunk in self._reply.usage_chunks(_usage(solved)):
                yield chunk
        finally:
            solving.cancel()
            await asyncio.gather(solving, return_exceptions=True)

    async def _told(
        self, events: asyncio.Queue[Event | None]
    ) -> AsyncGenerator[tuple[Piece, dict[str, Any] | None], None]:
        """Pieces of the answer and events to be sent, until there is a None."""
        clock = asyncio.get_running_loop().time
        due, known = clock() + PROGRESS_SECONDS, {}
        while True:
            try:
                async with asyncio.timeout_at(due):
                    new = [await events.get()]
            except TimeoutError:
                due = clock() + PROGRESS_SECONDS
                counts = self._run.tokens_under_way() if self._run else {}
                if counts != known:
                    known = counts
                    yield {}, _progress(counts)
                continue
            while not events.empty():
                new.append(events.get_nowait())
            for event in _joined(new):
                if event is None:
                    return
                if isinstance(event, TrajectoryPiece):
                    yield event.piece, None
                else:
                    yield {}, self._teller.event(event)

    def _chunk(
        self, delta: Piece, event: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        chunk = self._reply.chunk({"index": 0, "delta": delta, "finish_reason": finish_reason})
        return chunk if event is None else {**chunk, "pacore": event}

    async def _solve(self, notify: Notify, pieces: Pieces) -> Outcome:
        """
        Raises:
            ApiError: nothing came of it.
            StepjaxError: the conversation is not usable.
        """

        def tell(event: Event) -> None:
            _count(self._metrics, event)
            notify(event)

        ended = "cancelled"
        try:
            is_single = not self._config.schedule and pieces != "none"
            run = self._coordinator.begin(self._problem, notify=tell, pieces="all" if is_single else pieces)
            self._run = run
            solved = await run.solve() if self._config.schedule else await self._ask_once(run)
            ended = solved.answered_by
            return solved
        except ContextLengthError as error:
            ended = "failed"
            raise TooLongError(str(error), param="messages", excess=error.excess) from error
        except RoundFailedError as error:
            ended = "failed"
            raise _as_api_error(error) from error
        except Exception:
            ended = "failed"
            raise
        finally:
            self._metrics.pacore_requests.labels(ended).inc()

    async def _ask_once(self, run: ProblemRun) -> Outcome:
        """Without rounds a request is passed on, and whatever is written is its answer, a thought that was cut off
        included.
        """
        try:
            await run.round(1)
        except RoundFailedError as error:
            if error.rounds[-1].trajectories[0].status != "ok":
                raise
        return run.outcome(run.rounds[-1], 0, "synthesis")


def _joined(events: Sequence[Event | None]) -> Iterator[Event | None]:
    """Neighbouring pieces of one text as one: a loaded server sends fewer and longer chunks."""
    before: Event | None = None
    for event in events:
        if isinstance(event, TrajectoryPiece):
            if isinstance(before, TrajectoryPiece):
                joined = _join(before.piece, event.piece)
                if joined is not None:
                    before = TrajectoryPiece(event.round, event.index, joined)
                    continue
                yield before
            before = event
            continue
        if before is not None:
            yield before
            before = None
        yield event
    if before is not None:
        yield before


def _join(first: Piece, second: Piece) -> Piece | None:
    for field in ("content", "reasoning_content"):
        if first.keys() == second.keys() == {field}:
            return {field: first[field] + second[field]}
    return None


def _message(solved: Outcome) -> dict[str, Any]:
    """The fields of the answer that hold something."""
    fields = {
        "reasoning_content": solved.rollout.reasoning,
        "content": solved.content,
        "tool_calls": list(solved.rollout.tool_calls),
    }
    return {name: value for name, value in fields.items() if value}


def _usage(solved: Outcome) -> dict[str, Any]:
    """Of all calls: tokens of tries that failed were drawn, too."""
    totals = solved.totals
    return Usage(
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.shared_tokens,
        completion_tokens=totals.output_tokens + totals.lost_tokens,
    ).as_json()


def _progress(counts: dict[tuple[int, int], int]) -> dict[str, Any]:
    rounds = {round_ for round_, _ in counts}
    tokens = {str(index): count for (_, index), count in counts.items()}
    return {"type": "progress", "round": max(rounds, default=None), "tokens": tokens}


def _count(metrics: Metrics, event: Event) -> None:
    if isinstance(event, TrajectoryEnded):
        trajectory = event.trajectory
        metrics.pacore_calls.labels(trajectory.status).inc()
        metrics.pacore_tokens.inc(trajectory.rollout.num_tokens)
    elif isinstance(event, AttemptFailed):
        metrics.pacore_attempts.labels(event.attempt.status).inc()
    elif isinstance(event, RoundEnded):
        metrics.pacore_rounds.inc()
        for reason, count in event.round.losses.items():
            metrics.pacore_losses.labels(reason).inc(count)


def _as_api_error(error: RoundFailedError) -> ApiError:
    round_ = error.rounds[-1]
    errors = [each.error or "" for each in round_.trajectories]
    losses = ", ".join(f"{count} {reason}" for reason, count in round_.losses.items())
    what = "the final call" if round_.is_final else f"round {round_.number + 1} of {round_.width}"
    first = next(filter(None, errors), None)
    message = f"PaCoRe: nothing came of {what} ({losses})" + (f"; the first error: {first}" if first else "")
    if all(each == BUSY or each.startswith("status 429") for each in errors):
        return busy(message)
    if all(map(_REFUSED.match, errors)):
        return ApiError(400, message, code="upstream_refused")
    return ApiError(502, message, code="pacore_failed")
