"""Chats answered with PaCoRe: rounds of calls, then an ordinary OpenAI answer.

A stream reports the rounds in chunks with an empty delta and a field `pacore`. Clients that do not know the field just
see a slow answer.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from stepjax.errors import BusyError, ConfigError, ContextLengthError, StepjaxError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import PacoreConfig, Schedule, check_schedule, num_calls, parse_schedule, show
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
from stepjax.processing.tokens import Example
from stepjax.rollouts.engine import EngineSampler
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, PreparedPrompt, Sampler, SamplerError
from stepjax.serving.context import ChosenModel, Context, EngineContext
from stepjax.serving.errors import ApiError, TooLongError, busy, invalid
from stepjax.serving.images import coded_images, data_uri_bytes, image_urls, is_data_uri, name_of, name_of_coded
from stepjax.serving.pacore_json import RoundsJson
from stepjax.serving.schemas import ChatMessage, ChatRequest, PacoreOptions
from stepjax.serving.streams import Frame, Json, choice_of, respond, usage
from stepjax.serving.validation import check_chat_text, parse_request

if TYPE_CHECKING:  # it takes a second to import
    from stepjax.rollouts.endpoint import EndpointSampler

PROGRESS_SECONDS = 1.0  # between two events with the token counts so far

_BUSY = "the engine's queue is full"
_NAME = "request"  # seeds depend on the problem's name; a constant leaves them to the request's seed
_REFUSED = re.compile(r"status (400|404|413|422)\b")  # the upstream will never accept the request
_SEED_BITS = 53  # JSON numbers are exact up to here everywhere

_log = logging.getLogger(__name__)


async def upstream_chat_completions(context: Context, upstream: "EndpointSampler", body: Json) -> Response:
    """`/v1/chat/completions` in front of another server."""
    request, limits = parse_request(ChatRequest, body), context.settings.limits
    model = await context.choose(request.model)
    config = pacore_config(request, model, context)
    # The upstream would refuse these too, but only after the request was sent there many times.
    await context.threads.run(check_chat_text, request, limits)
    for place, url in image_urls(request, limits, allow_remote=context.settings.allow_remote_images).items():
        if is_data_uri(url):
            await context.threads.run(data_uri_bytes, url, limits, name_of(place))
    for place in coded_images(request):
        where = name_of_coded(place)
        message = f"{where}: the upstream has no codec for features; send the image"
        raise invalid(message, where, "features_not_supported")
    chat = PacoreChat(context, request, model.name, config, UpstreamSampler(upstream, request))
    return await respond(chat, stream=request.stream, limits=limits)


# Request -> PacoreConfig.


def pacore_config(request: ChatRequest, model: ChosenModel, context: Context) -> PacoreConfig:
    """Raises ApiError: 400, a value is out of range or incompatible with PaCoRe."""
    options, base, most = request.pacore or PacoreOptions(), context.pacore, context.settings.limits.pacore_calls
    schedule = _schedule(options, model, base.schedule)
    calls = num_calls(schedule)
    if calls > most:
        message = f"schedule {show(schedule)[:100]} takes {calls} calls, more than the limit of {most} for a request"
        raise invalid(message, "pacore.schedule")
    if request.n != 1:
        message = f"n={request.n}: PaCoRe gives one answer; set the number of trajectories with the schedule"
        raise invalid(message, "n")
    if request.logprobs:
        message = "logprobs describe one sample, and PaCoRe draws many: leave them out"
        raise invalid(message, "logprobs", "unsupported_parameter")
    sampling = request.params(base.sampling)
    if sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=secrets.randbits(_SEED_BITS))
    # Later rounds need room for more than a word.
    room = base.answer_tokens if context.max_context is None else max(1, context.max_context // 4)
    try:
        return dataclasses.replace(
            base,
            **_given(options, "order", "overflow", "truncated", "images"),
            schedule=schedule,
            sampling=sampling,
            answer_tokens=min(base.answer_tokens, room),
            limits=dataclasses.replace(
                base.limits, **_given(options, "quorum", "round_seconds", "call_seconds", "retries", "agreement")
            ),
        )
    except ConfigError as error:
        raise _refused(error, str(error).partition("=")[0]) from None


def _schedule(options: PacoreOptions, model: ChosenModel, default: Schedule) -> Schedule:
    given = options.schedule
    if given is None:
        return default if model.schedule is None else model.schedule
    try:
        schedule = parse_schedule(given) if isinstance(given, str) else check_schedule(tuple(given))
    except ConfigError as error:
        raise _refused(error, "schedule") from None
    if model.schedule not in (None, schedule):
        raise invalid(f"pacore.schedule and the model {model.name!r} differ: give one of them", "pacore.schedule")
    return schedule


def _given(options: PacoreOptions, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _refused(error: ConfigError, name: str) -> ApiError:
    return invalid(str(error)[:500], f"pacore.{name}" if name in PacoreOptions.model_fields else None)


# The samplers of a request's rounds. Internal errors go to the log, not to the client.


class RequestSampler(EngineSampler):
    """Samples from this server's engine. Each round's prompt is built like a chat's, within the limits on requests."""

    def __init__(self, context: EngineContext, request: ChatRequest):
        """
        Args:
            request: every field except `messages` applies to every call.
        """
        super().__init__(context.engine, context.processor, open_example=self._chat)
        self._prompts, self._request = context.prompts, request
        self._fetched: dict[str, bytes] = {}  # remote images are fetched once, for all rounds

    @contextlib.asynccontextmanager
    async def _chat(self, messages: Sequence[Json], tools: Sequence[Json]) -> AsyncIterator[Example]:
        made = [ChatMessage.model_validate(message) for message in messages]
        request = self._request.model_copy(update={"messages": made})
        try:
            async with self._prompts.chat(request, fetched=self._fetched) as example:
                yield example
        except TooLongError as error:
            raise ContextLengthError(error.message, excess=error.excess) from error

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """See `Sampler.sample`."""
        try:
            return await super().sample(prompt, params, listener)
        except StepjaxError:
            raise
        except Exception as error:
            is_busy = isinstance(error.__cause__, BusyError)
            reason = _BUSY if is_busy else "the engine could not finish the call; see the server's log"
            if not is_busy:
                _log.error("a PaCoRe call failed", exc_info=error)
            raise SamplerError(reason, is_temporary=is_busy, num_tokens=listener.num_tokens) from error


