"""From requests to prompts, in threads: reading images and tokenizing would hold up everybody's streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from stepjax.interop.any_processor import AnyProcessor, content_of, encode, image_token, vocab_size
from stepjax.processing.tokens import Example, text_example
from stepjax.serving.admission import ByteBudget
from stepjax.serving.errors import ApiError
from stepjax.serving.fetch import Fetcher
from stepjax.serving.images import data_uri_bytes, plan_of, view_bytes
from stepjax.serving.processors import image_config
from stepjax.serving.schemas import ChatRequest, ImagePart, Message
from stepjax.serving.settings import Limits

_Result = TypeVar("_Result")


class PromptMaker:
    """Makes prompts within the limits."""

    def __init__(
        self,
        processor: AnyProcessor,
        limits: Limits,
        *,
        max_context: int,
        executor: Executor,
        fetcher: Fetcher | None,
    ):
        """
        Args:
            fetcher: None refuses images that are not in the request.
        """
        self.processor = processor
        self.limits = limits
        self.max_prompt_tokens = min(limits.prompt_tokens or max_context, max_context - 1)
        self._executor = executor
        self._fetcher = fetcher
        self._view_budget = ByteBudget(limits.view_bytes)

    async def run(self, function: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    @contextlib.asynccontextmanager
    async def chat(self, request: ChatRequest) -> AsyncIterator[Example]:
        """The prompt of a conversation. Its views count against the memory for views until the context is left.

        Raises:
            ApiError, StepjaxError: the prompt is too large, or an image or a message is not usable.
        """
        tools = sum(len(tool.model_dump_json()) for tool in request.tools or ())
        self._check_text(tools + sum(_text_bytes(message) for message in request.messages), "messages")
        files = await self._files(request)
        size = 0
        if files:
            size = await self.run(self._view_bytes, files)
        async with self._view_budget.hold(size) if size else contextlib.nullcontext():
            yield await self.run(self._chat, request, files)

    async def completion(self, prompt: str | list[int], where: str) -> Example:
        """The prompt of a plain completion. What text spells stays text; ids may be those of control tokens.

        Raises:
            ApiError, StepjaxError: the prompt is empty, too long, or holds ids that there are not.
        """
        if isinstance(prompt, str):
            self._check_text(_utf8_length(prompt), where)
        return await self.run(self._completion, prompt, where)

    async def _files(self, request: ChatRequest) -> dict[tuple[int, int], bytes]:
        """Image files, by the indices of their message and part."""
        parts = {
            (i, j): part.image_url.url
            for i, message in enumerate(request.messages)
            if isinstance(message.content, list)
            for j, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        }
        if len(parts) > self.limits.images:
            message = f"messages hold {len(parts)} images, more than the limit of {self.limits.images}"
            raise ApiError(400, message, param="messages", code="too_many_images")
        files = {}
        for at, url in parts.items():
            if url[:5].lower() == "data:":
                files[at] = await self.run(data_uri_bytes, url, self.limits, _where(at))
            elif self._fetcher is None:
                message = (
                    f"{_where(at)}: images are not fetched from URLs here; send a data URI: data:image/...;base64,..."
                )
                raise ApiError(400, message, param=_where(at), code="remote_images_not_allowed")
            else:
                files[at] = await self._fetcher.fetch(url)
        return files

    def _view_bytes(self, files: dict[tuple[int, int], bytes]) -> int:
        config = image_config(self.processor)
        plans = [plan_of(data, config, self.limits, _where(at)) for at, data in files.items()]
        self._check_tokens(sum(plan.num_tokens(config) - plan.num_newlines for plan in plans), "the images alone")
        size = sum(view_bytes(plan, config) for plan in plans)
        if size > self.limits.view_bytes:
            raise ApiError(400, "the views of the images take more memory than is allowed", code="image_too_large")
        return size

    def _chat(self, request: ChatRequest, files: dict[tuple[int, int], bytes]) -> Example:
        options = request.chat_template_kwargs
        example = self.processor.process_prompt(
            [self._message(message, index, files) for index, message in enumerate(request.messages)],
            tools=[tool.model_dump(exclude_none=True) for tool in request.tools or ()] if request.uses_tools else None,
            enable_thinking=options.enable_thinking if options else None,
            name="messages",
        )
        self._check_tokens(len(example.tokens), "messages")
        return example

    def _message(self, message: Message, index: int, files: dict[tuple[int, int], bytes]) -> dict[str, Any]:
        """A message as processors take it."""
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": message.content}
        if isinstance(message.content, list):
            parts = [
                {"type": "image", "image": files[index, j]} if isinstance(part, ImagePart) else part.model_dump()
                for j, part in enumerate(message.content)
            ]
            made["content"] = content_of(self.processor, parts)
        if message.reasoning_content is not None:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        return made

    def _completion(self, prompt: str | list[int], where: str) -> Example:
        if isinstance(prompt, str):
            ids = encode(self.processor, prompt)
        else:
            ids, size, of_images = prompt, vocab_size(self.processor), image_token(self.processor)
            bad = next((i for i in ids if not 0 <= i < size or i == of_images), None)
            if bad is not None:
                reason = "stands for an image" if bad == of_images else "is not in the vocabulary"
                raise ApiError(400, f"{where}: token {bad} {reason}", param="prompt", code="invalid_value")
        if not len(ids):
            raise ApiError(400, f"{where} is empty", param="prompt", code="invalid_value")
        self._check_tokens(len(ids), where)
        return text_example(ids, where)

    def _check_text(self, size: int, where: str) -> None:
        if size > self.limits.text_bytes:
            message = f"{where}: {size} bytes of text are more than the limit of {self.limits.text_bytes}"
            raise ApiError(400, message, param=where, code="context_length_exceeded")

    def _check_tokens(self, count: int, where: str) -> None:
        if count > self.max_prompt_tokens:
            message = f"{where}: {count} tokens are more than the limit of {self.max_prompt_tokens} for a prompt"
            raise ApiError(400, message, param=where, code="context_length_exceeded")


def _text_bytes(message: Message) -> int:
    texts = [message.reasoning_content or ""]
    if isinstance(message.content, str):
        texts.append(message.content)
    elif message.content is not None:
        texts += [part.text for part in message.content if not isinstance(part, ImagePart)]
    texts += [call.function.arguments for call in message.tool_calls or ()]
    return sum(map(_utf8_length, texts))


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _where(at: tuple[int, int]) -> str:
    return f"messages[{at[0]}].content[{at[1]}].image_url.url"
