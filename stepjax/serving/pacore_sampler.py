"""The samplers of a request's rounds: over this server's engine, or over another server."""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from stepjax.errors import BusyError, ContextLengthError, StepjaxError
from stepjax.inference.request import SamplingParams
from stepjax.processing.tokens import Example
from stepjax.rollouts.endpoint import EndpointSampler
from stepjax.rollouts.engine import EngineSampler
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, PreparedPrompt, SamplerError
from stepjax.serving.context import EngineContext
from stepjax.serving.errors import TooLongError
from stepjax.serving.schemas import ChatRequest, Message

BUSY = "the engine's queue is full"

_log = logging.getLogger("stepjax.serving")


class RequestSampler(EngineSampler):
    """Over the engine: each round's prompt is made as that of a chat is, within the limits of requests."""

    def __init__(self, context: EngineContext, request: ChatRequest):
        """
        Args:
            request: whose other fields hold for every call.
        """
        super().__init__(context.engine, context.processor, open_example=self._chat)
        self._prompts, self._request = context.prompts, request
        self._fetched: dict[str, bytes] = {}  # images that all rounds see, as they were in the first

    @contextlib.asynccontextmanager
    async def _chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> AsyncIterator[Example]:
        made = [Message.model_validate(message) for message in messages]
        request = self._request.model_copy(update={"messages": made})
        async with contextlib.AsyncExitStack() as stack:
            try:
                example = await stack.enter_async_context(self._prompts.chat(request, fetched=self._fetched))
            except TooLongError as error:
                raise ContextLengthError(error.message, excess=error.excess) from error
            yield example

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """See `Sampler.sample`. What goes wrong inside is for the log, not for the client."""
        try:
            return await super().sample(prompt, params, listener)
        except StepjaxError:
            raise
        except Exception as error:
            if isinstance(error, SamplerError) and isinstance(error.__cause__, BusyError):
                raise SamplerError(BUSY, is_temporary=True, num_tokens=listener.num_tokens) from error
            _log.error("a call of PaCoRe failed", exc_info=error)
            raise SamplerError(
                "the engine could not finish the call; the server's log says why",
                is_temporary=False,
                num_tokens=listener.num_tokens,
            ) from error


class UpstreamSampler:
    """Over another server."""

    def __init__(self, http: EndpointSampler, request: ChatRequest):
        """
        Args:
            request: what its template is told holds for every call.
        """
        self._http = http
        options = request.chat_template_kwargs
        self._fields = {"chat_template_kwargs": options.model_dump(exclude_none=True)} if options else {}
        self.max_context = http.max_context
        self.tokens = http.tokens

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AsyncIterator[PreparedPrompt]:
        """See `Sampler.prompt`."""
        async with self._http.prompt(messages, tools, answer_tokens=answer_tokens) as prompt:
            yield PreparedPrompt(prompt.num_tokens, {**prompt.payload, **self._fields})

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """See `Sampler.sample`."""
        try:
            return await self._http.sample(prompt, params, listener)
        except SamplerError as error:
            if not str(error).startswith(("status 401", "status 403")):
                raise
            # It may spell a part of the key, which is not the client's.
            _log.error("the upstream refuses the key: %s", error)
            raise SamplerError("the upstream refuses this server's key", is_temporary=False) from None
