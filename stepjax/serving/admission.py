"""Who is let in: no more requests than allowed at a time, none while the server shuts down, pixels in turn."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from stepjax.serving.errors import ApiError, busy, shutting_down


class Admission:
    """The requests that are under way.

    Attributes:
        count: how many.
    """

    def __init__(self, max_requests: int, is_healthy: Callable[[], bool]):
        """
        Args:
            is_healthy: whether the engine takes requests.
        """
        self._max_requests = max_requests
        self._answers: set[asyncio.Task] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.count = 0
        self.is_draining = False
        self._is_healthy = is_healthy

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Counts a request.

        Raises:
            ApiError: 429, there are too many; 503, the server is shutting down or its engine has failed.
        """
        self.check_open()
        if self.count >= self._max_requests:
            raise busy(f"{self._max_requests} requests are under way, which is the limit; try again")
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()

    def answer(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts the part of a request that `drain` may cancel."""
        task = asyncio.create_task(work)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        return task

    def check_open(self) -> None:
        """
        Raises:
            ApiError: 503, as `enter`.
        """
        if self.is_draining:
            raise shutting_down()
        if not self._is_healthy():
            raise ApiError(503, "the engine has failed; the server must be started again", code="engine_failed")

    async def drain(self, seconds: float) -> int:
        """Takes no more requests, waits for those under way, and cancels what is left after `seconds`.

        Returns:
            How many were cancelled.
        """
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        left = set(self._answers)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=5)  # they still tell their clients
        return len(left)


class ByteBudget:
    """Memory that is handed out first come, first served."""

    def __init__(self, total: int):
        self._free = self.total = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def hold(self, size: int):
        """Waits for `size` bytes of at most `total`, and holds them."""
        assert size <= self.total
        if self._waiting or size > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._free += size  # it was handed out in the moment of cancellation
                elif (size, turn) in self._waiting:
                    self._waiting.remove((size, turn))
                self._hand_out()
                raise
        else:
            self._free -= size
        try:
            yield
        finally:
            self._free += size
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= size
                turn.set_result(None)
