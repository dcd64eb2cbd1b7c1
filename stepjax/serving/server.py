"""The server process: listens, limits its connections and its log, and shuts down gracefully.

At the first SIGTERM or SIGINT it keeps listening but takes no new requests, and `/health` reports that. Requests under
way may finish and are cancelled after `drain_seconds`. A second signal stops it at once. An engine failure shuts the
server down the same way, with a distinct exit status so that a supervisor can restart it.
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

_ACCEPTED_AT_ONCE = 16  # by asyncio, in each of up to four loop iterations before they are counted here
_BACKLOG = 1024  # connections waiting to be accepted
_READ_BYTES = 16384  # per read: with more headers or tiny chunks, h11 would block the loop for a second
RESERVED_FILES = 5 * _ACCEPTED_AT_ONCE + 64  # open files, including fetched images and files of libraries
_MOST_LOG_KINDS = 1000

_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket that refuses connections until `serve` listens. Raises ConfigError: the address cannot be used."""
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
            each.listen(_BACKLOG)  # asyncio uses its own `backlog` as the number to accept at once
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
            _log.critical("the engine has failed: exiting with status %d", EngineFailedError.exit_status)
            self._draining = self._draining or asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    def _exit(self, name: str) -> None:
        if self._draining is not None:
            _log.info("%s again: stopping now", name)
            self.should_exit = self.force_exit = True
        else:
            _log.info("%s: no new requests; those in progress have %g seconds to finish", name, self._drain_seconds)
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        cancelled = await self._admission.drain(self._drain_seconds)
        if cancelled:
            _log.warning("cancelled %d requests", cancelled)
        self.should_exit = True


# Connections ----------------------------------------------------------------------------------------------------------


class Connections:
    """The server's connections; creates uvicorn's protocols. uvicorn itself limits neither their number nor their idle
    time.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.most = affordable(limits.connections)
        self.idle: dict[Connection, None] = {}  # without a request; idle longest first

    def __call__(self, **uvicorns: Any) -> "Connection":
        return Connection(self, **uvicorns)


class Connection(H11Protocol):
    """Must deliver a whole request head within `head_seconds` of opening or of the last answer. With too many
    connections the one idle longest is closed, so that silent clients cannot shut out others.
    """

    def __init__(self, all_: Connections, **uvicorns: Any):
        super().__init__(**uvicorns)
        self._all = all_
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        with contextlib.suppress(AttributeError):  # the loop is not asyncio's own
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
        super().on_response_complete()  # may start the next request if it has already arrived
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
        """Waits for the next request."""
        self._all.idle[self] = None
        self._stop_timer()
        self._end = self.loop.call_later(self._all.limits.head_seconds, self._close)

    def _close(self) -> None:
        if self.transport.get_write_buffer_size():  # the client is still reading an answer
            self._end = self.loop.call_later(self._all.limits.write_seconds, self.transport.abort)
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _refuse(self) -> None:
        error = busy(f"at the limit of {self._all.most} connections with requests in progress; try again later")
        response = error.response()
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        self.transport.write(b"HTTP/1.1 503 Service Unavailable\r\n%sconnection: close\r\n\r\n" % head + response.body)
        self.transport.close()


def affordable(wanted: int) -> int:
    """The number of connections this process may open, after raising its limit on open files. Raises ConfigError: too
    few.
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
    """Starts the log. Clients can trigger warnings at will, so each kind is logged once a minute."""
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, OncePerMinute) for each in handler.filters):
            handler.addFilter(OncePerMinute())


class OncePerMinute(logging.Filter):
    """Passes one warning or error of each kind a minute; the next says how many were dropped.

    Records are of one kind if they share logger and format and, if any, the exception and the line that raised it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[
            tuple[object, ...], tuple[float, int]
        ] = {}  # when one last passed; how many were dropped since

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
            record.msg = f"{record.msg} ({left_out} more since the last one)"
        return True
