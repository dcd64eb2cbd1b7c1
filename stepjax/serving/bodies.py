"""Request bodies: JSON objects of a limited size, which arrive in a limited time."""

import asyncio
import contextlib
import re
from typing import Any

from pydantic_core import from_json
from starlette.types import Receive, Scope

from stepjax.serving.admission import Arrivals
from stepjax.serving.errors import ApiError
from stepjax.serving.settings import Limits

_DISCARD_SECONDS = 2.0
# A string, which may hold what looks like structure, or the beginning of a value beside the first.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,:{[]', re.DOTALL)


class Disconnected(Exception):
    """The client is gone; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, limits: Limits, arrivals: Arrivals) -> bytes:
    """
    Raises:
        ApiError: 415, it is not JSON by its headers; 413, it is too large; 408, it took too long, or was the slowest
            when others needed its place.
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
        async with asyncio.timeout(limits.body_seconds) as limit:
            with arrivals.enter(limit) as arrival:
                while more and not is_over:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    arrival.size = len(body)
                    is_over = arrival.size > limits.body_bytes
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_seconds:g} seconds, or more slowly than too many others",
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


def parse_object(body: bytes, max_values: int) -> dict[str, Any]:
    """
    Raises:
        ApiError: 400, it is not a JSON object, or holds too many values.
    """
    if has_more_values(body, max_values):
        message = f"the body holds more than {max_values} values: names of fields, texts, numbers, lists and objects"
        raise ApiError(400, message, code="too_many_values")
    try:
        value = from_json(body)
    except ValueError as error:
        reason = str(error).replace(" column", ", column").replace("recursion limit exceeded", "nested too deeply")
        if "hex escape" in reason:
            reason += "; half of a surrogate pair is no character"
        raise ApiError(400, f"the body is not JSON: {reason:.200}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}: send an object", code="invalid_json")
    return value


def has_more_values(body: bytes, count: int) -> bool:
    """Whether JSON holds more than so many values.

    Every value but the first follows one of four signs. A value costs far more than its one or two bytes, so they
    are counted before any is made: all the signs, which is quick, and only where these are too many those outside of
    texts.
    """
    if sum(map(body.count, (b",", b":", b"{", b"["))) <= count:
        return False
    return any(index >= 2 * count for index, _ in enumerate(_TOKEN.finditer(body)))  # texts are found, too
