"""The server's process: it listens, bounds its connections and its log, and ends in order.

At the first SIGTERM or SIGINT it goes on listening but takes nothing new, and `/health` says so; requests under way may
end, and are cancelled after a while. A second signal ends it at once. When the engine fails the server ends in the same
way, with a status of its own, for whoever watches over it to start it again.
"""

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepjax.errors import ConfigError
from stepjax.figures import log_to_stderr
from stepjax.inference.request import EngineFailedError
from stepjax.serving.errors import busy
from stepjax.serving.settings import Limits

_ACCEPTED_AT_ONCE = 16  # by asyncio, in each of up to four turns of its loop before they are counted here
_BACKLOG = 1024  # connections that wait for that
_READ_BYTES = 16384  # at a time: more headers, or bodies in tiny chunks, would take h11 a second before others' turn
RESERVED_FILES = 5 * _ACCEPTED_AT_ONCE + 64  # open files, some for fetched images and for what libraries open
_MOST_LOG_KINDS = 1000

_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket that refuses connections until `serve` listens. Raises ConfigError if the address cannot be used."""
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


async def serve(app: Starlette, bound: socket.socket) -> int:
    """Serves an app of `serving.app` until a signal, or until its engine fails; returns the exit status, 0 or 70."""
    server = DrainingServer(app)
    await server.serve([bound])
    return EngineFailedError.exit_status if server.has_failed else 0


class DrainingServer(uvicorn.Server):
    def __init__(self, app: Starlette):
        context = app.state.context
        limits = context.settings.limits
        config = uvicorn.Config(
            app,
            http=Connections(limits),  # type: ignore[arg-type]
            ws="none",
            backlog=_ACCEPTED_AT_ONCE,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=math.ceil(limits.head_seconds),
            proxy_headers=False,
        )
        super().__init__(config)
        self.has_failed = False
        self._admission, self._drain_seconds = context.admission, context.settings.drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(_BACKLOG)  # what asyncio takes for it is how many it accepts at once
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


# Connections ----------------------------------------------------------------------------------------------------------


class Connections:
    """The connections of a server; makes uvicorn's protocols. uvicorn bounds neither how many are open nor how long one
    may be without a request.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.most = affordable(limits.connections)
        self.idle: dict[Connection, None] = {}  # without a request; the longest first

    def __call__(self, **uvicorns: Any) -> "Connection":
        return Connection(self, **uvicorns)


class Connection(H11Protocol):
    """Has a time to bring a whole request head, from its opening and from the end of each answer. Of too many
    connections the one that has been without a request for longest is closed, so that those who open connections and
    say nothing shut out nobody who asks.
    """

    def __init__(self, all_: Connections, **uvicorns: Any):
        super().__init__(**uvicorns)
        self._all = all_
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        with contextlib.suppress(AttributeError):  # of a loop that is not asyncio's own
            transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._wait()
        if len(self.connections) > self._all.most:
            longest = next(iter(self._all.idle))
            if longest is self:
                self._refuse()
            else:
                longest.transport.abort()
            self._all.idle.pop(longest)
            self.connections.discard(longest)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._has_request:
            self._all.idle.pop(self, None)
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin with the next request, if that has come meanwhile
        if not self._has_request:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.idle.pop(self, None)
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        """For a request."""
        self._all.idle[self] = None
        self._stop_timer()
        self._end = self.loop.call_later(self._all.limits.head_seconds, self._close)

    def _close(self) -> None:
        if self.transport.get_write_buffer_size():  # an answer that is still being read
            self._end = self.loop.call_later(self._all.limits.write_seconds, self.transport.abort)
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _refuse(self) -> None:
        error = busy(f"{self._all.most} connections have requests under way, which is the limit; try again")
        response = error.response()
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        self.transport.write(b"HTTP/1.1 503 Service Unavailable\r\n%sconnection: close\r\n\r\n" % head + response.body)
        self.transport.close()


def affordable(wanted: int) -> int:
    """As many connections as this process may open; the limit on open files is raised as far as allowed. Raises
    ConfigError if they are too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    others = len(os.listdir("/dev/fd")) + RESERVED_FILES
    needed = others + wanted
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has another limit besides this one
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    most = min(wanted, soft - others)
    if most < 8:
        raise ConfigError(f"the limit on open files is {soft}: raise it (ulimit -n) to {needed}")
    if most < wanted:
        _log.warning("at most %d connections: the limit on open files is %d (ulimit -n %d)", most, soft, needed)
    return most


# Log ------------------------------------------------------------------------------------------------------------------


def start_log() -> None:
    """The log of a server that strangers talk to: what they can cause often is logged once a minute."""
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, OncePerMinute) for each in handler.filters):
            handler.addFilter(OncePerMinute())


class OncePerMinute(logging.Filter):
    """Passes one warning or error of a kind in a minute; the next of its kind says how many were left out.

    Records are of one kind if they share logger and format and, where there is one, the exception and the line of code
    that raised it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}  # when one was passed, and how many were not since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        error, _, trace = record.exc_info or (None, None, None)
        line = str(traceback.extract_tb(trace, limit=-1))  # where it was raised
        kind, now = (record.name, str(record.msg).partition("\n")[0], error, line), self._clock()
        passed, left_out = self._seen.get(kind, (-math.inf, 0))
        if now - passed < 60:
            self._seen[kind] = passed, left_out + 1
            return False
        if len(self._seen) >= _MOST_LOG_KINDS:
            self._seen.clear()
        self._seen[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} more since the last such line)"
        return True
