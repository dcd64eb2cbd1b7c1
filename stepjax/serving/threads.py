"""Worker threads, a first-come-first-served memory budget, and admission of requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from stepjax.serving.errors import ApiError, busy, shutting_down

_Result = TypeVar("_Result")


class Threads:
    """Threads for work that would block the event loop: large JSON, images, tokenizing."""

    def __init__(self, count: int, name: str):
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)  # threads start on demand

    async def run(self, function: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def close(self) -> None:
        """Drops queued work, without waiting."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class ByteBudget:
    """A memory budget, first come, first served.

    Attributes:
        free: bytes.
    """

    def __init__(self, total: int):
        self.free = self.total = total
        self._turn = asyncio.Lock()  # asyncio's lock is fair: first come, first served
        self._returned = asyncio.Event()

    @contextlib.asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Waits for `size` bytes (at most `total`) and holds them."""
        assert size <= self.total
        async with self._turn:
            while size > self.free:
                self._returned.clear()
                await self._returned.wait()
            self.free -= size
        try:
            yield
        finally:
            self.free += size
            self._returned.set()


class Admission:
    """Admits requests: a limited number at a time, and none during shutdown."""

    def __init__(self, max_requests: int, is_healthy: Callable[[], bool]):
        """
        Args:
            is_healthy: whether the engine takes requests.
        """
        self._max_requests = max_requests
        self._under_way: set[asyncio.Task[None]] = set()
        self.is_draining = False
        self.is_healthy = is_healthy

    @property
    def count(self) -> int:
        """Requests in progress."""
        return len(self._under_way)

    def check_open(self) -> None:
        """Raises ApiError: 503, the engine has failed, or the server is shutting down."""
        if not self.is_healthy():
            raise ApiError(503, "the engine has failed; the server is shutting down", code="engine_failed")
        if self.is_draining:
            raise shutting_down()

    def check_room(self) -> None:
        """Raises ApiError: 429, too many requests; 503, as `check_open`."""
        self.check_open()
        if self.count >= self._max_requests:
            raise busy(f"at the limit of {self._max_requests} concurrent requests; try again later")

    def start(self, answering: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts answering a request. The task counts until it ends; `drain` may cancel it."""
        task = asyncio.create_task(answering)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def drain(self, seconds: float) -> int:
        """Stops admitting requests, waits for those in progress, and cancels the rest after `seconds`.

        Returns:
            How many were cancelled.
        """
        self.is_draining = True
        if not self._under_way:
            return 0
        _, left = await asyncio.wait(self._under_way, timeout=seconds)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=5)  # to send their clients an error
        return len(left)
