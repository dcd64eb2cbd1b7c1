"""The server's process: it listens, and it ends in order.

At the first SIGTERM or SIGINT it goes on listening but takes nothing new, and `/health` says so; requests under way may
end, and are cancelled after a while. A second signal ends it at once. When the engine fails the server ends in the same
way, with a status of its own, for whoever watches over it to start it again.
"""

import asyncio
import logging
import math
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from stepjax.errors import ConfigError
from stepjax.inference.request import EngineFailedError
from stepjax.serving.admission import Admission
from stepjax.serving.connections import ACCEPTED_AT_ONCE, BACKLOG, Connections

_log = logging.getLogger("stepjax.serving")


def bind(host: str, port: int) -> socket.socket:
    """A socket that connections are refused on until `serve` listens.

    Raises:
        ConfigError: the address is in use, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}; choose another one") from error
    return bound


async def serve(app: Starlette, bound: socket.socket, *, drain_seconds: float) -> int:
    """Serves an app of `make_app` until a signal, or until its engine fails; returns the exit status, 0 or 70.

    Raises:
        ConfigError: this process may open too few files.
    """
    server = DrainingServer(app, drain_seconds=drain_seconds)
    await server.serve([bound])
    return EngineFailedError.exit_status if server.has_failed else 0


class DrainingServer(uvicorn.Server):
    def __init__(self, app: Starlette, *, drain_seconds: float):
        context = app.state.context
        config = uvicorn.Config(
            app,
            http=Connections(context.settings.limits),  # type: ignore[arg-type]
            ws="none",
            backlog=ACCEPTED_AT_ONCE,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=math.ceil(context.settings.limits.head_seconds),
            proxy_headers=False,
        )
        super().__init__(config)
        self.has_failed = False
        self._admission: Admission = context.admission
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(BACKLOG)  # what asyncio takes for it is how many it accepts at once
        for server in self.servers if self.started else []:
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._exit, signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        if not self.has_failed and not self._admission.is_healthy():
            self.has_failed = True
            _log.critical("the engine has failed: ending with status %d", EngineFailedError.exit_status)
            self._draining = self._draining or asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    def _exit(self, name: str) -> None:
        if self._draining is not None:
            _log.info("%s again: ending now", name)
            self.should_exit = self.force_exit = True
        else:
            _log.info("%s: taking no more requests; those under way have %g seconds", name, self._drain_seconds)
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        cancelled = await self._admission.drain(self._drain_seconds)
        if cancelled:
            _log.warning("%d requests were cancelled", cancelled)
        self.should_exit = True
