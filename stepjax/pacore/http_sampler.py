"""The sampler over any endpoint that speaks OpenAI's chat completions; connections are pooled and TLS is verified."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stepjax.errors import ConfigError, ImageError, TokenError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.sampler import Listener, Prompt, PromptTooLongError, Reply, SamplerError, Tokens
from stepjax.processing.assistant_message import split_reasoning
from stepjax.processing.image_files import open_image
from stepjax.processing.reasoning_stream import Part, ReasoningStream

KEY_VARIABLES = ("STEPJAX_UPSTREAM_API_KEY", "OPENAI_API_KEY")

_log = logging.getLogger("stepjax.pacore")
_TEMPORARY = {408, 409, 425, 429}  # and all from 500 on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """
    Raises:
        ConfigError: a value cannot work.
    """

    url: str  # such as http://localhost:8000/v1
    model: str | None = None  # None: the first that the endpoint lists
    api_key: str | None = dataclasses.field(default=None, repr=False)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields added to every request
    max_concurrent: int = 256  # calls under way; more wait for their turn
    streams: bool = True  # answers are streamed: a dead connection is noticed, and tokens are seen as they come
    sends_seed: bool = True
    connect_seconds: float = 20.0
    silence_seconds: float = 1000.0  # between two parts of an answer
    # How many tokens prompt and answer may have together, and a tokenizer.json to count them with: what references are
    # fitted to. Without them the endpoint's own refusal is what tells.
    max_context: int | None = None
    tokenizer: str | None = None
    # The endpoint leaves thoughts in its content, and its template opens `<think>`. None: not known; then an answer
    # that is cut off without a `</think>` counts as a thought.
    opens_thought: bool | None = None

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"upstream {self.url!r}: give a URL such as http://localhost:8000/v1")
        if self.max_concurrent < 1:
            raise ConfigError(f"max_concurrent={self.max_concurrent}: must be at least 1")
        for name in ("connect_seconds", "silence_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        if self.max_context is not None and self.tokenizer is None:
            raise ConfigError(f"max_context={self.max_context}: needs a tokenizer to count with; name a tokenizer.json")


class FileTokens:
    """A tokenizer.json, for counting."""

    def __init__(self, path: str):
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare ones
            raise TokenError(f"tokenizer {path!r} cannot be read: {error}") from error

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def tail(self, text: str, count: int) -> str:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return text[encoding.offsets[-count][0] :] if 0 < count < len(encoding.ids) else text if count > 0 else ""


class HttpSampler:
    """Used as `async with HttpSampler(endpoint) as sampler:`.

    Raises:
        ConfigError: the library that speaks to endpoints is not installed.
        TokenError: the tokenizer cannot be read.
    """

    def __init__(self, endpoint: Endpoint):
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"an upstream needs {error.name}: pip install 'stepjax[pacore]'") from error
        self._openai = openai
        self.endpoint = endpoint
        self.max_context = endpoint.max_context
        self.tokens: Tokens | None = None if endpoint.tokenizer is None else FileTokens(endpoint.tokenizer)
        key = endpoint.api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        timeout = openai.Timeout(endpoint.silence_seconds, connect=endpoint.connect_seconds, pool=None)
        # By its type, since the library's HTTP client is its own affair.
        pool = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=endpoint.max_concurrent, max_keepalive_connections=endpoint.max_concurrent
        )
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=key or "none",
            default_headers=dict(endpoint.headers),
            max_retries=0,  # the coordinator's, which counts them
            timeout=timeout,
            http_client=openai.DefaultAsyncHttpxClient(limits=pool, timeout=timeout),
        )
        self._turn = asyncio.Semaphore(endpoint.max_concurrent)
        self._model = endpoint.model
        self._asking = asyncio.Lock()
        self._has_warned = False

    async def __aenter__(self) -> "HttpSampler":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def model(self) -> str:
        """The model's name, asked for where it was not given.

        Raises:
            SamplerError: the endpoint cannot be reached, or lists none.
        """
        async with self._asking:  # once, for all calls
            if self._model is None:
                try:
                    listed = (await self._client.models.list()).data
                except self._openai.OpenAIError as error:
                    raise self._failure(error, 0) from error
                if not listed:
                    raise SamplerError(f"{self.endpoint.url} lists no model: name one", is_temporary=False)
                self._model = listed[0].id
            return self._model

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AsyncIterator[Prompt]:
        """See `Sampler.prompt`. Tokens of images, and those of the chat template, are not known and not counted."""
        made = await asyncio.to_thread(lambda: [_message(message) for message in messages])
        count = None
        if self.tokens is not None:
            count = sum(self.tokens.count(_text(message)) for message in made)
            excess = count + answer_tokens - (self.max_context or count + answer_tokens)
            if excess > 0:
                raise PromptTooLongError(
                    f"the prompt has {count} tokens; with {answer_tokens} for the answer that is {excess} more than "
                    f"max_context={self.max_context}",
                    excess=excess,
                )
        yield Prompt(count, {"messages": made, **({"tools": list(tools)} if tools else {})})

    async def sample(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
        """See `Sampler.sample`."""
        body = {**prompt.payload, **self._fields(params), **self.endpoint.body}
        known = {name: body.pop(name) for name in _KNOWN if name in body}
        answer = _Answer(listener, opens_thought=bool(self.endpoint.opens_thought))
        try:
            model = await self.model()
            async with self._turn:
                listener.begin()
                if self.endpoint.streams:
                    stream = await self._client.chat.completions.create(
                        model=model, stream=True, stream_options={"include_usage": True}, extra_body=body, **known
                    )
                    async with contextlib.aclosing(stream.response):
                        async for chunk in stream:
                            answer.take_chunk(chunk)
                else:
                    answer.take_whole(await self._client.chat.completions.create(model=model, extra_body=body, **known))
        except self._openai.OpenAIError as error:
            raise self._failure(error, listener.tokens) from error
        except (ValueError, TypeError, AttributeError, OSError) as error:  # an answer that is no answer
            raise SamplerError(f"the endpoint's answer cannot be read: {error}", is_temporary=True) from error
        if answer.finish_reason is None:
            raise SamplerError("the answer broke off", is_temporary=True, output_tokens=listener.tokens)
        return self._reply(answer, prompt)

    def _fields(self, params: SamplingParams) -> dict[str, Any]:
        """Of a request; those that are not OpenAI's only where they change something."""
        fields: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p}
        if params.max_tokens is not None:
            fields["max_tokens"] = params.max_tokens
        if params.stop:
            fields["stop"] = list(params.stop)
        if self.endpoint.sends_seed and params.seed is not None:
            fields["seed"] = params.seed
        if params.logprobs is not None:
            fields["logprobs"] = True
        for name, off in (("top_k", 0), ("min_p", 0.0), ("ignore_eos", False), ("stop_ids", ())):
            if getattr(params, name) != off:
                fields["stop_token_ids" if name == "stop_ids" else name] = getattr(params, name)
        return fields

    def _reply(self, answer: "_Answer", prompt: Prompt) -> Reply:
        content, reasoning = _whole(answer.content), _whole(answer.reasoning) or None
        if reasoning is None:
            is_cut = answer.finish_reason == "length"
            opens = is_cut if self.endpoint.opens_thought is None else self.endpoint.opens_thought
            # Where nobody knows, a whole answer without a thought is one; only of a cut one must it be assumed.
            has_thought = "</think>" in content or content.lstrip().startswith("<think>")
            if has_thought or opens:
                content, reasoning = split_reasoning(content, starts_thinking=opens)
        output_tokens = answer.output_tokens
        if output_tokens is None:
            text = content + (reasoning or "")
            output_tokens = answer.num_parts if self.tokens is None else self.tokens.count(text)
            if not self._has_warned:
                self._has_warned = True
                how = "parts of the stream" if self.tokens is None else "the tokenizer's"
                _log.warning("%s does not say how many tokens it used: %s are counted", self.endpoint.url, how)
        return Reply(
            content=content,
            reasoning=reasoning,
            tool_calls=tuple(answer.calls()),
            finish_reason=answer.finish_reason or "stop",
            prompt_tokens=answer.prompt_tokens or prompt.num_tokens or 0,
            cached_tokens=answer.cached_tokens,
            output_tokens=output_tokens,
            mean_logprob=answer.mean_logprob,
        )

    def _failure(self, error: Exception, tokens: int) -> SamplerError:
        status = getattr(error, "status_code", None)
        response = getattr(error, "response", None)
        after = None if response is None else response.headers.get("retry-after")
        try:
            seconds = None if after is None else float(after)
        except ValueError:  # a date
            seconds = None
        is_temporary = status is None or status in _TEMPORARY or status >= 500
        message = f"status {status}: {error}" if status is not None else f"{error} ({type(error).__name__})"
        cause = error.__cause__
        if status is None and cause is not None:
            message += f": {cause}"
        return SamplerError(message[:2000], is_temporary=is_temporary, retry_after=seconds, output_tokens=tokens)


