"""The server's process: it listens, and it ends in order.

At the first SIGTERM or SIGINT it goes on listening but takes nothing new, and `/health` says so; requests under way may
end, and are cancelled after a while. A second signal ends it at once.
"""

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from stepjax.errors import ConfigError

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


async def serve(app: Starlette, bound: socket.socket, *, drain_seconds: float) -> None:
    """Serves an app of `make_app` until a signal."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
        proxy_headers=False,
    )
    await DrainingServer(config, drain_seconds=drain_seconds).serve([bound])


class DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, *, drain_seconds: float):
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers if self.started else []:
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._exit, signal.Signals(sig).name)

    def _exit(self, name: str) -> None:
        if self._draining is not None:
            _log.info("%s again: ending now", name)
            self.should_exit = self.force_exit = True
        else:
            _log.info("%s: taking no more requests; those under way have %g seconds", name, self._drain_seconds)
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        admission = self.config.app.state.context.admission  # type: ignore[union-attr]
        cancelled = await admission.drain(self._drain_seconds)
        if cancelled:
            _log.warning("%d requests were cancelled", cancelled)
        self.should_exit = True