class UpstreamSampler:
    """Samples from another server."""

    def __init__(self, endpoint: "EndpointSampler", request: ChatRequest):
        """
        Args:
            request: its chat template options apply to every call.
        """
        options = request.chat_template_kwargs
        self._endpoint = endpoint
        self._fields = {"chat_template_kwargs": options.model_dump(exclude_none=True)} if options else {}
        self.max_context, self.tokens = endpoint.max_context, endpoint.tokens

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Sequence[Json], tools: Sequence[Json], *, answer_tokens: int
    ) -> AsyncIterator[PreparedPrompt]:
        """See `Sampler.prompt`."""
        async with self._endpoint.prompt(messages, tools, answer_tokens=answer_tokens) as prompt:
            yield PreparedPrompt(prompt.num_tokens, {**prompt.payload, **self._fields})

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """See `Sampler.sample`."""
        try:
            return await self._endpoint.sample(prompt, params, listener)
        except SamplerError as error:
            if not str(error).startswith(("status 401", "status 403")):
                raise
            # The message may quote part of the key, which the client must not see.
            _log.error("the upstream refused the key: %s", error)
            raise SamplerError("the upstream refuses this server's key", is_temporary=False) from None


# The answer.


class PacoreChat:
    """An `Answer` by rounds. Raises ConfigError: the sampler does not support the configuration."""

    def __init__(self, context: Context, request: ChatRequest, model: str, config: PacoreConfig, sampler: Sampler):
        options = request.pacore or PacoreOptions()
        tools = request.tools if request.uses_tools else None
        self._metrics, self._config = context.metrics, config
        self._coordinator = Coordinator(sampler, config)
        self._json = RoundsJson(config, sampler.tokens, options.include)
        self._frame = Frame(request, model)
        self._problem = Problem(
            id=_NAME,
            messages=tuple(message.model_dump(exclude_none=True) for message in request.messages),
            tools=tuple(tool.model_dump(exclude_none=True) for tool in tools or ()),
        )

    async def whole(self) -> Json:
        outcome = await self._solve(self._begin(ignore, "none"))
        told = {**self._json.result(outcome), "rounds": self._json.rounds(outcome)}
        return {**self._frame.whole([choice_of(0, _answer(outcome))], _usage(outcome)), "pacore": told}

    async def chunks(self) -> AsyncGenerator[Json, None]:
        events: asyncio.Queue[Event | Json | None] = asyncio.Queue()  # bounded by the calls' token limits
        run = self._begin(events.put_nowait, "final" if self._config.schedule else "all")
        solving = asyncio.create_task(self._solve(run))
        solving.add_done_callback(lambda _: events.put_nowait(None))
        telling = asyncio.create_task(_tell_progress(run, events))
        delta: Json = {"role": "assistant", "content": ""}  # in the first chunk
        new: list[Event | Json | None] = []
        try:
            while None not in new:
                new = [await events.get()]
                while not events.empty():
                    new.append(events.get_nowait())
                for event in _joined(new):
                    if isinstance(event, TrajectoryPiece):
                        yield self._chunk({**delta, **event.piece})
                    elif event is not None:
                        yield self._chunk(delta, event if isinstance(event, dict) else self._json.event(event))
                    delta = {}
            outcome = await solving
            answer = _answer(outcome)
            if outcome.answered_by != "synthesis":  # a synthesis was streamed already
                calls = [{"index": i, **call} for i, call in enumerate(answer.tool_calls)]
                fields = {"reasoning_content": answer.reasoning, "content": answer.content, "tool_calls": calls}
                for name, value in fields.items():
                    if value:
                        yield self._chunk({name: value})
            yield self._chunk({}, {"type": "done", **self._json.result(outcome)}, answer.finish_reason)
            for chunk in self._frame.usage_chunks(_usage(outcome)):
                yield chunk
        finally:
            for task in (solving, telling):
                task.cancel()
            await asyncio.gather(solving, telling, return_exceptions=True)

    def _chunk(self, delta: Json, event: Json | None = None, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._frame.chunk(choice), **({} if event is None else {"pacore": event})}

    def _begin(self, notify: Notify, pieces: Pieces) -> ProblemRun:
        def tell(event: Event) -> None:
            self._count(event)
            notify(event)

        return self._coordinator.begin(self._problem, notify=tell, pieces=pieces)

    async def _solve(self, run: ProblemRun) -> Outcome:
        """Raises ApiError: no answer; StepjaxError: the conversation cannot be used."""
        ended: str | None = "failed"
        try:
            outcome = await (run.solve() if self._config.schedule else _ask_once(run))
            ended = outcome.answered_by
            return outcome
        except asyncio.CancelledError:
            ended = "cancelled"
            raise
        except ContextLengthError as error:
            raise TooLongError(str(error), param="messages", excess=error.excess) from error
        except RoundFailedError as error:
            raise _as_api_error(error) from error
        finally:
            self._metrics.pacore_requests.labels(ended).inc()

    def _count(self, event: Event) -> None:
        metrics = self._metrics
        if isinstance(event, TrajectoryEnded):
            metrics.pacore_calls.labels(event.trajectory.status).inc()
            metrics.pacore_tokens.inc(event.trajectory.rollout.num_tokens)
        elif isinstance(event, AttemptFailed):
            metrics.pacore_attempts.labels(event.attempt.status).inc()
        elif isinstance(event, RoundEnded):
            metrics.pacore_rounds.inc()
            for reason, count in event.round.losses.items():
                metrics.pacore_losses.labels(reason).inc(count)


