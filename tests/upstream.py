"""An OpenAI-compatible endpoint on a port of its own, in a thread of its own; it can be told to misbehave."""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections import Counter

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FAULTS = ("status 500", "status 429", "stall", "truncated thought", "null content", "broken stream", "not JSON")


def text_of(messages):
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "\n".join(item.get("text", "") for item in content)


def honest(body):
    """Answers 42, and cites the first reference."""
    text = text_of(body["messages"])
    cites = " As in Reference 1." if "Reference 1:" in text else ""
    return {"reasoning": "hm, let me see", "content": r"It is \boxed{42}." + cites}


class Upstream:
    """
    Attributes:
        bodies: of all requests, in order of arrival.
        faults: how often each was committed.
    """

    def __init__(self, answer=honest, *, fault_share=0.0, stall_seconds=30.0):
        self.answer, self.fault_share, self.stall_seconds = answer, fault_share, stall_seconds
        self.bodies, self.headers, self.faults = [], [], Counter()
        model = {"id": "fake", "object": "model", "created": 0, "owned_by": "x"}
        self.models = {"object": "list", "data": [model]}
        self.responds = None  # makes the whole response of a request
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        # Connections are kept for long: on a busy machine a client would find one closed in the moment of its call.
        options = {"port": 0, "log_config": None, "access_log": False, "timeout_keep_alive": 600}
        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), **options))

    def fault(self, body) -> str | None:
        """By the seed, so that it does not depend on who comes first."""
        word = hashlib.blake2b(str(body.get("seed", len(self.bodies))).encode(), digest_size=4).digest()
        share, kind = int.from_bytes(word[:2], "big") / 2**16, word[2] % len(FAULTS)
        return FAULTS[kind] if share < self.fault_share else None

    async def _models(self, request):
        return JSONResponse(self.models)

    async def _chat(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.responds is not None:
            return self.responds(body)
        fault = self.fault(body)
        if fault is not None:
            self.faults[fault] += 1
        if fault == "status 500":
            return JSONResponse({"error": {"message": "out of luck"}}, 500)
        if fault == "status 429":
            return JSONResponse({"error": {"message": "slow down"}}, 429, headers={"retry-after": "0.01"})
        if fault == "stall":
            await asyncio.sleep(self.stall_seconds)
        if fault == "not JSON":
            return Response("<html>bad gateway</html>", 200, media_type="text/html")
        made = self.answer(body)
        finish = made.get("finish_reason", "stop")
        if fault == "truncated thought":
            made, finish = {"content": None, "reasoning": "so long a thought that"}, "length"
        if fault == "null content":
            made = {"content": None}
        words = len(((made.get("reasoning") or "") + " " + (made.get("content") or "")).split())
        usage = {"prompt_tokens": 7, "completion_tokens": words, "total_tokens": 7 + words}
        head = {"id": "x", "created": 0, "model": "fake"}
        message = {"role": "assistant", "content": made.get("content"), "reasoning_content": made.get("reasoning")}
        if made.get("tool_calls"):
            message["tool_calls"] = made["tool_calls"]
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

        async def events():
            def event(choices, **more):
                chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
                return f"data: {json.dumps(chunk)}\n\n"

            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for field in ("reasoning_content", "content"):
                for word in (message[field] or "").split():
                    yield event([{"index": 0, "delta": {field: word + " "}, "finish_reason": None}])
                if fault == "broken stream":
                    return
            if made.get("tool_calls"):
                calls = [{"index": i, **call} for i, call in enumerate(made["tool_calls"])]
                yield event([{"index": 0, "delta": {"tool_calls": calls}, "finish_reason": None}])
            yield event([{"index": 0, "delta": {}, "finish_reason": finish}])
            yield event([], usage=usage)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"


def answering(body, *, usage=None, **choice):
    """A response whose choice has these fields, also in place of those of its message; whatever they are."""
    message = {"role": "assistant", "content": "42"}
    message |= {name: choice.pop(name) for name in ("content", "reasoning_content", "tool_calls") if name in choice}
    choice = {"index": 0, "finish_reason": "stop", **choice}
    head = {"id": "x", "created": 0, "model": "fake", "usage": usage}
    if not body.get("stream"):
        return Response(
            json.dumps({**head, "choices": [{**choice, "message": message}]}), media_type="application/json"
        )
    chunk = {**head, "choices": [{**choice, "delta": message}]}
    return Response(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")


@contextlib.contextmanager
def serving(upstream):
    thread = threading.Thread(target=upstream.server.run, daemon=True)
    thread.start()
    while not upstream.server.started:
        assert thread.is_alive()
    try:
        yield upstream
    finally:
        upstream.server.force_exit = upstream.server.should_exit = True
        thread.join(20)
