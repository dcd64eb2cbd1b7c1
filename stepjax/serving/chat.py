"""`/v1/chat/completions`: prompt -> engine deltas -> rollouts -> choices, whole or streamed."""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence

from starlette.responses import Response

from stepjax.errors import StepjaxError
from stepjax.inference.request import Delta, SamplingParams, TokenLogprob
from stepjax.interop.text_processor import AnyProcessor, starts_thinking
from stepjax.processing.tokens import Example
from stepjax.rollouts.engine import EnginePrompt, RolloutBuilder
from stepjax.rollouts.rollout import Rollout
from stepjax.serving.context import EngineContext
from stepjax.serving.errors import engine_failed, shutting_down
from stepjax.serving.pacore import PacoreChat, RequestSampler, pacore_config
from stepjax.serving.schemas import ChatRequest
from stepjax.serving.streams import Frame, Json, choice_of, respond, usage
from stepjax.serving.validation import parse_request

# Deltas queued for a slow reader. When the queue is full, the engine buffers; `max_tokens` bounds that.
_MAX_WAITING_DELTAS = 64
LEAST_LOGPROB = -9999.0  # JSON has no infinity

_log = logging.getLogger(__name__)


async def chat_completions(context: EngineContext, body: Json) -> Response:
    request = parse_request(ChatRequest, body)
    model = await context.choose(request.model)
    context.check_samples(request.n)
    request = await context.prompts.complete(request)
    if request.pacore is None and model.schedule is None:
        chat = EngineChat(context, request, model.name)
    else:
        config = pacore_config(request, model, context)
        chat = PacoreChat(context, request, model.name, config, RequestSampler(context, request))
    return await respond(chat, stream=request.stream, limits=context.settings.limits)


class EngineChat:
    """An `Answer` by the engine. Whole and streamed answers share one parser, so they agree."""

    def __init__(self, context: EngineContext, request: ChatRequest, model: str):
        self._context, self._request = context, request
        self._frame = Frame(request, model)
        self._rollouts: list[RolloutBuilder] = []  # one for each sample, once the prompt is ready

    async def whole(self) -> Json:
        async with self._sampling() as batches:
            async for batch in batches:
                for delta in batch:
                    self._rollouts[delta.sample].add(delta)
        rollouts = [each.rollout() for each in self._rollouts]
        choices = [
            choice_of(index, rollout, self._logprobs(made.logprobs))
            for index, (rollout, made) in enumerate(zip(rollouts, self._rollouts, strict=True))
        ]
        return self._frame.whole(choices, _usage(rollouts))

    async def chunks(self) -> AsyncGenerator[Json, None]:
        num_sent: dict[int, int] = {}  # log-probabilities sent, by sample; they wait for held-back text
        async with self._sampling() as batches:
            async for batch in batches:
                for delta in batch:
                    index, made = delta.sample, self._rollouts[delta.sample]
                    if index not in num_sent:
                        num_sent[index] = 0
                        yield self._chunk(index, {"role": "assistant", "content": ""})
                    for piece in made.add(delta):
                        yield self._chunk(index, piece, self._logprobs(made.logprobs[num_sent[index] :]))
                        num_sent[index] = len(made.logprobs)
                    if delta.finish_reason is not None:
                        end = {"finish_reason": made.finish_reason, "stop_reason": delta.stop_reason}
                        yield self._chunk(index, {}, self._logprobs(made.logprobs[num_sent[index] :]), **end)
        for chunk in self._frame.usage_chunks(_usage([each.rollout() for each in self._rollouts])):
            yield chunk

    @contextlib.asynccontextmanager
    async def _sampling(self) -> AsyncIterator[AsyncIterator[list[Delta]]]:
        context, request = self._context, self._request
        async with context.prompts.chat(request) as example:
            prompt = EnginePrompt(example, starts_thinking(context.processor, example), request.uses_tools)
            self._rollouts = [RolloutBuilder(prompt, call_prefix=uuid.uuid4().hex[:16]) for _ in range(request.n)]
            batches = generate(context, [example], request.params(), request_id=self._frame.id)
            async with contextlib.aclosing(batches):
                yield batches

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, **end: object) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **end}
        return self._frame.chunk(choice)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        return chat_logprobs(logprobs, self._context.processor) if self._request.logprobs else None


def _usage(rollouts: Sequence[Rollout]) -> Json:
    """Usage of samples of one prompt, which counts once."""
    first = rollouts[0]
    return usage(first.num_prompt_tokens, first.num_cached_tokens, sum(each.num_tokens for each in rollouts))


def chat_logprobs(logprobs: Iterable[TokenLogprob], processor: AnyProcessor) -> Json:
    """Log-probabilities of all sampled tokens (also reasoning and markup), before temperature and filters."""

    def entry(token: int, logprob: float) -> Json:
        text = processor.decode([token], False)
        # The token is part of a character; the tokenizer does not expose its bytes.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}

    return {
        "content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]} for each in logprobs
        ]
    }


async def generate(
    context: EngineContext, prompts: Sequence[Example], params: SamplingParams, *, request_id: str
) -> AsyncGenerator[list[Delta], None]:
    """Samples all prompts. Samples of prompt i are numbered from i * n.

    Yields the new text of each sample as one delta, so a loaded server sends fewer and longer chunks. Closing the
    generator cancels the requests.

    Raises:
        RequestError, BusyError: the engine rejected a prompt.
        ApiError: 500, the engine or a sample failed; 503, the server shut down and cancelled the request.
    """
    waiting: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_MAX_WAITING_DELTAS)

    async def pump(index: int, prompt: Example) -> None:
        try:
            stream = context.engine.stream(prompt, params, request_id=f"{request_id}-{index}")
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    if index:
                        delta = dataclasses.replace(delta, sample=index * params.n + delta.sample)
                    await waiting.put(delta)
            await waiting.put(None)
        except Exception as error:
            await waiting.put(error)

    tasks = [asyncio.create_task(pump(index, prompt)) for index, prompt in enumerate(prompts)]
    num_ended = 0
    try:
        while num_ended < len(tasks):
            batch: dict[int, Delta] = {}
            items = [await waiting.get()]
            while not waiting.empty():
                items.append(waiting.get_nowait())
            for item in items:
                if item is None:
                    num_ended += 1
                elif isinstance(item, Exception):
                    raise _as_error(item)
                elif item.finish_reason in ("cancelled", "error"):
                    if item.finish_reason == "cancelled" and context.admission.is_draining:
                        raise shutting_down()
                    raise _as_error(RuntimeError(f"sample {item.sample} ended with {item.finish_reason!r}"))
                else:
                    batch[item.sample] = _joined(batch[item.sample], item) if item.sample in batch else item
            if batch:
                yield list(batch.values())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _joined(first: Delta, second: Delta) -> Delta:
    return dataclasses.replace(
        second,
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
    )


def _as_error(error: Exception) -> Exception:
    if isinstance(error, StepjaxError):
        return error
    _log.error("the engine failed", exc_info=error)
    return engine_failed()
