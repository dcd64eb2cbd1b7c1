r"""Server-sent events: `data: {...}\n\n` for each, and `data: [DONE]\n\n` at the end."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from stepjax.serving.bodies import Disconnected
from stepjax.serving.errors import as_api_error, shutting_down

T = TypeVar("T")


class Started(AsyncIterator[T]):
    """A stream whose first element is there, so that what fails at once can still be told by a status."""

    def __init__(self, first: T, rest: AsyncGenerator[T, None]):
        self._first: list[T] = [first]
        self._rest = rest

    async def __anext__(self) -> T:
        return self._first.pop() if self._first else await anext(self._rest)

    async def aclose(self) -> None:
        await self._rest.aclose()


async def start(stream: AsyncGenerator[T, None]) -> Started[T]:
    """Waits for the first element.

    Raises:
        Exception: whatever the stream raises in its place.
    """
    return Started(await anext(stream), stream)


class EventStream(Response):
    """Sends JSON objects as they come.

    The next one is asked for when the transport has room for it, so a slow reader makes nobody wait but its own stream.
    After the first event there is no status to change: errors, and the end of the server, are told as an event
    `{"error": ...}` in place of `[DONE]`. Calling it raises Disconnected if nobody reads.
    """

    def __init__(self, events: Started[dict[str, Any]], *, write_seconds: float):
        """
        Args:
            events: closed when the stream ends, whatever the reason.
            write_seconds: that the client may take to make room, else it is taken for gone.
        """
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        # The length of the body is not known.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._events = events
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(message: Message) -> None:
            try:
                async with asyncio.timeout(self._write_seconds):
                    await send(message)
            except TimeoutError:
                raise Disconnected from None

        async def write_data(data: str) -> None:
            await write({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async with contextlib.aclosing(self._events) as events:
            await write({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events:
                    await write_data(compact(event))
            except asyncio.CancelledError:
                # By `Admission.drain`, or because the client is gone; then this goes nowhere, and quickly.
                await write_data(compact(shutting_down().body()))
                await write({"type": "http.response.body", "body": b""})
                raise
            except Disconnected:
                raise
            except Exception as error:
                await write_data(compact(as_api_error(error).body()))
            else:
                await write_data("[DONE]")
            await write({"type": "http.response.body", "body": b""})


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
