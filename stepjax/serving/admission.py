"""Who is let in: no more requests than allowed at a time, none while the server shuts down, pixels in turn."""

import asyncio
import contextlib
import dataclasses
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
        self.is_healthy = is_healthy
        self.arrivals = Arrivals(max(max_requests, 64))

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Counts a request, whose body is there.

        Raises:
            ApiError: as `check_room`.
        """
        self.check_room()
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
            ApiError: 503, the engine has failed, or the server is shutting down.
        """
        if not self.is_healthy():
            raise ApiError(503, "the engine has failed; the server is being ended", code="engine_failed")
        if self.is_draining:
            raise shutting_down()

    def check_room(self) -> None:
        """
        Raises:
            ApiError: 429, there are too many requests; 503, as `check_open`.
        """
        self.check_open()
        if self.count >= self._max_requests:
            raise busy(f"{self._max_requests} requests are under way, which is the limit; try again")

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


@dataclasses.dataclass(eq=False)
class Arrival:
    """A body that is arriving."""

    limit: asyncio.Timeout
    begin: float
    size: int = 0  # bytes that are there


class Arrivals:
    """Bodies that are arriving: at most `most`, so that they cannot take the memory. To make room for another one, the
    slowest is given up: those that never come keep nobody's place.
    """

    def __init__(self, most: int):
        self._most = most
        self._arriving: set[Arrival] = set()

    @contextlib.contextmanager
    def enter(self, limit: asyncio.Timeout) -> Iterator[Arrival]:
        """
        Args:
            limit: of the body, entered; expires when the body is given up.
        """
        now = asyncio.get_running_loop().time()
        if len(self._arriving) >= self._most:
            # The advance of 4 KiB is for those that have only begun.
            slowest = max(self._arriving, key=lambda each: (now - each.begin) / (each.size + 4096))
            self._arriving.remove(slowest)
            if not slowest.limit.expired():
                slowest.limit.reschedule(now)
        arrival = Arrival(limit, now)
        self._arriving.add(arrival)
        try:
            yield arrival
        finally:
            self._arriving.discard(arrival)


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
