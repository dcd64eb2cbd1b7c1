"""`/v1/chat/completions`."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from stepjax.inference.request import Delta, TokenLogprob
from stepjax.interop.text_processor import starts_thinking
from stepjax.processing.answer_stream import AnswerStream, add_piece
from stepjax.serving.context import EngineContext
from stepjax.serving.generation import Usage, generate
from stepjax.serving.logprobs import chat_logprobs
from stepjax.serving.pacore_chat import PacoreChat
from stepjax.serving.pacore_options import pacore_config
from stepjax.serving.pacore_sampler import RequestSampler
from stepjax.serving.replies import ChatReply, respond
from stepjax.serving.schemas import ChatRequest
from stepjax.serving.validation import parse_request


async def chat_completions(context: EngineContext, body: dict[str, Any]) -> Response:
    """
    Raises:
        ApiError, StepjaxError: the request cannot be served.
    """
    request = parse_request(ChatRequest, body)
    chosen = await context.names.choose(request.model)
    context.check_samples(request.n)
    if request.pacore is None and chosen.schedule is None:
        chat = _Chat(context, request, chosen.name)
    else:
        config = pacore_config(request, chosen, context.settings, max_context=context.engine.max_context)
        chat = PacoreChat(context, request, chosen.name, config, RequestSampler(context, request))
    return await respond(chat, request, context.settings.limits)


class _Chat:
    def __init__(self, context: EngineContext, request: ChatRequest, name: str):
        self._context = context
        self._request = request
        self._params = request.params()
        self._answers: list[AnswerStream] = []  # of the samples, once there is a prompt
        self._usage = Usage()
        self._reply = ChatReply(request, name)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece. It is taken apart as a streamed one is, so that both say the same."""
        count = self._request.n
        messages: list[dict[str, Any]] = [{"role": "assistant", "content": None} for _ in range(count)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        ends: list[Delta | None] = [None] * count
        async with contextlib.aclosing(self._deltas()) as batches:
            async for batch in batches:
                for delta in batch:
                    for part in self._answers[delta.sample].take(delta.text, is_last=delta.finish_reason is not None):
                        add_piece(messages[delta.sample], part)
                    logprobs[delta.sample] += delta.logprobs
                    ends[delta.sample] = delta
        choices = []
        for index, (answer, message, end) in enumerate(zip(self._answers, messages, ends, strict=True)):
            assert end is not None and end.finish_reason is not None
            if message["content"] is None and not answer.num_calls:
                message["content"] = ""
            choice = self._choice(index, answer, end)
            choices.append({**choice, "message": message, "logprobs": self._logprobs(logprobs[index])})
        return self._reply.whole(choices, self._usage.as_json())

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(self._request.n)]  # of tokens whose text is held back
        has_begun = [False] * self._request.n
        async with contextlib.aclosing(self._deltas()) as batches:
            async for batch in batches:
                for delta in batch:
                    index = delta.sample
                    if not has_begun[index]:
                        has_begun[index] = True
                        yield self._reply.chunk({"index": index, "delta": {"role": "assistant", "content": ""}})
                    logprobs[index] += delta.logprobs
                    for part in self._answers[index].take(delta.text, is_last=delta.finish_reason is not None):
                        yield self._reply.chunk(
                            {"index": index, "delta": part, "logprobs": self._logprobs(logprobs[index])}
                        )
                        logprobs[index] = []
                    if delta.finish_reason is not None:
                        choice = self._choice(index, self._answers[index], delta)
                        yield self._reply.chunk({**choice, "delta": {}, "logprobs": self._logprobs(logprobs[index])})
        for chunk in self._reply.usage_chunks(self._usage.as_json()):
            yield chunk

    async def _deltas(self) -> AsyncGenerator[list[Delta], None]:
        context = self._context
        async with context.prompts.chat(self._request) as prompt:
            self._answers = [
                AnswerStream(
                    starts_thinking=starts_thinking(context.processor, prompt), parses_calls=self._request.uses_tools
                )
                for _ in range(self._request.n)
            ]
            batches = generate(
                context.engine, context.admission, [prompt], self._params, self._usage, request_id=self._reply.id
            )
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    yield batch

    def _choice(self, index: int, answer: AnswerStream, end: Delta) -> dict[str, Any]:
        assert end.finish_reason is not None
        return {
            "index": index,
            "finish_reason": answer.finish_reason(end.finish_reason),
            "stop_reason": end.stop_reason,
        }

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(logprobs, self._context.processor) if self._request.logprobs else None
