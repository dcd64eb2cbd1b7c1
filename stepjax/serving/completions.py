"""`/v1/completions`: text or tokens, continued as they are."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from stepjax.inference.request import Delta, TokenLogprob
from stepjax.serving.bounds import check_text, utf8_length
from stepjax.serving.context import EngineContext
from stepjax.serving.errors import ApiError
from stepjax.serving.generation import Usage, generate
from stepjax.serving.logprobs import CompletionLogprobs
from stepjax.serving.schemas import CompletionRequest
from stepjax.serving.sse import EventStream, start
from stepjax.serving.validation import parse_request


async def completions(context: EngineContext, body: dict[str, Any]) -> Response:
    """
    Raises:
        ApiError, StepjaxError: the request cannot be served.
    """
    request = parse_request(CompletionRequest, body)
    chosen = await context.names.choose(request.model)
    if chosen.schedule is not None:
        message = f"model {chosen.name!r}: PaCoRe answers chats; ask /v1/chat/completions"
        raise ApiError(400, message, param="model", code="invalid_value")
    completion = _Completion(context, request, chosen.name)
    if request.stream:
        return EventStream(await start(completion.chunks()), write_seconds=context.settings.limits.write_seconds)
    return JSONResponse(await completion.whole())


class _Completion:
    def __init__(self, context: EngineContext, request: CompletionRequest, name: str):
        self._context = context
        self._request = request
        self._name = name
        self._params = request.params()
        self._prompts = _prompts(request.prompt)
        self._num_samples = len(self._prompts) * request.n
        context.check_samples(request.n, len(self._prompts))
        self._usage = Usage()
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        texts = [""] * self._num_samples
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        ends: list[Delta | None] = [None] * self._num_samples
        async with contextlib.aclosing(self._deltas()) as batches:
            async for batch in batches:
                for delta in batch:
                    texts[delta.sample] += delta.text
                    logprobs[delta.sample] += delta.logprobs
                    ends[delta.sample] = delta
        choices = [
            self._choice(index, text, end, CompletionLogprobs(self._context.processor), each)
            for index, (text, end, each) in enumerate(zip(texts, ends, logprobs, strict=True))
        ]
        return {**self._head(), "choices": choices, "usage": self._usage.as_json()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        shapes = [CompletionLogprobs(self._context.processor) for _ in range(self._num_samples)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in shapes]  # of tokens whose text is held back
        usage = {"usage": None} if self._request.includes_usage else {}
        async with contextlib.aclosing(self._deltas()) as batches:
            async for batch in batches:
                for delta in batch:
                    index = delta.sample
                    logprobs[index] += delta.logprobs
                    if delta.text or delta.finish_reason is not None:
                        choice = self._choice(index, delta.text, delta, shapes[index], logprobs[index])
                        logprobs[index] = []
                        yield {**self._head(), "choices": [choice], **usage}
        if self._request.includes_usage:
            yield {**self._head(), "choices": [], "usage": self._usage.as_json()}

    async def _deltas(self) -> AsyncGenerator[list[Delta], None]:
        context = self._context
        texts = [prompt for prompt in self._prompts if isinstance(prompt, str)]
        check_text(sum(map(utf8_length, texts)), "prompt", context.settings.limits)
        examples = await asyncio.gather(
            *(
                context.prompts.completion(prompt, "prompt" if len(self._prompts) == 1 else f"prompt[{i}]")
                for i, prompt in enumerate(self._prompts)
            )
        )
        batches = generate(context.engine, context.admission, examples, self._params, self._usage, request_id=self._id)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield batch

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._name,
        }

    def _choice(
        self,
        index: int,
        text: str,
        end: Delta | None,
        shape: CompletionLogprobs,
        logprobs: list[TokenLogprob],
    ) -> dict[str, Any]:
        assert end is not None
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._request.logprobs is None else shape.take(logprobs),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is an empty list", param="prompt", code="invalid_value")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]
