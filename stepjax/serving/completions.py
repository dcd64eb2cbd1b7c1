"""`/v1/completions`: continues raw text or token ids."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from starlette.responses import Response

from stepjax.inference.request import Delta, TokenLogprob
from stepjax.processing.tokens import Example
from stepjax.serving.chat import LEAST_LOGPROB, generate
from stepjax.serving.context import EngineContext
from stepjax.serving.errors import invalid
from stepjax.serving.schemas import CompletionRequest
from stepjax.serving.streams import Frame, Json, respond, usage
from stepjax.serving.validation import check_text, parse_request, utf8_length


async def completions(context: EngineContext, body: Json) -> Response:
    request = parse_request(CompletionRequest, body)
    model = await context.choose(request.model)
    if model.schedule is not None:
        raise invalid(f"model {model.name!r}: PaCoRe answers chats; ask /v1/chat/completions", "model")
    completion = Completion(context, request, model.name)
    return await respond(completion, stream=request.stream, limits=context.settings.limits)


class Completion:
    """An `Answer` by the engine. Samples of prompt i are numbered from i * n."""

    def __init__(self, context: EngineContext, request: CompletionRequest, model: str):
        self._context, self._request = context, request
        self._frame = Frame(request, model)
        self._prompts = _prompts(request.prompt)
        context.check_samples(request.n, len(self._prompts))
        self._samples = [_Sample() for _ in range(len(self._prompts) * request.n)]
        self._examples: Sequence[Example] = ()

    async def whole(self) -> Json:
        async with self._sampling() as batches:
            async for batch in batches:
                for delta in batch:
                    self._samples[delta.sample].add(delta)
        return self._frame.whole([self._choice(index) for index in range(len(self._samples))], self._usage())

    async def chunks(self) -> AsyncGenerator[Json, None]:
        async with self._sampling() as batches:
            async for batch in batches:
                for delta in batch:
                    self._samples[delta.sample].add(delta)
                    if delta.text or delta.finish_reason is not None:
                        yield self._frame.chunk(self._choice(delta.sample))
        for chunk in self._frame.usage_chunks(self._usage()):
            yield chunk

    @contextlib.asynccontextmanager
    async def _sampling(self) -> AsyncIterator[AsyncIterator[list[Delta]]]:
        context = self._context
        texts = [prompt for prompt in self._prompts if isinstance(prompt, str)]
        check_text(sum(map(utf8_length, texts)), "prompt", context.settings.limits)
        names = ["prompt"] if len(self._prompts) == 1 else [f"prompt[{i}]" for i in range(len(self._prompts))]
        self._examples = await asyncio.gather(*map(context.prompts.completion, self._prompts, names))
        batches = generate(context, self._examples, self._request.params(), request_id=self._frame.id)
        async with contextlib.aclosing(batches):
            yield batches

    def _choice(self, index: int) -> Json:
        """The sample's new text since the last call."""
        sample = self._samples[index]
        assert sample.last is not None
        text, logprobs = "".join(sample.text), self._logprobs(sample)
        sample.text, sample.logprobs = [], []
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": sample.last.finish_reason,
            "stop_reason": sample.last.stop_reason,
        }

    def _logprobs(self, sample: "_Sample") -> Json | None:
        """Parallel lists, one entry a token; `text_offset` is where the token begins in the text."""
        if self._request.logprobs is None:
            return None
        made: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in sample.logprobs:
            text = self._text(each.token)
            made["tokens"].append(text)
            made["token_logprobs"].append(max(each.logprob, LEAST_LOGPROB))
            made["top_logprobs"].append({self._text(token): max(p, LEAST_LOGPROB) for token, p in each.top})
            made["text_offset"].append(sample.offset)
            sample.offset += len(text)
        return made

    def _text(self, token: int) -> str:
        return self._context.processor.decode([token], False)

    def _usage(self) -> Json:
        firsts = [each.last for each in self._samples[:: self._request.n] if each.last is not None]
        return usage(
            sum(len(example.tokens) for example in self._examples),
            sum(each.num_cached_tokens for each in firsts),
            sum(each.num_tokens for each in self._samples),
        )


class _Sample:
    """The part of a sample that is not sent yet."""

    def __init__(self):
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []  # sent together with held-back text
        self.num_tokens = self.offset = 0
        self.last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs += delta.logprobs
        self.num_tokens += len(delta.tokens)
        self.last = delta


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt is an empty list", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]
