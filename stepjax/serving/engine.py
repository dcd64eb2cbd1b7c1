"""What the server needs of an engine."""

from collections.abc import AsyncGenerator
from typing import Protocol

from stepjax.inference.request import Delta, EngineStats, SamplingParams
from stepjax.processing.tokens import Example


class AsyncEngine(Protocol):
    """`stepjax.inference.async_engine.AsyncEngine` is one."""

    @property
    def max_context(self) -> int: ...  # tokens of prompt and answer

    @property
    def healthy(self) -> bool: ...  # whether it takes requests

    def stream(
        self, prompt: Example, params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The answer as it is drawn. Closing it, or cancelling the task that waits for it, cancels the request.

        Raises:
            RequestError: the request cannot be served.
            BusyError: the queue is full.
            Exception: anything else is a failure of the engine.
        """
        ...

    def stats(self) -> EngineStats: ...
