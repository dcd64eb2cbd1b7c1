"""Request bodies: JSON objects of a limited size, which arrive in a limited time."""

import asyncio
import contextlib
import json
from typing import Any

from starlette.types import Receive, Scope

from stepjax.serving.errors import ApiError
from stepjax.serving.settings import Limits

_DISCARD_SECONDS = 2.0


class Disconnected(Exception):
    """The client is gone; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """
    Raises:
        ApiError: 415, it is not JSON by its headers; 413, it is too large; 408, it took too long.
        Disconnected: the client left before it was complete.
    """
    headers = {name.lower(): value for name, value in scope["headers"]}
    media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if media_type != b"application/json":
        shown = media_type.decode("latin-1") or "missing"
        raise ApiError(415, f"content-type is {shown}: send application/json", code="unsupported_media_type")
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise ApiError(
            415, f"content-encoding {encoding.decode('latin-1')}: send it as it is", code="unsupported_media_type"
        )
    declared = headers.get(b"content-length")
    is_over, more = declared is not None and declared.isdigit() and int(declared) > limits.body_bytes, True
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more and not is_over:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                more = message.get("more_body", False)
                is_over = len(body) > limits.body_bytes
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_seconds:g} seconds",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None
    if is_over:
        body.clear()
        if more:
            await _discard(receive)
        raise ApiError(
            413,
            f"the body is larger than {limits.body_bytes} bytes: send fewer or smaller images",
            code="body_too_large",
            headers={"connection": "close"},
        )
    return bytes(body)


async def _discard(receive: Receive) -> None:
    """Reads on for a while: a connection that is closed before its request was read may lose the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def parse_object(body: bytes) -> dict[str, Any]:
    """
    Raises:
        ApiError: 400, it is not a JSON object.
    """
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise ApiError(400, message, code="invalid_json") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason:.200}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}: send an object", code="invalid_json")
    return value
