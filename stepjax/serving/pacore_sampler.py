"""The samplers of a request's rounds: over this server's engine, or over another server."""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from stepjax.errors import BusyError, StepjaxError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.http_sampler import HttpSampler
from stepjax.pacore.local_sampler import ProcessorTokens, as_prompt, sample
from stepjax.pacore.sampler import Listener, Prompt, PromptTooLongError, Reply, Sampler, SamplerError, Tokens
from stepjax.serving.context import EngineContext
from stepjax.serving.errors import TooLongError
from stepjax.serving.schemas import ChatRequest, Message

BUSY = "the engine's queue is full"

_log = logging.getLogger("stepjax.serving")


class EngineSampler:
    """Over the engine: each round's prompt is made as that of a chat is, within the limits of requests."""

    def __init__(self, context: EngineContext, request: ChatRequest):
        """
        Args:
            request: whose other fields hold for every call.
        """
        self._engine, self._processor, self._prompts = context.engine, context.processor, context.prompts
        self._request = request
        self._fetched: dict[str, bytes] = {}  # images that all rounds see, as they were in the first
        self.max_context: int | None = context.engine.max_context
        self.tokens: Tokens | None = ProcessorTokens(context.processor)

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AsyncIterator[Prompt]:
        """See `Sampler.prompt`."""
        made = [Message.model_validate(message) for message in messages]
        request = self._request.model_copy(update={"messages": made})
        async with contextlib.AsyncExitStack() as stack:
            try:
                chat = self._prompts.chat(request, fetched=self._fetched)
                example = await stack.enter_async_context(chat)
            except TooLongError as error:
                raise PromptTooLongError(error.message, excess=error.excess) from error
            yield as_prompt(
                example,
                self._processor,
                has_tools=bool(tools),
                max_context=self._engine.max_context,
                answer_tokens=answer_tokens,
            )

    async def sample(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
        """See `Sampler.sample`. What goes wrong inside is for the log, not for the client."""
        try:
            return await sample(self._engine, prompt, params, listener)
        except StepjaxError:
            raise
        except Exception as error:
            if isinstance(error, SamplerError) and isinstance(error.__cause__, BusyError):
                raise SamplerError(BUSY, is_temporary=True, output_tokens=listener.tokens) from error
            _log.error("a call of PaCoRe failed", exc_info=error)
            raise SamplerError(
                "the engine could not finish the call; the server's log says why",
                is_temporary=False,
                output_tokens=listener.tokens,
            ) from error


class UpstreamSampler:
    """Over another server."""

    def __init__(self, http: HttpSampler, request: ChatRequest):
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
    ) -> AsyncIterator[Prompt]:
        """See `Sampler.prompt`."""
        async with self._http.prompt(messages, tools, answer_tokens=answer_tokens) as prompt:
            yield Prompt(prompt.num_tokens, {**prompt.payload, **self._fields})

    async def sample(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
        """See `Sampler.sample`."""
        try:
            return await self._http.sample(prompt, params, listener)
        except SamplerError as error:
            if not str(error).startswith(("status 401", "status 403")):
                raise
            # It may spell a part of the key, which is not the client's.
            _log.error("the upstream refuses the key: %s", error)
            raise SamplerError("the upstream refuses this server's key", is_temporary=False) from None


class Watched:
    """A sampler, and how far its calls are."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._under_way: dict[tuple[int, int], Listener] = {}
        self.max_context = sampler.max_context
        self.tokens = sampler.tokens

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int):
        """See `Sampler.prompt`."""
        return self._sampler.prompt(messages, tools, answer_tokens=answer_tokens)

    async def sample(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
        """See `Sampler.sample`."""
        self._under_way[listener.at] = listener
        try:
            return await self._sampler.sample(prompt, params, listener)
        finally:
            del self._under_way[listener.at]

    def counts(self) -> dict[tuple[int, int], int]:
        """Tokens of the calls under way, by round and index."""
        return {at: listener.tokens for at, listener in sorted(self._under_way.items())}
