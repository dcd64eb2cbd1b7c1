"""A route that takes a JSON object: let in, read, answered; given up when its client leaves."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stepjax.serving.bodies import Disconnected, parse_object, read_body
from stepjax.serving.context import Context
from stepjax.serving.errors import ApiError, as_api_error, shutting_down

Handle = Callable[[dict[str, Any]], Awaitable[Response]]

_LARGE_BODY = 2**18  # is parsed in a thread


class Endpoint:
    """An ASGI app. The client is watched while its answer is made: when it leaves, the work for it is cancelled."""

    def __init__(self, context: Context, handle: Handle):
        self._context = context
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        admission = self._context.admission
        with contextlib.ExitStack() as stack:
            try:
                admission.check_room()
                body = await read_body(scope, receive, self._context.settings.limits, admission.arrivals)
                stack.enter_context(admission.enter())
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            except Disconnected:
                self._context.metrics.disconnects.inc()
                return
            answer = admission.answer(self._answer(body, scope, receive, send))
            del body  # large, where it holds images
            gone = asyncio.create_task(_disconnect(receive))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise Disconnected
                await answer
            except Disconnected:
                self._context.metrics.disconnects.inc()
            finally:
                for task in (answer, gone):
                    task.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            large = len(body) > _LARGE_BODY
            most = self._context.settings.limits.body_values
            fields = await self._context.threads.run(parse_object, body, most) if large else parse_object(body, most)
            del body
            response = await self._handle(fields)
            del fields
        except asyncio.CancelledError:
            if not self._context.admission.is_draining:
                raise
            response = shutting_down().response()
        except Exception as error:
            response = as_api_error(error).response()
        with contextlib.suppress(asyncio.CancelledError):
            await response(scope, receive, send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
