"""The server in front of another one: it has no model, and answers chats with PaCoRe."""

import contextlib
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response

from stepjax.rollouts.endpoint import EndpointSampler
from stepjax.rollouts.sampler import SamplerError
from stepjax.serving.admission import Admission
from stepjax.serving.bounds import check_chat_text, image_urls, is_data_uri, place_of
from stepjax.serving.context import Context
from stepjax.serving.errors import ApiError
from stepjax.serving.images import data_uri_bytes
from stepjax.serving.metrics import Metrics
from stepjax.serving.model_names import ModelNames
from stepjax.serving.pacore_chat import PacoreChat
from stepjax.serving.pacore_options import pacore_config
from stepjax.serving.pacore_sampler import UpstreamSampler
from stepjax.serving.replies import respond
from stepjax.serving.routes import assemble
from stepjax.serving.schemas import ChatRequest
from stepjax.serving.settings import ServerSettings
from stepjax.serving.threads import Threads
from stepjax.serving.validation import parse_request


def make_upstream_app(upstream: EndpointSampler, settings: ServerSettings) -> Starlette:
    """See `routes.assemble`. Requests that say nothing else are answered with the schedule of `settings.pacore`.

    Args:
        upstream: is closed with the app.
    """

    async def name() -> str:
        try:
            return settings.model_name or await upstream.model()
        except SamplerError as error:
            raise ApiError(502, f"the upstream does not name its model: {error}", code="upstream_failed") from error

    admission = Admission(settings.limits.requests, lambda: True)
    threads = Threads(settings.workers, "requests")
    context = Context(
        names=ModelNames(name, max_context=upstream.max_context, default=settings.pacore.schedule or None),
        threads=threads,
        admission=admission,
        metrics=Metrics(None, admission),
        settings=settings,
    )
    resources = contextlib.AsyncExitStack()
    resources.callback(threads.close)
    resources.push_async_exit(upstream)
    return assemble(context, {"/v1/chat/completions": partial(_chat_completions, context, upstream)}, resources)


async def _chat_completions(context: Context, upstream: EndpointSampler, body: dict[str, Any]) -> Response:
    """
    Raises:
        ApiError, StepjaxError: the request cannot be served.
    """
    request = parse_request(ChatRequest, body)
    chosen = await context.names.choose(request.model)
    config = pacore_config(request, chosen, context.settings, max_context=upstream.max_context)
    await _check(context, request)
    chat = PacoreChat(context, request, chosen.name, config, UpstreamSampler(upstream, request))
    return await respond(chat, request, context.settings.limits)


async def _check(context: Context, request: ChatRequest) -> None:
    """What the upstream may refuse, too; here before it is sent there many times.

    Raises:
        ApiError: there is too much, or an image is not usable.
    """
    limits = context.settings.limits
    await context.threads.run(check_chat_text, request, limits)
    urls = image_urls(request, limits, allow_remote=context.settings.allow_remote_images)
    for at, url in urls.items():
        if is_data_uri(url):
            await context.threads.run(data_uri_bytes, url, limits, place_of(at))