async def _ask_once(run: ProblemRun) -> Outcome:
    """Makes one call without rounds. Everything it writes is the answer, even reasoning that was cut off."""
    try:
        await run.round(1)
    except RoundFailedError as error:
        if error.rounds[-1].trajectories[0].status != "ok":
            raise
    return run.outcome(run.rounds[-1], 0, "synthesis")


async def _tell_progress(run: ProblemRun, events: asyncio.Queue[Any]) -> None:
    known: dict[tuple[int, int], int] = {}
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        counts = run.tokens_under_way()
        if counts != known:
            known = counts
            tokens = {str(index): count for (_, index), count in counts.items()}
            latest = max((number for number, _ in counts), default=None)
            events.put_nowait({"type": "progress", "round": latest, "tokens": tokens})


def _joined(events: Sequence[Event | Json | None]) -> list[Event | Json | None]:
    """Joins neighbouring pieces of one text: a loaded server sends fewer and longer chunks."""
    made: list[Event | Json | None] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, TrajectoryPiece) and isinstance(last, TrajectoryPiece):
            [field, *others] = {**last.piece, **event.piece}
            if not others and field != "tool_calls":
                made[-1] = dataclasses.replace(last, piece={field: last.piece[field] + event.piece[field]})
                continue
        made.append(event)
    return made


def _answer(outcome: Outcome) -> Rollout:
    return dataclasses.replace(outcome.rollout, content=outcome.content)


def _usage(outcome: Outcome) -> Json:
    """Usage of all calls, including the tokens of failed attempts."""
    totals = outcome.totals
    return usage(totals.prompt_tokens, totals.shared_tokens, totals.output_tokens + totals.lost_tokens)


def _as_api_error(error: RoundFailedError) -> ApiError:
    round_ = error.rounds[-1]
    errors = [each.error or "" for each in round_.trajectories]
    losses = ", ".join(f"{count} {reason}" for reason, count in round_.losses.items())
    what = "the final call" if round_.is_final else f"round {round_.number + 1} of {round_.width}"
    first = next(filter(None, errors), None)
    message = f"PaCoRe: {what} left no message ({losses})" + (f"; first error: {first}" if first else "")
    if all(each == _BUSY or each.startswith("status 429") for each in errors):
        return busy(message)
    if all(map(_REFUSED.match, errors)):
        return ApiError(400, message, code="upstream_refused")
    return ApiError(502, message, code="pacore_failed")