_KNOWN = ("messages", "tools", "temperature", "top_p", "max_tokens", "stop", "seed", "logprobs")


class _Answer:
    """Put together from what the endpoint sends; whatever it leaves out or sends as null."""

    def __init__(self, listener: Listener, *, opens_thought: bool):
        self._listener = listener
        self._parts = ReasoningStream(starts_thinking=opens_thought)  # of a content that holds the thought
        self.content = self.reasoning = ""
        self.finish_reason: str | None = None
        self.prompt_tokens = self.cached_tokens = self.num_parts = 0
        self.output_tokens: int | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[float] = []

    def take_chunk(self, chunk: Any) -> None:
        error = getattr(chunk, "error", None)
        if error:
            raise SamplerError(f"the endpoint failed: {error}", is_temporary=True, output_tokens=self._listener.tokens)
        self._take_usage(chunk)
        for choice in chunk.choices or ():
            if choice.index == 0:
                self._take_message(choice.delta)
                self._take_end(choice)

    def take_whole(self, answer: Any) -> None:
        error = getattr(answer, "error", None)
        if error or not getattr(answer, "choices", None):
            raise SamplerError(f"the endpoint gave no answer: {error or 'no choices'}", is_temporary=True)
        self._take_usage(answer)
        self._take_message(answer.choices[0].message)
        self._take_end(answer.choices[0])

    @property
    def mean_logprob(self) -> float | None:
        return sum(self._logprobs) / len(self._logprobs) if self._logprobs else None

    def calls(self) -> list[dict[str, Any]]:
        return [call for _, call in sorted(self._calls.items())]

    def _take_end(self, choice: Any) -> None:
        if choice.finish_reason and self.finish_reason is None:
            self.finish_reason = choice.finish_reason
            self._tell(self._parts.finish())
        logprobs = getattr(choice, "logprobs", None)
        self._logprobs += [each.logprob for each in (logprobs.content if logprobs else None) or ()]

    def _take_message(self, message: Any) -> None:
        if message is None:
            return
        content = message.content or ""
        # Some servers say "reasoning".
        reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
        self.content += content
        self.reasoning += reasoning
        self.num_parts += bool(content or reasoning)
        self._listener.tokens += bool(content or reasoning)
        if reasoning:
            self._listener.piece({"reasoning_content": reasoning})
        if content and self.reasoning:
            self._listener.piece({"content": content})
        elif content:
            self._tell(self._parts.feed(content))
        calls = [self._take_call(call, place) for place, call in enumerate(message.tool_calls or ())]
        if calls:
            self._listener.piece({"tool_calls": calls})

    def _tell(self, parts: Sequence[Part]) -> None:
        for kind, text in parts:
            self._listener.piece({"content" if kind == "content" else "reasoning_content": text})

    def _take_call(self, call: Any, place: int) -> dict[str, Any]:
        index = getattr(call, "index", None)
        index = place if index is None else index
        made = self._calls.setdefault(
            index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        )
        made["id"] = call.id or made["id"]
        name, arguments = call.function.name or "", call.function.arguments or ""
        made["function"]["name"] += name
        made["function"]["arguments"] += arguments
        function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value}
        begun = {"id": call.id, "type": "function"} if call.id else {}
        return {"index": index, **begun, "function": function}

    def _take_usage(self, answer: Any) -> None:
        usage = getattr(answer, "usage", None)
        if usage is None:
            return
        self.prompt_tokens = usage.prompt_tokens or 0
        self.output_tokens = usage.completion_tokens
        details = getattr(usage, "prompt_tokens_details", None)
        self.cached_tokens = (getattr(details, "cached_tokens", None) or 0) if details else 0


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_item(item) for item in content]}


def _item(item: dict[str, Any]) -> dict[str, Any]:
    if item.get("type") != "image":
        return item
    source = item["image"]
    if item.get("frame") is not None:  # servers take none, or the first
        file = io.BytesIO()
        open_image(source, frame=item["frame"]).save(file, "PNG")
        source = file.getvalue()
    return {"type": "image_url", "image_url": {"url": data_uri(source)}}


def data_uri(source: Any) -> str:
    """An image file, as a path or its bytes, as a data URI; one that is a URI already stays as it is.

    Raises:
        ImageError: it cannot be read.
    """
    from PIL import Image

    if isinstance(source, str) and source.startswith(("data:", "http://", "https://")):
        return source
    try:
        data = bytes(source) if isinstance(source, (bytes, bytearray)) else Path(source).expanduser().read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = Image.MIME.get(image.format or "", "image/png")
    except (OSError, TypeError, ValueError) as error:
        raise ImageError(f"image {source!r:.100} cannot be read: {error}") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _whole(text: str) -> str:
    """Surrogates that came as escapes of JSON: pairs are made characters, and a half that is alone is replaced, since
    no request could hold it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(item["text"] for item in content if item.get("type") == "text")
    return content or ""
