"""Deltas of one or several prompts, merged as they come."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Sequence

from stepjax.errors import StepjaxError
from stepjax.inference.request import Delta, SamplingParams
from stepjax.processing.tokens import Example
from stepjax.serving.admission import Admission
from stepjax.serving.engine import AsyncEngine
from stepjax.serving.errors import engine_failed, shutting_down

# Deltas that may wait for a slow reader. Then the engine is no longer asked; what it has is bounded by `max_tokens`.
MAX_WAITING_DELTAS = 64

_log = logging.getLogger("stepjax.serving")


@dataclasses.dataclass
class Usage:
    """Tokens of a request, counted while it runs."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def generate(
    engine: AsyncEngine,
    admission: Admission,
    prompts: Sequence[Example],
    params: SamplingParams,
    usage: Usage,
    *,
    request_id: str,
) -> AsyncGenerator[list[Delta], None]:
    """Samples all prompts; those of prompt i are numbered from i * n.

    Yields what has come since the last time, at most one delta of each sample, so that a loaded server sends fewer and
    longer chunks. Closing it cancels the requests.

    Raises:
        RequestError, BusyError: one of the prompts is not taken.
        ApiError: 500, the engine failed or a sample did; 503, it was cancelled because the server shuts down.
    """
    waiting: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(MAX_WAITING_DELTAS)

    async def pump(index: int, prompt: Example) -> None:
        is_first = True
        try:
            stream = engine.stream(prompt, params, request_id=f"{request_id}-{index}")
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    if is_first:
                        usage.prompt_tokens += len(prompt.tokens)
                        usage.cached_tokens += delta.num_cached_tokens
                        is_first = False
                    usage.completion_tokens += len(delta.tokens)
                    if index:
                        delta = dataclasses.replace(delta, sample=index * params.n + delta.sample)
                    await waiting.put(delta)
            await waiting.put(None)
        except Exception as error:
            await waiting.put(error)

    tasks = [asyncio.create_task(pump(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        num_ended = 0
        while num_ended < len(tasks):
            batch: dict[int, Delta] = {}
            item = await waiting.get()
            while True:
                if isinstance(item, BaseException):
                    raise _as_error(item)
                if item is None:
                    num_ended += 1
                else:
                    before = batch.get(item.sample)
                    batch[item.sample] = item if before is None else _join(before, item)
                if waiting.empty():
                    break
                item = waiting.get_nowait()
            for delta in batch.values():
                _check_finish(delta, admission)
            if batch:
                yield list(batch.values())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _join(first: Delta, second: Delta) -> Delta:
    return dataclasses.replace(
        second,
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
    )


def _check_finish(delta: Delta, admission: Admission) -> None:
    if delta.finish_reason == "cancelled":
        raise shutting_down() if admission.is_draining else engine_failed()
    if delta.finish_reason == "error":
        _log.error("sample %d of %s failed: %s", delta.sample, delta.request_id, delta.stop_reason)
        raise engine_failed()


def _as_error(error: BaseException) -> BaseException:
    if isinstance(error, StepjaxError):
        return error
    _log.error("the engine failed", exc_info=error)
    return engine_failed()
