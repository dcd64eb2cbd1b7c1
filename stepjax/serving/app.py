"""The server over an engine, put together."""

import contextlib
from functools import partial

from starlette.applications import Starlette

from stepjax.interop.text_processor import AnyProcessor
from stepjax.serving.admission import Admission
from stepjax.serving.chat import chat_completions
from stepjax.serving.completions import completions
from stepjax.serving.context import EngineContext
from stepjax.serving.engine import AsyncEngine
from stepjax.serving.fetch import Fetcher
from stepjax.serving.metrics import Metrics
from stepjax.serving.model_names import ModelNames
from stepjax.serving.prompts import PromptMaker
from stepjax.serving.routes import assemble
from stepjax.serving.settings import ServerSettings
from stepjax.serving.threads import Threads
from stepjax.serving.views import views


def make_app(engine: AsyncEngine, processor: AnyProcessor, settings: ServerSettings) -> Starlette:
    """See `routes.assemble`."""
    limits = settings.limits
    admission = Admission(limits.requests, lambda: engine.healthy)
    threads, fetches = Threads(settings.workers, "prompts"), Threads(8, "fetches")
    image_threads = Threads(settings.workers, "images")
    fetcher = Fetcher(fetches.executor, max_bytes=limits.image_bytes, seconds=settings.fetch_seconds)

    async def name() -> str:
        assert settings.model_name is not None
        return settings.model_name

    context = EngineContext(
        names=ModelNames(name, max_context=engine.max_context),
        threads=threads,
        admission=admission,
        metrics=Metrics(engine, admission),
        settings=settings,
        engine=engine,
        processor=processor,
        prompts=PromptMaker(
            processor,
            limits,
            max_context=engine.max_context,
            threads=threads,
            image_threads=image_threads,
            fetcher=fetcher if settings.allow_remote_images else None,
        ),
    )
    resources = contextlib.AsyncExitStack()
    for each in (threads, image_threads, fetches):
        resources.callback(each.close)
    endpoints = {
        "/v1/chat/completions": partial(chat_completions, context),
        "/v1/completions": partial(completions, context),
        "/stepjax/views": partial(views, context),
    }
    return assemble(context, endpoints, resources)
