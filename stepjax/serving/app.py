"""The routes, put together."""

import contextlib
import importlib.resources
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stepjax.interop.any_processor import AnyProcessor
from stepjax.serving.admission import Admission
from stepjax.serving.chat import chat_completions
from stepjax.serving.completions import completions
from stepjax.serving.context import Context
from stepjax.serving.endpoint import Endpoint
from stepjax.serving.engine import AsyncEngine
from stepjax.serving.errors import ApiError, answer_exception, answer_http_exception
from stepjax.serving.fetch import Fetcher
from stepjax.serving.metrics import Metrics
from stepjax.serving.middleware import Authentication, HostCheck, Measurement
from stepjax.serving.prompts import PromptMaker
from stepjax.serving.settings import ServerSettings
from stepjax.serving.views import views

_SCRIPTS = ("page.js", "answer.js", "elements.js", "server.js")
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_app(engine: AsyncEngine, processor: AnyProcessor, settings: ServerSettings) -> Starlette:
    """The server as an ASGI app. `app.state.context` holds its parts; `admission.drain` ends it."""
    limits = settings.limits
    admission = Admission(limits.requests, lambda: engine.healthy)
    executor = ThreadPoolExecutor(settings.workers, thread_name_prefix="prompts")
    fetches = ThreadPoolExecutor(8, thread_name_prefix="fetches")  # threads start when they are needed
    fetcher = Fetcher(fetches, max_bytes=limits.image_bytes, seconds=settings.fetch_seconds)
    prompts = PromptMaker(
        processor,
        limits,
        max_context=engine.max_context,
        executor=executor,
        fetcher=fetcher if settings.allow_remote_images else None,
    )
    metrics = Metrics(engine, admission)
    context = Context(engine, processor, prompts, admission, metrics, settings)

    async def health(request: Request) -> Response:
        admission.check_open()
        return JSONResponse({"status": "ok"})

    async def exposition(request: Request) -> Response:
        return Response(metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        name = request.path_params.get("name")
        context.check_model(name)
        return JSONResponse(model if name else {"object": "list", "data": [model]})

    model = {
        "id": settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "stepjax",
        "max_model_len": engine.max_context,
    }

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for pool in (executor, fetches):
                pool.shutdown(wait=False, cancel_futures=True)

    endpoints = {
        "/v1/chat/completions": chat_completions,
        "/v1/completions": completions,
        "/stepjax/views": views,
    }
    routes = [
        *(Route(path, Endpoint(context, handle), methods=["POST"]) for path, handle in endpoints.items()),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", exposition),
        *(Route(path, _page(*file)) for path, file in _PAGE.items()),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Measurement, metrics=metrics, paths=[*endpoints, *_PAGE, "/v1/models", "/health", "/metrics"]),
            *([Middleware(HostCheck, hosts=settings.hosts)] if settings.hosts else []),
            Middleware(Authentication, keys=settings.api_keys, open_paths=[*_PAGE, "/health"]),
        ],
        exception_handlers={
            HTTPException: answer_http_exception,
            ApiError: answer_exception,
            Exception: answer_exception,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _page(name: str, media_type: str):
    content = importlib.resources.files("stepjax.serving").joinpath("page", name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return page
