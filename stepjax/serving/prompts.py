"""From requests to prompts, in threads: reading images and tokenizing would hold up everybody's streams."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from stepjax.errors import ContextLengthError, ImageError, RecordError
from stepjax.interop.text_processor import AnyProcessor, encode, image_token, vocab_size
from stepjax.processing.tokens import Example, check_length, text_example
from stepjax.serving.admission import ByteBudget
from stepjax.serving.bounds import check_chat_text, image_urls, is_data_uri, place_of
from stepjax.serving.errors import ApiError, TooLongError
from stepjax.serving.fetch import Fetcher
from stepjax.serving.images import data_uri_bytes, image_error, opener, plan_of, view_bytes
from stepjax.serving.processors import image_config
from stepjax.serving.schemas import ChatRequest, ImagePart, Message, Tool
from stepjax.serving.settings import Limits
from stepjax.serving.threads import Threads

_Made = TypeVar("_Made")


class PromptMaker:
    """Makes prompts within the limits."""

    def __init__(
        self,
        processor: AnyProcessor,
        limits: Limits,
        *,
        max_context: int,
        threads: Threads,
        image_threads: Threads | None = None,
        fetcher: Fetcher | None,
    ):
        """
        Args:
            image_threads: for requests with images, which may take long and then keep only others with images waiting.
            fetcher: None refuses images that are not in the request.
        """
        self.image_threads = image_threads or threads
        self.processor = processor
        self.limits = limits
        self.max_prompt_tokens = min(limits.prompt_tokens or max_context, max_context - 1)
        self._threads = threads
        self._fetcher = fetcher
        self._view_budget = ByteBudget(limits.view_bytes)

    @contextlib.asynccontextmanager
    async def chat(self, request: ChatRequest, *, fetched: dict[str, bytes] | None = None) -> AsyncIterator[Example]:
        """The prompt of a conversation. Its views count against the memory for views until the context is left.

        Args:
            fetched: image files by their URL, which are not fetched again; those that are new are added.

        Raises:
            ApiError, StepjaxError: the prompt is too large, or an image or a message is not usable.
        """
        await self._threads.run(check_chat_text, request, self.limits)
        files = await self._files(request, {} if fetched is None else fetched)
        size = 0
        if files:
            size = await self._run("messages", self._view_bytes, request, files, threads=self.image_threads)
        async with self._view_budget.hold(size) if size else contextlib.nullcontext():
            threads = self.image_threads if files else self._threads
            yield await self._run("messages", self._chat, request, files, threads=threads)

    async def completion(self, prompt: str | list[int], where: str) -> Example:
        """The prompt of a plain completion. What text spells stays text; ids may be those of control tokens.

        Raises:
            ApiError, StepjaxError: the prompt is empty, too long, or holds ids that there are not.
        """
        return await self._run(where, self._completion, prompt, where)

    async def _run(
        self, where: str, function: Callable[..., _Made], *args: Any, threads: Threads | None = None
    ) -> _Made:
        try:
            return await (threads or self._threads).run(function, *args)
        except ContextLengthError as error:
            raise TooLongError(str(error), param=where, excess=error.excess) from None

    async def _files(self, request: ChatRequest, fetched: dict[str, bytes]) -> dict[tuple[int, int], bytes]:
        """Image files, by the indices of their message and part."""
        urls = image_urls(request, self.limits, allow_remote=self._fetcher is not None)
        files = {}
        for at, url in urls.items():
            if is_data_uri(url):
                files[at] = await self._threads.run(data_uri_bytes, url, self.limits, place_of(at))
            elif url in fetched:
                files[at] = fetched[url]
            else:
                assert self._fetcher is not None
                try:
                    files[at] = fetched[url] = await self._fetcher.fetch(url)
                except ApiError as error:
                    place = place_of(at)
                    raise ApiError(error.status, f"{place}: {error}", param=place, code=error.code) from error
        return files

    def _view_bytes(self, request: ChatRequest, files: dict[tuple[int, int], bytes]) -> int:
        config = image_config(self.processor)
        plans = []
        for (i, j), data in files.items():
            part: Any = request.messages[i].content[j]  # type: ignore[index]
            plans.append(plan_of(data, config, self.limits, place_of((i, j)), part.frame))
        tokens = sum(plan.num_tokens(config) - plan.num_newlines for plan in plans)
        check_length(tokens, self.max_prompt_tokens, "the images alone")
        size = sum(view_bytes(plan, config) for plan in plans)
        if size > self.limits.view_bytes:
            raise ApiError(400, "the views of the images take more memory than is allowed", code="image_too_large")
        return size

    def _chat(self, request: ChatRequest, files: dict[tuple[int, int], bytes]) -> Example:
        options = request.chat_template_kwargs
        more = {"open_image": opener(self.limits)} if files else {}
        try:
            return self.processor.process_prompt(
                [self._message(message, index, files) for index, message in enumerate(request.messages)],
                tools=[_tool(tool) for tool in request.tools or ()] if request.uses_tools else None,
                enable_thinking=options.enable_thinking if options else None,
                max_tokens=self.max_prompt_tokens,
                name="messages",
                **more,
            )
        except RecordError as error:
            if isinstance(error.__cause__, ImageError):
                raise image_error(error.__cause__, "messages") from error
            raise

    def _message(self, message: Message, index: int, files: dict[tuple[int, int], bytes]) -> dict[str, Any]:
        """A message as processors take it."""
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": message.content}
        if isinstance(message.content, list):
            made["content"] = [
                {"type": "image", "image": files[index, j], "frame": part.frame}
                if isinstance(part, ImagePart)
                else part.model_dump()
                for j, part in enumerate(message.content)
            ]
        for name in ("reasoning_content", "tool_call_id", "name"):
            if getattr(message, name) is not None:
                made[name] = getattr(message, name)
        if message.tool_calls:
            made["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        return made

    def _completion(self, prompt: str | list[int], where: str) -> Example:
        if isinstance(prompt, str):
            ids = encode(self.processor, prompt, max_tokens=self.max_prompt_tokens, name=where)
            check_length(len(ids), self.max_prompt_tokens, where)
        else:
            check_length(len(prompt), self.max_prompt_tokens, where)
            ids, size, of_images = prompt, vocab_size(self.processor), image_token(self.processor)
            bad = next((i for i in ids if not 0 <= i < size or i == of_images), None)
            if bad is not None:
                reason = "stands for an image" if bad == of_images else "is not in the vocabulary"
                raise ApiError(400, f"{where}: token {bad} {reason}", param="prompt", code="invalid_value")
        if not len(ids):
            raise ApiError(400, f"{where} is empty", param="prompt", code="invalid_value")
        return text_example(ids, where)


def _tool(tool: Tool) -> dict[str, Any]:
    """A tool as the model is told of it: `strict` is for servers, and changes no answer of this one."""
    return tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
