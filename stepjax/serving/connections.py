"""Connections: how many are open, and how long one may be without a request.

uvicorn bounds neither. Here a connection has a time to bring a whole request head, from its opening and from the end of
each answer. When there are too many, the one that has been without a request for longest is closed, so that those who
open connections and say nothing shut out nobody who asks.
"""

import asyncio
import contextlib
import logging
import os
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from stepjax.errors import ConfigError
from stepjax.serving.errors import busy
from stepjax.serving.settings import Limits

ACCEPTED_AT_ONCE = 16  # by asyncio, in each of up to four turns of its loop before they are counted here
BACKLOG = 1024  # connections that wait for that
_READ_BYTES = 16384  # at a time: more headers, or bodies in tiny chunks, would take h11 a second before others' turn
_RESERVE = 5 * ACCEPTED_AT_ONCE + 64  # open files, some for images that are fetched and for what libraries open

_log = logging.getLogger("stepjax.serving")


class Connections:
    """The connections of a server. Makes uvicorn's protocols.

    Raises:
        ConfigError: this process may open too few files.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.most = affordable(limits.connections)
        self.idle: dict[Connection, None] = {}  # without a request; the longest first

    def __call__(self, **uvicorns: Any) -> "Connection":
        return Connection(self, **uvicorns)


class Connection(H11Protocol):
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
    """As many connections as this process may open, which is raised as far as it is allowed to.

    Raises:
        ConfigError: they are too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    others = len(os.listdir("/dev/fd")) + _RESERVE
    needed = others + wanted
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit besides the one that it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    most = min(wanted, soft - others)
    if most < 8:
        raise ConfigError(f"the limit on open files is {soft}: raise it (ulimit -n) to {needed}")
    if most < wanted:
        _log.warning("at most %d connections: the limit on open files is %d (ulimit -n %d)", most, soft, needed)
    return most
