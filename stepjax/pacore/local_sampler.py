"""The sampler over an engine in this process.

Every trajectory is a request of its own, so that it is cancelled, and answered, alone. All of all problems are in one
continuous batch; those of one prompt share its computation, its pages and the reading of them.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Protocol

from stepjax.errors import BusyError, ImageError, RecordError, StepjaxError
from stepjax.inference.request import Delta, EngineFailedError, SamplingParams, TokenLogprob
from stepjax.interop.any_processor import AnyProcessor, encode, starts_thinking
from stepjax.pacore.sampler import Listener, Piece, Prompt, PromptTooLongError, Reply, SamplerError
from stepjax.processing.answer_stream import AnswerStream, add_piece
from stepjax.processing.tokens import Example


class Engine(Protocol):
    """`stepjax.inference.async_engine.AsyncEngine` is one, and so is `replicas.AsyncReplicas`."""

    @property
    def max_context(self) -> int: ...

    def stream(
        self, prompt: Example, params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]: ...


class ProcessorTokens:
    """A processor's tokenizer, for counting."""

    def __init__(self, processor: AnyProcessor):
        self._processor = processor

    def count(self, text: str) -> int:
        return len(self._encode(text))

    def tail(self, text: str, count: int) -> str:
        return self._processor.decode(self._encode(text)[-count:] if count > 0 else [], False)

    def _encode(self, text: str) -> list[int]:
        return encode(self._processor, text)


@dataclasses.dataclass(frozen=True)
class LocalPrompt:
    """
    Attributes:
        starts_thinking: it has opened `<think>` for the model.
        parses_calls: tool calls are taken out of the answer.
    """

    example: Example
    starts_thinking: bool
    parses_calls: bool


class LocalSampler:
    def __init__(self, engine: Engine, processor: AnyProcessor, *, enable_thinking: bool | None = None):
        """
        Args:
            enable_thinking: as `Processor.process_prompt` takes it.
        """
        self._engine, self._processor, self._enable_thinking = engine, processor, enable_thinking
        self.max_context: int | None = engine.max_context
        self.tokens = ProcessorTokens(processor)

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AsyncIterator[Prompt]:
        """See `Sampler.prompt`."""
        # In a thread: images take long, and other problems' calls go on.
        example = await asyncio.to_thread(self._example, messages, tools)
        yield as_prompt(
            example,
            self._processor,
            has_tools=bool(tools),
            max_context=self._engine.max_context,
            answer_tokens=answer_tokens,
        )

    async def sample(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
        """See `Sampler.sample`."""
        return await sample(self._engine, prompt, params, listener)

    def _example(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> Example:
        made = [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return self._processor.process_prompt(
            made, tools=list(tools) or None, enable_thinking=self._enable_thinking, name="messages"
        )

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts = [processor_item(item, f"{where}.content[{i}]") for i, item in enumerate(content)]
        if any(part.get("type") == "image" for part in parts) and not hasattr(self._processor, "image_config"):
            raise RecordError(f"{where} has an image, and the model reads text only")
        return {**message, "content": parts}


def processor_item(item: dict[str, Any], where: str) -> dict[str, Any]:
    """A content item of OpenAI's API as `Processor` takes it.

    Raises:
        ImageError: an image would have to be fetched.
    """
    if item.get("type") != "image_url":
        return item
    url = item["image_url"]["url"] if isinstance(item.get("image_url"), dict) else item.get("image_url")
    if not isinstance(url, str) or url.startswith(("http://", "https://")):
        raise ImageError(f"{where}: {url!r:.100} is not fetched; give a file or a data URI")
    return {"type": "image", "image": url.removeprefix("file://"), "frame": item.get("frame")}


def as_prompt(
    example: Example, processor: AnyProcessor, *, has_tools: bool, max_context: int, answer_tokens: int
) -> Prompt:
    """
    Raises:
        PromptTooLongError: there is less room than `answer_tokens` after it.
    """
    length = len(example.tokens)
    excess = length + answer_tokens - max_context
    if excess > 0:
        raise PromptTooLongError(
            f"the prompt has {length} tokens; with {answer_tokens} for the answer that is {excess} more than the "
            f"context of {max_context}",
            excess=excess,
        )
    return Prompt(length, LocalPrompt(example, starts_thinking(processor, example), has_tools))


async def sample(engine: Engine, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
    """Draws a sample of what `as_prompt` made; see `Sampler.sample`."""
    local: LocalPrompt = prompt.payload
    answer = AnswerStream(starts_thinking=local.starts_thinking, parses_calls=local.parses_calls)
    message: dict[str, Any] = {}
    logprobs: list[TokenLogprob] = []
    delta = None
    listener.begin()
    try:
        async with contextlib.aclosing(engine.stream(local.example, params)) as deltas:
            async for delta in deltas:
                listener.tokens += len(delta.tokens)
                logprobs += delta.logprobs
                for piece in answer.take(delta.text, is_last=delta.finish_reason is not None):
                    _name_calls(piece, params)
                    add_piece(message, piece)
                    listener.piece(piece)
    except BusyError as error:
        raise SamplerError(str(error), is_temporary=True, output_tokens=listener.tokens) from error
    except (StepjaxError, EngineFailedError):
        raise
    except RuntimeError as error:  # EngineError: that of one request
        raise SamplerError(str(error), is_temporary=False, output_tokens=listener.tokens) from error
    if delta is None or delta.finish_reason in (None, "cancelled", "error"):
        reason = "ended without a word" if delta is None else f"ended with {delta.finish_reason!r}"
        raise SamplerError(f"the engine {reason}", is_temporary=False, output_tokens=listener.tokens)
    return Reply(
        content=message.get("content", ""),
        reasoning=message.get("reasoning_content"),
        tool_calls=tuple(message.get("tool_calls", ())),
        finish_reason=answer.finish_reason(delta.finish_reason),
        prompt_tokens=len(local.example.tokens),
        cached_tokens=delta.num_cached_tokens,
        output_tokens=listener.tokens,
        mean_logprob=sum(each.logprob for each in logprobs) / len(logprobs) if logprobs else None,
    )


def _name_calls(piece: Piece, params: SamplingParams) -> None:
    """Ids of the seed's, so that the same sample is the same record."""
    for call in piece.get("tool_calls", ()):
        call["id"] = f"call_{params.seed:x}_{call['index']}"
