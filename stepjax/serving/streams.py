"""Request bodies, read within size and time limits, and answers as JSON or server-sent events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from stepjax.rollouts.rollout import Rollout
from stepjax.serving.errors import ApiError, as_api_error, shutting_down
from stepjax.serving.schemas import ChatRequest, CompletionRequest
from stepjax.serving.settings import Limits

_DISCARD_SECONDS = 2.0
JSON, STREAMS = "application/json", "application/octet-stream"

Json = dict[str, Any]


# Bodies ---------------------------------------------------------------------------------------------------------------


class Bodies:
    """Reads bodies, at most `most` at a time to bound memory. To make room the slowest one is dropped, so that stalled
    bodies block nobody.

    Attributes:
        arriving: by timeout, when the body began and how many bytes have arrived.
    """

    def __init__(self, most: int, limits: Limits):
        self._most, self._limits = most, limits
        self.arriving: dict[asyncio.Timeout, tuple[float, int]] = {}

    async def read(self, request: Request) -> bytes:
        """
        Raises:
            ApiError: 415, the headers say another media type; 413, too large; 408, too slow, or dropped to make room.
            ClientDisconnect: the client disconnected before the body was complete.
        """
        _check_type(request)
        limits, parts, declared = self._limits, request.stream(), request.headers.get("content-length", "")
        body, is_over = bytearray(), declared.isdecimal() and int(declared) > limits.body_bytes
        try:
            async with asyncio.timeout(limits.body_seconds) as limit:
                begin = self._make_room()
                self.arriving[limit] = begin, 0
                try:
                    while not is_over and (part := await anext(parts, b"")):
                        body += part
                        self.arriving[limit] = begin, len(body)
                        is_over = len(body) > limits.body_bytes
                finally:
                    self.arriving.pop(limit, None)
        except TimeoutError:
            seconds = f"{limits.body_seconds:g} seconds"
            message = f"the body did not arrive within {seconds}, or was the slowest of too many: send it again"
            raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
        if not is_over:
            return bytes(body)
        body.clear()
        # Read on for a while: closing a connection with unread data may lose the response.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                async for _ in parts:
                    pass
        message = f"the body is larger than {limits.body_bytes} bytes: send fewer or smaller images"
        raise ApiError(413, message, code="body_too_large", headers={"connection": "close"})

    def _make_room(self) -> float:
        """Returns the loop's current time."""
        now = asyncio.get_running_loop().time()
        if len(self.arriving) >= self._most:
            # The 4 KiB head start protects bodies that have just begun.
            slowest = max(
                self.arriving, key=lambda each: (now - self.arriving[each][0]) / (self.arriving[each][1] + 4096)
            )
            del self.arriving[slowest]
            if not slowest.expired():
                slowest.reschedule(now)
        return now


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _check_type(request: Request) -> None:
    kind = media_type(request)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    # Never a type that browsers send for pages of other sites without asking, such as multipart/form-data.
    if kind not in (JSON, STREAMS):
        message = f"content-type is {kind or 'missing'}: send {JSON}"
    elif encoding != "identity":
        message = f"content-encoding {encoding}: send the body uncompressed"
    else:
        return
    raise ApiError(415, message, code="unsupported_media_type")


# Answers --------------------------------------------------------------------------------------------------------------


class Frame:
    """The JSON around an answer's choices, whole or in chunks."""

    def __init__(self, request: ChatRequest | CompletionRequest, model: str):
        """
        Args:
            model: its name in the request.
        """
        is_chat = isinstance(request, ChatRequest)
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._kind = "chat.completion" if is_chat else "text_completion"
        self._chunk_kind = "chat.completion.chunk" if is_chat else self._kind
        self._includes_usage = request.stream_options is not None and request.stream_options.include_usage

    def whole(self, choices: list[Json], usage: Json) -> Json:
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def chunk(self, choice: Json) -> Json:
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._includes_usage else chunk

    def usage_chunks(self, usage: Json) -> list[Json]:
        """The stream's last chunk, if the request asks for usage."""
        return [{**self.chunk({}), "choices": [], "usage": usage}] if self._includes_usage else []


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def choice_of(index: int, rollout: Rollout, logprobs: Json | None = None) -> Json:
    fields = {"reasoning_content": rollout.reasoning, "tool_calls": list(rollout.tool_calls)}
    content = rollout.content or (None if rollout.tool_calls else "")
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": content,
            **{name: value for name, value in fields.items() if value},
        },
        "logprobs": logprobs,
        "finish_reason": rollout.finish_reason,
        "stop_reason": rollout.stop_reason,
    }


class Answer(Protocol):
    """The answer to a request, whole or streamed."""

    async def whole(self) -> Json: ...

    def chunks(self) -> AsyncGenerator[Json, None]: ...


async def respond(answer: Answer, *, stream: bool, limits: Limits) -> Response:
    if not stream:
        return JSONResponse(await answer.whole())
    chunks = answer.chunks()
    return EventStream(await anext(chunks), chunks, write_seconds=limits.write_seconds)


class EventStream(Response):
    r"""Sends JSON objects as they come: `data: {...}\n\n` for each, and `data: [DONE]\n\n` at the end.

    Each object is requested only when the transport has room, so a slow client stalls only its own stream. The status
    is sent before the first event; a later error or shutdown is sent as an event `{"error": ...}` in place of `[DONE]`.
    Calling it raises ClientDisconnect if the client stops reading.
    """

    def __init__(self, first: Json, rest: AsyncGenerator[Json, None], *, write_seconds: float):
        """
        Args:
            first: awaited before the response is created, so that an immediate failure gets its own status.
            rest: closed when the stream ends.
            write_seconds: a client that reads nothing for this long counts as disconnected.
        """
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]  # unknown
        self._first, self._rest, self._write_seconds = first, rest, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(message: Message) -> None:
            try:
                async with asyncio.timeout(self._write_seconds):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        async def write_event(event: Json | None) -> None:
            data = "[DONE]" if event is None else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            await write({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async with contextlib.aclosing(self._rest) as rest:
            await write({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            event: Json | None = self._first
            try:
                while event is not None:
                    await write_event(event)
                    event = await anext(rest, None)
            except asyncio.CancelledError:
                # Cancelled by `Admission.drain`, or the client disconnected; then these writes return at once.
                await write_event(shutting_down().body())
                await write({"type": "http.response.body", "body": b""})
                raise
            except ClientDisconnect:
                raise
            except Exception as error:
                event = as_api_error(error).body()
            await write_event(event)
            await write({"type": "http.response.body", "body": b""})
