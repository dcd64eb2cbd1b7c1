"""An engine that writes from a script, at the pace and with the asynchrony of a real one."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable

from stepjax.errors import BusyError, ContextLengthError
from stepjax.inference.request import Delta, EngineStats, SamplingParams, TokenLogprob
from stepjax.processing.tokens import Example

Script = Callable[[Example, SamplingParams, int], list[str]]


def greeting(prompt: Example, params: SamplingParams, sample: int) -> list[str]:
    return ["Let me ", "see.\n", "</think>", "\n\n", "Hello", ", ", "world", f" {sample}", "!"]


@dataclasses.dataclass
class _Request:
    name: str
    prompt: Example
    params: SamplingParams
    left: list[list[str]]  # of each sample
    drawn: list[int]
    deltas: asyncio.Queue


class FakeEngine:
    """Every step draws one piece of every sample, for all requests. Its queues have no bound, as the real one's."""

    max_context = 4096

    def __init__(self, script: Script = greeting, *, step_seconds: float = 0.001, max_requests: int = 1000):
        self.script = script
        self.step_seconds = step_seconds
        self.max_requests = max_requests
        self.healthy = True
        self.requests: dict[str, _Request] = {}
        self.served: list[tuple[Example, SamplingParams]] = []
        self.cancelled: list[str] = []
        self.generated = self.finished = 0
        self.most_requests = 0  # at a time
        self.failure: Exception | None = None
        self._stepping: asyncio.Task | None = None

    async def stream(
        self, prompt: Example, params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncIterator[Delta]:
        if self.failure:
            raise RuntimeError("the engine failed") from self.failure
        if len(self.requests) >= self.max_requests:
            raise BusyError("the queue is full")
        if len(prompt.tokens) + (params.max_tokens or 1) > self.max_context:
            excess = len(prompt.tokens) + (params.max_tokens or 1) - self.max_context
            raise ContextLengthError(f"{len(prompt.tokens)} tokens: too long for {self.max_context}", excess=excess)
        request_id = request_id or f"request-{len(self.served)}"
        assert request_id not in self.requests
        self.served.append((prompt, params))
        scripts = [self.script(prompt, params, sample) for sample in range(params.n)]
        request = _Request(request_id, prompt, params, scripts, [0] * params.n, asyncio.Queue())
        self.requests[request_id] = request
        self.most_requests = max(self.most_requests, len(self.requests))
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._run())
        unfinished = params.n
        try:
            while unfinished:
                delta = await request.deltas.get()
                if isinstance(delta, Exception):
                    raise RuntimeError("the engine failed") from delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            if self.requests.pop(request_id, None) and unfinished:
                self.cancelled.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.requests),
            waiting=0,
            pages=100,
            pages_used=len(self.requests),
            pages_cached=0,
            generated_tokens=self.generated,
            finished_samples=self.finished,
            cancelled_samples=len(self.cancelled),
        )

    def fail(self, error: Exception) -> None:
        self.failure, self.healthy = error, False

    async def _run(self) -> None:
        while self.requests:
            await asyncio.sleep(self.step_seconds)
            for request in list(self.requests.values()):
                if self.failure:
                    request.deltas.put_nowait(self.failure)
                    continue
                for sample, left in enumerate(request.left):
                    if left or request.drawn[sample] >= 0:
                        self._draw(request, sample, left)

    def _draw(self, request: _Request, sample: int, left: list[str]) -> None:
        params = request.params
        request.drawn[sample] += 1
        is_cut = params.max_tokens is not None and request.drawn[sample] >= params.max_tokens and len(left) > 1
        text = left.pop(0)
        reason = "length" if is_cut else None if left else "stop"
        token = 65 + len(text) % 20
        top = tuple((token + i, -0.5 - i) for i in range(params.logprobs or 0))
        drawn = () if params.logprobs is None else (TokenLogprob(token, -0.5, -0.4, top),)
        request.deltas.put_nowait(
            Delta(
                request.name,
                sample,
                (token,),
                text,
                drawn,
                reason,
                num_prompt_tokens=len(request.prompt.tokens),
                num_cached_tokens=3,
            )
        )
        self.generated += 1
        if reason:
            request.drawn[sample] = -(10**9)
            left.clear()
            self.finished += 1
