"""The sampler over an engine in this process.

Every rollout is its own request, so each can be cancelled and can finish alone. All rollouts share one continuous
batch; rollouts of the same prompt share its prefill, its pages and the reads of those pages.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from stepjax.errors import BusyError, ImageError, RecordError, StepjaxError
from stepjax.inference.request import Completion, Delta, EngineClient, EngineFailedError, SamplingParams, TokenLogprob
from stepjax.interop.text_processor import AnyProcessor, encode, starts_thinking
from stepjax.processing.answer_stream import AnswerStream, add_piece
from stepjax.processing.tokens import Example, text_example
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, Piece, PreparedPrompt, SamplerError, check_room

Messages = Sequence[dict[str, Any]]


class ProcessorTokens:
    """Counts tokens with a processor's tokenizer."""

    def __init__(self, processor: AnyProcessor):
        self._processor = processor

    def count(self, text: str) -> int:
        return len(encode(self._processor, text))

    def tail(self, text: str, count: int) -> str:
        return self._processor.decode(encode(self._processor, text)[-count:] if count > 0 else [], False)


@dataclasses.dataclass(frozen=True)
class EnginePrompt:
    """
    Attributes:
        starts_thinking: the prompt has opened `<think>` for the model.
        parses_calls: tool calls are parsed out of the answer.
    """

    example: Example
    starts_thinking: bool
    parses_calls: bool


class RolloutBuilder:
    """Builds a rollout from an engine's deltas, and returns what each adds to the message.

    Attributes:
        logprobs: of the tokens so far, if requested.
        num_tokens: sampled so far.
    """

    def __init__(self, prompt: EnginePrompt, *, call_prefix: str | None = None):
        """
        Args:
            call_prefix: for tool call ids; defaults to the seed, so that the same sample gives the same rollout.
        """
        self._prompt, self._call_prefix = prompt, call_prefix
        self._answer = AnswerStream(starts_thinking=prompt.starts_thinking, parses_calls=prompt.parses_calls)
        self._message: Piece = {}
        self._text: list[str] = []
        self._began = time.monotonic()
        self._last: Delta | None = None
        self.logprobs: list[TokenLogprob] = []
        self.num_tokens = 0

    def add(self, delta: Delta) -> list[Piece]:
        """Returns the new pieces of the message, with one field each."""
        self.num_tokens += len(delta.tokens)
        self.logprobs += delta.logprobs
        if delta.logprobs:
            self._text.append(delta.text)
        pieces = self._answer.take(delta.text, is_last=delta.finish_reason is not None)
        for piece in pieces:
            for call in piece.get("tool_calls", ()):
                call["id"] = f"call_{self._call_prefix or format(delta.seed, 'x')}_{call['index']}"
            add_piece(self._message, piece)
        self._last = delta
        return pieces

    @property
    def finish_reason(self) -> str | None:
        """As in OpenAI's API; None until the last delta."""
        reason = None if self._last is None else self._last.finish_reason
        return None if reason is None else self._answer.finish_reason(reason)

    def rollout(self) -> Rollout:
        """The whole rollout; call it after the last delta."""
        last, reason = self._last, self.finish_reason
        assert last is not None and reason is not None, "the sample has not ended"
        logprobs = self.logprobs
        sampled = logprobs if last.stop_token is None else [*logprobs, last.stop_token]
        return Rollout(
            content=self._message.get("content", ""),
            reasoning=self._message.get("reasoning_content"),
            tool_calls=tuple(self._message.get("tool_calls", ())),
            finish_reason=reason,
            stop_reason=last.stop_reason,
            seed=last.seed,
            mean_logprob=sum(each.logprob for each in logprobs) / len(logprobs) if logprobs else None,
            seconds=time.monotonic() - self._began,
            num_prompt_tokens=len(self._prompt.example.tokens),
            num_cached_tokens=last.num_cached_tokens,
            num_tokens=self.num_tokens,
            text="".join(self._text),
            prompt_ids=tuple(self._prompt.example.tokens.tolist()) if sampled else (),
            token_ids=tuple(each.token for each in sampled),
            logprobs=tuple(each.logprob for each in sampled),
            sampling_logprobs=tuple(each.sampling_logprob for each in sampled),
            top_logprobs=tuple(each.top for each in sampled) if any(each.top for each in sampled) else (),
        )


