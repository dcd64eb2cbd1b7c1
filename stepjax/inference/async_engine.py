"""The engine behind asyncio: a thread runs the steps, and every request is a stream of deltas."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from typing import Any

from stepjax.errors import BusyError
from stepjax.inference.engine import Engine
from stepjax.inference.output import completions
from stepjax.inference.request import Completion, Delta, EngineError, EngineFailedError, EngineStats, SamplingParams
from stepjax.processing.tokens import Example


class AsyncEngine:
    """Use as `async with AsyncEngine(engine) as e:`. Inside the block, nothing else may touch the engine.

    Every stream has its own queue of deltas: a slow reader stalls only its own stream and uses no more memory than its
    answer. Closing a stream early, or cancelling its task, cancels the request.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.max_context = engine.max_context
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # calls for the thread
        self._streams: dict[str, Callable[[Delta | BaseException], None]] = {}  # only the thread touches it
        self._failure: BaseException | None = None
        self._draining = self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._open_streams = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def __aenter__(self) -> "AsyncEngine":
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def stream(
        self, prompt: Example | Iterable[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.stream`."""
        self._check()
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def deliver(item: Delta | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(deltas.put_nowait, item)
            except RuntimeError:  # the loop is closed
                pass

        def submit() -> str:
            submitted = self._engine.submit(prompt, params, request_id=request_id)
            self._streams[submitted] = deliver
            return submitted

        self._open_streams += 1
        self._idle.clear()
        unfinished = params.n
        pending = self._call(submit)
        try:
            await asyncio.shield(asyncio.wrap_future(pending))
            while unfinished:
                item = await deltas.get()
                if isinstance(item, BaseException):
                    raise item
                if item.finish_reason == "error":
                    raise EngineError(str(item.stop_reason))
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            if unfinished:
                self._give_up(pending)
            self._open_streams -= 1
            if not self._open_streams:
                self._idle.set()

    async def complete(
        self, prompt: Example | Iterable[int], params: SamplingParams, *, request_id: str | None = None
    ) -> list[Completion]:
        """All samples of a request, in order. Raises as `stream`."""
        return completions([delta async for delta in self.stream(prompt, params, request_id=request_id)])

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Calls a function with the engine between two steps, e.g. to update the weights; returns its result.

        Raises:
            EngineFailedError: the engine failed.
        """
        self._check(draining_is_fine=True)
        return await asyncio.wrap_future(self._call(lambda: function(self._engine)))

    def stats(self) -> EngineStats:
        """Safe to call during a step, but counts may then mix values from before and after it."""
        return self._engine.stats()

    @property
    def healthy(self) -> bool:
        return self._failure is None and not self._draining and not self._stopping

    async def drain(self) -> None:
        """Refuses new requests and returns when the running ones have ended."""
        self._draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stops the engine. Open streams end with an EngineError."""
        if self._stopping:
            return
        self._draining = self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    # In the event loop -----------------------------------------------------------------------------------------------

    def _check(self, draining_is_fine: bool = False) -> None:
        if self._failure is not None:
            raise _as_failure(self._failure)
        if self._stopping or (self._draining and not draining_is_fine):
            raise BusyError("the engine is shutting down and takes no new requests")

    def _call(self, function: Callable[[], Any]) -> Future:
        result: Future = Future()

        def call() -> None:
            if not result.set_running_or_notify_cancel():  # the caller has given up
                return
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        self._inbox.put(call)
        return result

    def _give_up(self, pending: Future) -> None:
        """Cancels the request that `pending` submits (or has submitted) in the engine's thread."""

        def cancel() -> None:
            if pending.exception() is None:
                self._streams.pop(pending.result(), None)
                if self._failure is None:
                    self._engine.cancel(pending.result())

        self._inbox.put(cancel)

    # In the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._answer_calls(wait=not self._engine.has_work)
                if self._engine.has_work and not self._stopping:
                    self._deliver(self._engine.step())
        except BaseException as error:  # pass it on to every open stream
            self._failure = error
        # Requests still in the inbox get it too.
        while True:
            for deliver in self._streams.values():
                # One exception per stream: raising extends its traceback.
                deliver(EngineError("the engine was stopped") if self._failure is None else _as_failure(self._failure))
            self._streams.clear()
            if self._stopping:
                break
            self._answer_calls(wait=True)
        self._answer_calls(wait=False)

    def _answer_calls(self, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        while True:
            try:
                call = self._inbox.get_nowait()
            except queue.Empty:
                return
            call()

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            deliver = self._streams.get(delta.request_id)
            if deliver is not None:
                deliver(delta)
        for request_id in {delta.request_id for delta in deltas if delta.finish_reason is not None}:
            if not self._engine.is_under_way(request_id):
                self._streams.pop(request_id, None)


def _as_failure(failure: BaseException) -> EngineFailedError:
    first_line = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    error = EngineFailedError(f"the engine failed: {first_line[:500]}")
    error.__cause__ = failure
    return error
