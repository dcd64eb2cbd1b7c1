"""Requests -> prompts, in threads: reading images and tokenizing would stall every stream."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from PIL import Image

from stepjax.errors import ContextLengthError, ImageError, RecordError
from stepjax.interop.text_processor import AnyProcessor, encode, image_token, vocab_size
from stepjax.processing.images import CodedImage
from stepjax.processing.tokens import Example, check_length, text_example
from stepjax.serving import images
from stepjax.serving.errors import ApiError, TooLongError, invalid
from stepjax.serving.features import Receiver
from stepjax.serving.fetch import Fetcher
from stepjax.serving.schemas import ChatMessage, ChatRequest, TextPart
from stepjax.serving.settings import Limits
from stepjax.serving.threads import ByteBudget, Threads
from stepjax.serving.validation import check_chat_text

_Made = TypeVar("_Made")


class PromptMaker:
    """Builds prompts within the limits."""

    def __init__(
        self,
        processor: AnyProcessor,
        receiver: Receiver,
        limits: Limits,
        *,
        max_context: int,
        threads: Threads,
        image_threads: Threads | None = None,
        fetcher: Fetcher | None,
    ):
        """
        Args:
            receiver: of images that devices have coded.
            image_threads: for requests with images; slow ones delay only each other.
            fetcher: None refuses remote images.
        """
        self.image_threads = image_threads or threads
        self.view_budget = ByteBudget(limits.view_bytes)
        self._processor, self._receiver, self._limits = processor, receiver, limits
        self._threads, self._fetcher = threads, fetcher
        self._max_tokens = min(limits.prompt_tokens or max_context, max_context - 1)

    async def complete(self, request: ChatRequest) -> ChatRequest:
        """See `Receiver.complete`. Once for a request, before any of its prompts."""
        if not any(features.resend for features in images.coded_images(request).values()):
            return request
        return await self._threads.run(self._receiver.complete, request)

    @contextlib.asynccontextmanager
    async def chat(self, request: ChatRequest, *, fetched: dict[str, bytes] | None = None) -> AsyncIterator[Example]:
        """The prompt of a conversation. Its views hold part of the view budget until the context exits.

        Args:
            fetched: image files already fetched, by URL; new ones are added.

        Raises:
            ApiError, StepjaxError: the prompt is too large, or an image or a message cannot be used.
        """
        await self._threads.run(check_chat_text, request, self._limits)
        files = await self._files(request, {} if fetched is None else fetched)
        if not files:
            yield await self._run(self._threads, "messages", self._chat, request, files)
            return
        size = await self._run(self.image_threads, "messages", self._view_bytes, request, files)
        async with self.view_budget.hold(size):
            yield await self._run(self.image_threads, "messages", self._chat, request, files)

    async def completion(self, prompt: str | list[int], where: str) -> Example:
        """The prompt of a plain completion. Text never becomes control tokens; ids may be control tokens.

        Raises:
            ApiError, StepjaxError: the prompt is empty or too long, or has unknown ids.
        """
        return await self._run(self._threads, where, self._completion, prompt, where)

    async def _run(self, threads: Threads, where: str, function: Callable[..., _Made], *args: Any) -> _Made:
        try:
            return await threads.run(function, *args)
        except ContextLengthError as error:
            raise TooLongError(str(error), param=where, excess=error.excess) from None

    async def _files(self, request: ChatRequest, fetched: dict[str, bytes]) -> dict[images.Place, bytes]:
        files, coded = {}, images.coded_images(request)
        for place, url in images.image_urls(request, self._limits, allow_remote=self._fetcher is not None).items():
            if images.is_data_uri(url):
                files[place] = await self._threads.run(images.data_uri_bytes, url, self._limits, images.name_of(place))
                continue
            if url not in fetched:
                assert self._fetcher is not None
                try:
                    fetched[url] = await self._fetcher.fetch(url)
                except ApiError as error:
                    where = images.name_of(place)
                    raise ApiError(error.status, f"{where}: {error}", param=where, code=error.code) from error
            files[place] = fetched[url]
        for place, features in coded.items():
            where = images.name_of_coded(place)
            files[place] = await self._threads.run(self._receiver.data, features, where)
        return files

    def _view_bytes(self, request: ChatRequest, files: dict[images.Place, bytes]) -> int:
        coded, plans, size = images.coded_images(request), [], 0
        for place in coded:
            plans.append(self._receiver.plan(files[place], images.name_of_coded(place)))
            size += self._receiver.image_bytes(plans[-1])
        config = images.image_config(self._processor)
        for i, j in (place for place in files if place not in coded):
            part: Any = request.messages[i].content[j]  # type: ignore[index]
            plans.append(images.plan_of(files[i, j], config, self._limits, images.name_of((i, j)), part.frame))
            size += images.view_bytes(plans[-1], config)
        tokens = sum(plan.num_tokens(config) - plan.num_newlines for plan in plans)
        check_length(tokens, self._max_tokens, "the images alone")
        if size > self._limits.view_bytes:
            raise invalid(
                "the views of the images exceed the memory limit: send fewer or smaller images", None, "image_too_large"
            )
        return size

    def _chat(self, request: ChatRequest, files: dict[images.Place, bytes]) -> Example:
        decoded = {
            place: self._receiver.image(files[place], images.name_of_coded(place))
            for place in images.coded_images(request)
        }
        opened = images.opener(self._limits)

        def open_image(image: bytes | CodedImage, **named: Any) -> Image.Image | CodedImage:
            return image if isinstance(image, CodedImage) else opened(image, **named)

        options = request.chat_template_kwargs
        # This server ignores `strict`.
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in request.tools or ()]
        try:
            return self._processor.process_prompt(
                [_message(message, index, files | decoded) for index, message in enumerate(request.messages)],
                tools=tools if request.uses_tools else None,
                enable_thinking=options.enable_thinking if options else None,
                max_tokens=self._max_tokens,
                name="messages",
                **({"open_image": open_image} if files else {}),
            )
        except RecordError as error:
            if isinstance(error.__cause__, ImageError):
                raise images.image_error(error.__cause__, "messages") from error
            raise

    def _completion(self, prompt: str | list[int], where: str) -> Example:
        if isinstance(prompt, str):
            ids = encode(self._processor, prompt, max_tokens=self._max_tokens, name=where)
            check_length(len(ids), self._max_tokens, where)
        else:
            check_length(len(prompt), self._max_tokens, where)
            ids, size, of_images = prompt, vocab_size(self._processor), image_token(self._processor)
            bad = next((i for i in ids if not 0 <= i < size or i == of_images), None)
            if bad is not None:
                reason = "stands for an image" if bad == of_images else "is not in the vocabulary"
                raise invalid(f"{where}: token {bad} {reason}", "prompt")
        if not len(ids):
            raise invalid(f"{where} is empty", "prompt")
        return text_example(ids, where)


def _message(message: ChatMessage, index: int, files: Mapping[images.Place, bytes | CodedImage]) -> dict[str, Any]:
    """A message in the processor's form."""
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": message.content}
    if isinstance(message.content, list):
        made["content"] = [
            part.model_dump()
            if isinstance(part, TextPart)
            else {"type": "image", "image": files[index, j], "frame": getattr(part, "frame", None)}
            for j, part in enumerate(message.content)
        ]
    for name in ("reasoning_content", "tool_call_id", "name"):
        if getattr(message, name) is not None:
            made[name] = getattr(message, name)
    if message.tool_calls:
        made["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    return made
