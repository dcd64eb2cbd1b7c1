"""The ASGI apps, over an engine or in front of another server: routes and middleware."""

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepjax.inference.request import EngineClient
from stepjax.interop.text_processor import AnyProcessor
from stepjax.pacore.config import PacoreConfig
from stepjax.rollouts.sampler import SamplerError
from stepjax.serving.chat import chat_completions
from stepjax.serving.completions import completions
from stepjax.serving.context import Context, EngineContext
from stepjax.serving.errors import ApiError, answer_exception, as_api_error, shutting_down
from stepjax.serving.images import show_views
from stepjax.serving.metrics import Metrics
from stepjax.serving.pacore import upstream_chat_completions
from stepjax.serving.schemas import ViewsRequest
from stepjax.serving.settings import PACORE, ServerSettings
from stepjax.serving.streams import STREAMS, Json, media_type
from stepjax.serving.validation import parse_object, parse_request, parse_with_streams
from stepjax.tofc.tables import Tables
from stepjax.web import PAGE

if TYPE_CHECKING:  # it takes a second to import
    from stepjax.rollouts.endpoint import EndpointSampler

Handle = Callable[[Json], Awaitable[Response]]
Parse = Callable[[bytes, int], Json]

_LARGE_BODY = 2**18  # bytes; larger bodies are parsed in a thread
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_app(
    engine: EngineClient,
    processor: AnyProcessor,
    settings: ServerSettings,
    pacore: PacoreConfig = PACORE,
    codec: Tables | None = None,
) -> Starlette:
    """The app over an engine. `app.state.context` holds its parts; `admission.drain` shuts it down.

    Args:
        codec: of the model; None refuses features of devices.
    """
    context = EngineContext(engine, processor, settings, pacore, codec)

    async def views(body: Json) -> Response:
        request = parse_request(ViewsRequest, body)
        return JSONResponse(await context.image_threads.run(show_views, request, processor, settings.limits))

    handles: dict[str, Handle] = {
        "/v1/chat/completions": lambda body: chat_completions(context, body),
        "/v1/completions": lambda body: completions(context, body),
        "/stepjax/views": views,
    }
    return _assemble(context, handles, contextlib.nullcontext())


def make_upstream_app(upstream: "EndpointSampler", settings: ServerSettings, pacore: PacoreConfig) -> Starlette:
    """The app in front of another server. It has no model of its own and answers chats with PaCoRe.

    Args:
        upstream: closed with the app.
        pacore: its schedule is the default for requests.
    """

    async def model_name() -> str:
        try:
            return settings.model_name or await upstream.model()
        except SamplerError as error:
            raise ApiError(502, f"the upstream did not report a model name: {error}", code="upstream_failed") from error

    context = Context(
        settings,
        pacore,
        model_name=model_name,
        max_context=upstream.max_context,
        default_schedule=pacore.schedule or None,
    )
    handle = {"/v1/chat/completions": lambda body: upstream_chat_completions(context, upstream, body)}
    return _assemble(context, handle, upstream)


def _assemble(
    context: Context, handles: Mapping[str, Handle], resource: contextlib.AbstractAsyncContextManager[object]
) -> Starlette:
    """
    Args:
        handles: handlers of JSON objects, by path.
        resource: open while the app runs.
    """
    settings = context.settings

    async def health(request: Request) -> Response:
        context.admission.check_open()
        return JSONResponse({"status": "ok"})

    async def exposition(request: Request) -> Response:
        return Response(context.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await context.models()})

    async def model(request: Request) -> Response:
        chosen = await context.choose(request.path_params["name"])
        return JSONResponse(next(each for each in await context.models() if each["id"] == chosen.name))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with contextlib.closing(context):
            async with resource:
                yield

    known = [*handles, *PAGE, "/v1/models", "/health", "/metrics"]
    app = Starlette(
        routes=[
            *(Route(path, Endpoint(context, handle), methods=["POST"]) for path, handle in handles.items()),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", exposition),
            *(Route(path, _page(*file)) for path, file in PAGE.items()),
        ],
        middleware=[
            Middleware(Measurement, metrics=context.metrics, paths=known),
            Middleware(Guard, hosts=settings.hosts, keys=settings.api_keys, open_paths=[*PAGE, "/health"]),
        ],
        exception_handlers={HTTPException: answer_exception, ApiError: answer_exception, Exception: answer_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _page(content: bytes, media_type: str):
    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return page


class Endpoint:
    """A route that takes a JSON object, perhaps with streams: admits, reads and answers it. A disconnect of the client
    cancels the work.
    """

    def __init__(self, context: Context, handle: Handle):
        self._context, self._handle = context, handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, admission = self._context, self._context.admission
        try:
            admission.check_room()
            request = Request(scope, receive)
            body = await context.bodies.read(request)
            admission.check_room()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except ClientDisconnect:
            context.metrics.disconnects.inc()
            return
        parse = parse_with_streams if media_type(request) == STREAMS else parse_object
        answer = admission.start(self._answer(body, parse, scope, receive, send))
        del body  # large if it holds images
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            await answer
        except ClientDisconnect:
            context.metrics.disconnects.inc()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, body: bytes, parse: Parse, scope: Scope, receive: Receive, send: Send) -> None:
        context, most = self._context, self._context.settings.limits.body_values
        try:
            is_large = len(body) > _LARGE_BODY
            fields = await context.threads.run(parse, body, most) if is_large else parse(body, most)
            del body
            response = await self._handle(fields)
            del fields
        except asyncio.CancelledError:
            if not context.admission.is_draining:
                raise
            response = shutting_down().response()
        except Exception as error:
            response = as_api_error(error).response()
        with contextlib.suppress(asyncio.CancelledError):
            await response(scope, receive, send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Middleware -----------------------------------------------------------------------------------------------------------


class Guard:
    """Checks the Host header and, except on open paths, the API key (`Authorization: Bearer KEY`).

    Without keys the Host check stops DNS rebinding: another site could point its own name at this server.
    (Starlette's TrustedHostMiddleware answers in plain text and with another status.)
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], keys: Iterable[str], open_paths: Iterable[str]):
        self._app = app
        self._hosts, self._open_paths = frozenset(hosts), frozenset(open_paths)
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._hosts:
            value = headers.get("host", "")
            host = value.partition("]")[0] + "]" if value.startswith("[") else value.partition(":")[0]
            if host.lower() not in self._hosts:
                names = " or ".join(sorted(self._hosts))
                message = f"the Host header must be {names}: start the server with an API key to allow others"
                return ApiError(403, message, code="host_not_allowed")
        if not self._digests or path in self._open_paths:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests have the same length and all are compared, so timing reveals nothing about the keys.
        matches = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._digests]
        if scheme.lower() == "bearer" and any(matches):
            return None
        message = "the API key is missing or wrong: send the header `Authorization: Bearer KEY`"
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1")).digest()


class Measurement:
    """Counts requests and times answers, by path and status. Unknown paths share one label."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Iterable[str]):
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        path = scope["path"] if scope["path"] in self._paths else "other"
        status, has_body = "none", False  # none: the client disconnected before the response started

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
