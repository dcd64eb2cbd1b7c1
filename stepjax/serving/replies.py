"""How a chat's answer is sent: whole, or as a stream of chunks."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response

from stepjax.serving.schemas import ChatRequest
from stepjax.serving.settings import Limits
from stepjax.serving.sse import EventStream, start


class Chat(Protocol):
    """A request that is going to be answered, in one way or the other."""

    async def whole(self) -> dict[str, Any]: ...

    def chunks(self) -> AsyncGenerator[dict[str, Any], None]: ...


async def respond(chat: Chat, request: ChatRequest, limits: Limits) -> Response:
    """
    Raises:
        ApiError, StepjaxError: the request cannot be served.
    """
    if request.stream:
        return EventStream(await start(chat.chunks()), write_seconds=limits.write_seconds)
    return JSONResponse(await chat.whole())


class ChatReply:
    """The frame around choices."""

    def __init__(self, request: ChatRequest, model: str):
        """
        Args:
            model: what the request called it.
        """
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model = model
        self._includes_usage = request.includes_usage
        self._created = int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [{"finish_reason": None, "logprobs": None, **choice}],
        }
        return {**chunk, "usage": None} if self._includes_usage else chunk

    def usage_chunks(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """The last one, if the request asks for it."""
        return [{**self._head("chat.completion.chunk"), "choices": [], "usage": usage}] if self._includes_usage else []

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}
