"""The routes that every server has, and what stands around them: the page, names, health and metrics."""

import contextlib
from collections.abc import AsyncIterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stepjax.serving.context import Context
from stepjax.serving.endpoint import Endpoint, Handle
from stepjax.serving.errors import ApiError, answer_exception, answer_http_exception
from stepjax.serving.middleware import Authentication, HostCheck, Measurement
from stepjax.web import PAGE

_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def assemble(
    context: Context, endpoints: Mapping[str, Handle], resources: contextlib.AbstractAsyncContextManager[object]
) -> Starlette:
    """The ASGI app. `app.state.context` holds its parts; `admission.drain` ends it.

    Args:
        endpoints: what takes JSON objects, by path.
        resources: held open while the app runs.
    """
    settings, admission, metrics = context.settings, context.admission, context.metrics

    async def health(request: Request) -> Response:
        admission.check_open()
        return JSONResponse({"status": "ok"})

    async def exposition(request: Request) -> Response:
        return Response(metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await context.names.listed()})

    async def model(request: Request) -> Response:
        chosen = await context.names.choose(request.path_params["name"])
        return JSONResponse(next(each for each in await context.names.listed() if each["id"] == chosen.name))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with resources:
            yield

    routes = [
        *(Route(path, Endpoint(context, handle), methods=["POST"]) for path, handle in endpoints.items()),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", exposition),
        *(Route(path, _page(*file)) for path, file in PAGE.items()),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Measurement, metrics=metrics, paths=[*endpoints, *PAGE, "/v1/models", "/health", "/metrics"]),
            *([Middleware(HostCheck, hosts=settings.hosts)] if settings.hosts else []),
            Middleware(Authentication, keys=settings.api_keys, open_paths=[*PAGE, "/health"]),
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


def _page(content: bytes, media_type: str):
    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return page