def rollout_of(completion: Completion, prompt_ids: Sequence[int], processor: AnyProcessor) -> Rollout:
    """The rollout of a whole sample of `Engine.generate`."""
    example = text_example(prompt_ids)  # without images, which are no part of a rollout
    builder = RolloutBuilder(EnginePrompt(example, starts_thinking(processor, example), parses_calls=False))
    builder.add(completion)
    return builder.rollout()


class EngineSampler:
    """Implements `Sampler`."""

    def __init__(
        self,
        engine: EngineClient,
        processor: AnyProcessor,
        *,
        enable_thinking: bool | None = None,
        open_example: Callable[[Messages, Messages], AbstractAsyncContextManager[Example]] | None = None,
    ):
        """
        Args:
            engine: e.g. `inference.async_engine.AsyncEngine`.
            enable_thinking: see `Processor.process_prompt`.
            open_example: builds the prompt from messages and tools in place of the processor; the server passes one
                that enforces its limits.
        """
        self._engine, self._processor, self._enable_thinking = engine, processor, enable_thinking
        self._open_example = open_example or self._process
        self.max_context: int | None = engine.max_context
        self.tokens = ProcessorTokens(processor)

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Messages, tools: Messages = (), *, answer_tokens: int = 1
    ) -> AsyncIterator[PreparedPrompt]:
        """See `Sampler.prompt`."""
        async with self._open_example(messages, tools) as example:
            check_room(len(example.tokens), answer_tokens, self._engine.max_context)
            prompt = EnginePrompt(example, starts_thinking(self._processor, example), bool(tools))
            yield PreparedPrompt(len(example.tokens), prompt)

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """See `Sampler.sample`."""
        made = RolloutBuilder(prompt.payload)
        listener.begin()
        try:
            async with contextlib.aclosing(self._engine.stream(prompt.payload.example, params)) as deltas:
                async for delta in deltas:
                    pieces = made.add(delta)
                    listener.num_tokens = made.num_tokens
                    for piece in pieces:
                        listener.piece(piece)
        except BusyError as error:
            raise SamplerError(str(error), is_temporary=True, num_tokens=made.num_tokens) from error
        except (StepjaxError, EngineFailedError):
            raise
        except RuntimeError as error:  # EngineError of this request
            raise SamplerError(str(error), is_temporary=False, num_tokens=made.num_tokens) from error
        if made.finish_reason in (None, "cancelled", "error"):
            reason = "returned nothing" if made.finish_reason is None else f"ended with {made.finish_reason!r}"
            raise SamplerError(f"the engine {reason}", is_temporary=False, num_tokens=made.num_tokens)
        return made.rollout()

    @contextlib.asynccontextmanager
    async def _process(self, messages: Messages, tools: Messages) -> AsyncIterator[Example]:
        made = [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        # In a thread: images are slow, and other calls continue meanwhile.
        yield await asyncio.to_thread(
            self._processor.process_prompt,
            made,
            tools=list(tools) or None,
            enable_thinking=self._enable_thinking,
            name="messages",
        )

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts = [_processor_item(item, f"{where}.content[{i}]") for i, item in enumerate(content)]
        if any(part.get("type") == "image" for part in parts) and not hasattr(self._processor, "image_config"):
            raise RecordError(f"{where} has an image, but this is a text-only model")
        return {**message, "content": parts}


def _processor_item(item: dict[str, Any], where: str) -> dict[str, Any]:
    """Converts an OpenAI content item to the processor's form."""
    if item.get("type") != "image_url":
        return item
    url = item["image_url"]["url"] if isinstance(item.get("image_url"), dict) else item.get("image_url")
    if not isinstance(url, str) or url.startswith(("http://", "https://")):
        raise ImageError(f"{where}: {url!r:.100} is remote and not fetched; give a file or a data URI")
    return {"type": "image", "image": url.removeprefix("file://"), "frame": item.get("frame")}
