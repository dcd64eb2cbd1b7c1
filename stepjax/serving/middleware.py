"""What happens around every route: who may use it, and what is counted."""

import hashlib
import hmac
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepjax.serving.errors import ApiError
from stepjax.serving.metrics import Metrics


class Authentication:
    """Asks for an API key, `Authorization: Bearer KEY`, on all paths but the open ones."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[str], open_paths: Iterable[str]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong: send the header `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        if not self._digests:
            return True
        header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        # Digests have one length, and all are compared: the time tells nothing about the keys.
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class HostCheck:
    """Answers to some names only, so that a page elsewhere cannot pass for this server by pointing its name here."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str]):
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            value = next((value for name, value in scope["headers"] if name.lower() == b"host"), b"").decode("latin-1")
            host = value.partition("]")[0] + "]" if value.startswith("[") else value.partition(":")[0]
            if host.lower() not in self._hosts:
                message = f"this server answers to {', '.join(sorted(self._hosts))} only: start it with an API key"
                await ApiError(403, message, code="host_not_allowed").response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Measurement:
    """Counts requests and times answers, by path and status. Unknown paths are counted together."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Iterable[str]):
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        path = scope["path"] if scope["path"] in self._paths else "other"
        status, has_body = "none", False  # none: the client left before there was one

        async def measured(message: Message) -> None:
            nonlocal status, has_body
            if message["type"] == "http.response.start":
                status = str(message["status"])
            elif not has_body:
                has_body = True
                if status == "200":
                    self._metrics.first_byte_seconds.labels(path).observe(time.monotonic() - start)
            await send(message)

        try:
            await self._app(scope, receive, measured)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - start)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
