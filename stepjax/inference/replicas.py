"""Data-parallel engines: one per index of the mesh's data axis, each with its own copy of the model and its own cache.

The devices of one engine (its tensor axis) decode a batch together. Additional devices serve more batches, not larger
ones. A request goes to the engine with the fewest active samples.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import fields
from typing import Any

from jax.sharding import Mesh

from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine, TextDecoder
from stepjax.inference.output import completions
from stepjax.inference.request import Completion, Delta, EngineStats, SamplingParams
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL
from stepjax.processing.tokens import Example
from stepjax.sharding import data_parts


def make_engines(
    model: StepVL | Qwen3, processor: TextDecoder | None, config: EngineConfig, mesh: Mesh, *, donate: bool = False
) -> list[Engine]:
    """One engine per index of the mesh's data axis.

    Args:
        donate: the model is not used afterwards; see `Engine`.

    Raises:
        ConfigError: the mesh has axes besides data and tensor, or its tensor axis does not divide the heads.
    """
    first, *others = data_parts(mesh)
    copies = [Engine(model, processor, config, mesh=part) for part in others]  # while the model is whole
    return [Engine(model, processor, config, mesh=first, donate=donate), *copies]


class AsyncReplicas:
    """Several engines behind the interface of one `AsyncEngine`."""

    def __init__(self, engines: Iterable[Engine]):
        self._engines = [AsyncEngine(engine) for engine in engines]
        self._under_way = [0] * len(self._engines)
        self._running = AsyncExitStack()
        self.max_context = min(engine.max_context for engine in self._engines)

    async def __aenter__(self) -> "AsyncReplicas":
        for engine in self._engines:
            await self._running.enter_async_context(engine)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    async def stream(
        self, prompt: Example | Iterable[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.stream`. Ids are per engine, so two engines may use the same id."""
        place = min(range(len(self._engines)), key=self._under_way.__getitem__)
        self._under_way[place] += params.n
        stream = self._engines[place].stream(prompt, params, request_id=request_id)
        try:
            async for delta in stream:
                yield delta
        finally:
            self._under_way[place] -= params.n
            await stream.aclose()

    async def complete(
        self, prompt: Example | Iterable[int], params: SamplingParams, *, request_id: str | None = None
    ) -> list[Completion]:
        return completions([delta async for delta in self.stream(prompt, params, request_id=request_id)])

    async def call(self, function: Callable[[Engine], Any]) -> list[Any]:
        """Calls a function with each engine between two of its steps; returns all results."""
        return list(await asyncio.gather(*(engine.call(function) for engine in self._engines)))

    def stats(self) -> EngineStats:
        """The sums."""
        each = [engine.stats() for engine in self._engines]
        return EngineStats(**{f.name: sum(getattr(stats, f.name) for stats in each) for f in fields(EngineStats)})

    @property
    def healthy(self) -> bool:
        return all(engine.healthy for engine in self._engines)

    async def drain(self) -> None:
        await asyncio.gather(*(engine.drain() for engine in self._engines))

    async def close(self) -> None:
        await self._running.aclose()
