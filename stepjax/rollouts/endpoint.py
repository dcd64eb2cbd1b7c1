"""The sampler over any OpenAI-compatible chat completions endpoint. Connections are pooled, and TLS is verified.

Responses are validated before they are stored. Invalid counts in `usage` are ignored; a field of the wrong type fails
the call, which may be retried. Responses are limited in bytes and in time. They are never decompressed: a few bytes
could expand without bound.
"""

import asyncio
import base64
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import math
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import openai
import tokenizers
import tyro
from PIL import Image
from tyro.constructors import PrimitiveConstructorSpec

from stepjax.errors import ConfigError, ImageError, TokenError, require_positive
from stepjax.inference.request import SamplingParams
from stepjax.processing.answer_stream import split_reasoning
from stepjax.processing.image_files import open_image
from stepjax.rollouts.endpoint_answer import EndpointAnswer, api_string, refuse, whole_text
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, PreparedPrompt, SamplerError, TokenCounter, check_room

KEY_VARIABLES = ("STEPJAX_UPSTREAM_API_KEY", "OPENAI_API_KEY")

_log = logging.getLogger(__name__)
_TEMPORARY = {408, 409, 425, 429}  # and 500 or above

_MOST_LINE = 16 << 20  # bytes of one stream event
_MOST_ERROR = 1 << 20  # bytes of an error response

# The HTTP library that the openai client uses: httpx or its successor.
_http: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])


def _json_object(text: str) -> dict[str, Any]:
    made = json.loads(text)
    if not isinstance(made, dict):
        raise ValueError(f"{text!r:.100} is not a JSON object")
    return made


_JsonObject = Annotated[
    Mapping[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda arguments: _json_object(arguments[0]),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [json.dumps(dict(value))],
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """
    Raises:
        ConfigError: a value is invalid.
    """

    url: str | None = None  # e.g. http://localhost:8000/v1
    model: str | None = None  # None: the first model the endpoint lists
    # Not a command-line option, since other users can see command lines; see KEY_VARIABLES.
    api_key: tyro.conf.Suppress[tyro.conf.Fixed[str | None]] = dataclasses.field(default=None, repr=False)
    headers: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, str]]] = dataclasses.field(
        default_factory=dict, repr=False
    )
    body: _JsonObject = dataclasses.field(default_factory=dict)  # fields added to every request
    max_concurrent: int = 256  # calls in progress; more wait for their turn
    streams: bool = True  # stream answers: dead connections are noticed, and tokens are counted as they arrive
    sends_seed: bool = True
    connect_seconds: float = 20.0
    silence_seconds: float = 1000.0  # between two parts of an answer
    answer_seconds: float = 6 * 3600.0  # for a whole answer, from sending the call
    max_response_bytes: int = 128 << 20  # of a whole response, JSON included
    max_context: int | None = None  # tokens of prompt and answer; needs `tokenizer`, to fit prompts before sending
    tokenizer: str | None = None  # a tokenizer.json for counting tokens
    # The endpoint's template opens <think>, and its content keeps the reasoning. None: unknown; then an answer that is
    # cut off without a </think> counts as reasoning.
    opens_thinking: bool | None = None

    def __post_init__(self):
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"upstream {self.url!r}: give a URL such as http://localhost:8000/v1")
        require_positive("upstream", self, "max_concurrent", "connect_seconds", "silence_seconds", "answer_seconds")
        require_positive("upstream", self, "max_response_bytes")
        if self.max_context is not None and self.tokenizer is None:
            raise ConfigError(f"max_context={self.max_context}: needs a tokenizer to count with; name a tokenizer.json")


class FileTokens:
    """Counts tokens with a tokenizer.json."""

    def __init__(self, path: str):
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TokenError(f"tokenizer {path!r} cannot be read: {error}") from error

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def tail(self, text: str, count: int) -> str:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return text[encoding.offsets[-count][0] :] if 0 < count < len(encoding.ids) else text if count > 0 else ""


class EndpointSampler:
    """Used as `async with EndpointSampler(endpoint) as sampler:`.

    Raises:
        ConfigError: the configuration has no URL.
        TokenError: the tokenizer cannot be read.
    """

    def __init__(self, endpoint: EndpointConfig):
        if endpoint.url is None:
            raise ConfigError("upstream.url is missing: give a URL such as http://localhost:8000/v1")
        self.endpoint = endpoint
        self.max_context = endpoint.max_context
        self.tokens: TokenCounter | None = None if endpoint.tokenizer is None else FileTokens(endpoint.tokenizer)
        key = endpoint.api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        timeout = openai.Timeout(endpoint.silence_seconds, connect=endpoint.connect_seconds, pool=None)
        connections = _http.Limits(
            max_connections=endpoint.max_concurrent, max_keepalive_connections=endpoint.max_concurrent
        )
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=key or "none",
            default_headers={**endpoint.headers, "Accept-Encoding": "identity"},
            max_retries=0,  # callers retry and count the attempts
            timeout=timeout,
            http_client=openai.DefaultAsyncHttpxClient(
                limits=connections, timeout=timeout, event_hooks={"response": [self._bound]}
            ),
        )
        self._turn = asyncio.Semaphore(endpoint.max_concurrent)
        self._model = endpoint.model
        self._asking = asyncio.Lock()
        self._has_warned = False

    async def __aenter__(self) -> "EndpointSampler":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def model(self) -> str:
        """The model's name; asks the endpoint if the configuration has none.

        Raises:
            SamplerError: the endpoint cannot be reached or lists no model.
        """
        async with self._asking:  # once, for all calls
            if self._model is None:
                async with self._reading(Listener(), self.endpoint.silence_seconds):
                    listed = (await self._client.models.list()).data
                    if not listed:
                        raise SamplerError(f"{self.endpoint.url} lists no model: name one", is_temporary=False)
                    self._model = api_string("a model's id", listed[0].id) or refuse("a model's id", listed[0].id)
            return self._model

    @contextlib.asynccontextmanager
    async def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AsyncIterator[PreparedPrompt]:
        """See `Sampler.prompt`. Tokens of images and of the chat template are unknown and not counted."""
        made = await asyncio.to_thread(lambda: [_message(message) for message in messages])
        count = None
        if self.tokens is not None:
            count = sum(self.tokens.count(_text(message)) for message in made)
            check_room(count, answer_tokens, self.max_context)
        yield PreparedPrompt(count, {"messages": made, **({"tools": list(tools)} if tools else {})})

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """See `Sampler.sample`."""
        body = {**prompt.payload, **self._fields(params), **self.endpoint.body}
        known = {name: body.pop(name) for name in _KNOWN if name in body}
        answer = EndpointAnswer(
            listener, opens_thinking=bool(self.endpoint.opens_thinking), has_logprobs=bool(known.get("logprobs"))
        )
        model = await self.model()
        async with self._turn:
            listener.begin()
            async with self._reading(listener, self.endpoint.answer_seconds):
                if self.endpoint.streams:
                    stream = await self._client.chat.completions.create(
                        model=model, stream=True, stream_options={"include_usage": True}, extra_body=body, **known
                    )
                    async with contextlib.aclosing(stream.response):
                        async for chunk in stream:
                            answer.take(chunk)
                else:
                    answer.take(await self._client.chat.completions.create(model=model, extra_body=body, **known))
        if answer.finish_reason is None:
            message = "the answer ended without a finish_reason"
            raise SamplerError(message, is_temporary=True, num_tokens=listener.num_tokens)
        return self._rollout(answer, prompt)

    @contextlib.asynccontextmanager
    async def _reading(self, listener: Listener, seconds: float) -> AsyncIterator[None]:
        """Turns any error while reading an answer, or a timeout, into SamplerError."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except SamplerError:
            raise
        except Exception as error:  # from the client, or from parsing an invalid answer
            raise _failure(error, seconds, listener.num_tokens) from error

    async def _bound(self, response: Any) -> None:
        """A response hook: runs before the body is read, and bounds it."""
        encoding = response.headers.get("content-encoding", "")
        if encoding.strip().lower() not in ("", "identity"):
            raise SamplerError(
                f"the endpoint compresses its answer ({encoding[:40]!r}) although asked not to: turn compression off",
                is_temporary=True,
            )
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        most = self.endpoint.max_response_bytes
        response.stream = _BoundedStream(
            response.stream,
            most if response.status_code < 400 else min(most, _MOST_ERROR),
            min(most, _MOST_LINE) if is_stream else most,
        )

    def _fields(self, params: SamplingParams) -> dict[str, Any]:
        """The request's sampling fields; non-OpenAI fields only if they differ from the default."""
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

    def _rollout(self, answer: EndpointAnswer, prompt: PreparedPrompt) -> Rollout:
        content, reasoning = whole_text("".join(answer.content)), whole_text("".join(answer.reasoning)) or None
        if reasoning is None:
            opens = self.endpoint.opens_thinking
            # If unknown, a truncated answer without </think> counts as reasoning, a complete one as an answer.
            opens = answer.finish_reason == "length" if opens is None else opens
            if opens or "</think>" in content or content.lstrip().startswith("<think>"):
                content, reasoning = split_reasoning(content, starts_thinking=opens)
        output_tokens = answer.output_tokens
        if output_tokens is None:
            text = content + (reasoning or "")
            output_tokens = answer.num_parts if self.tokens is None else self.tokens.count(text)
            if not self._has_warned:
                self._has_warned = True
                how = "stream chunks" if self.tokens is None else "tokens with the tokenizer"
                _log.warning("%s does not report token usage; counting %s", self.endpoint.url, how)
        return Rollout(
            content=content,
            reasoning=reasoning,
            tool_calls=tuple(answer.calls()),
            finish_reason=answer.finish_reason or "stop",
            num_prompt_tokens=answer.prompt_tokens or prompt.num_tokens or 0,
            num_cached_tokens=answer.cached_tokens,
            num_tokens=output_tokens,
            mean_logprob=answer.mean_logprob,
        )


def _failure(error: Exception, seconds: float, num_tokens: int) -> SamplerError:
    cause, status, response = error.__cause__, getattr(error, "status_code", None), getattr(error, "response", None)
    if isinstance(cause, SamplerError):  # from `_bound`
        return SamplerError(str(cause), is_temporary=cause.is_temporary, num_tokens=num_tokens)
    if status is not None:
        message = f"status {status}: {error}"
    elif isinstance(error, openai.OpenAIError):
        message = f"{error} ({type(error).__name__})" + (f": {cause}" if cause is not None else "")
    elif isinstance(error, TimeoutError):
        message = f"the answer did not end within {seconds:g} s"
    else:
        message = f"the endpoint's answer cannot be read: {error} ({type(error).__name__})"
    retry_after = None
    with contextlib.suppress(TypeError, ValueError):  # missing, or a date
        retry_after = float(response.headers.get("retry-after") if response is not None else None)  # type: ignore
    if retry_after is not None and not math.isfinite(retry_after):
        retry_after = None
    is_temporary = status is None or status in _TEMPORARY or status >= 500
    return SamplerError(message[:2000], is_temporary=is_temporary, retry_after=retry_after, num_tokens=num_tokens)


_KNOWN = ("messages", "tools", "temperature", "top_p", "max_tokens", "stop", "seed", "logprobs")


class _BoundedStream(_http.AsyncByteStream):
    def __init__(self, stream: Any, most: int, most_line: int):
        self._stream, self._most, self._most_line = stream, most, most_line

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = line = 0
        async for part in self._stream:
            count += len(part)
            line = len(part) - 1 - part.rfind(b"\n") if b"\n" in part else line + len(part)
            for found, most, what in (
                (count, self._most, "the answer"),
                (line, self._most_line, "a line of the answer"),
            ):
                if found > most:
                    raise SamplerError(f"{what} is longer than {most} bytes", is_temporary=True)
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_item(item) for item in content]}


def _item(item: dict[str, Any]) -> dict[str, Any]:
    if item.get("type") != "image":
        return item
    source = item["image"]
    # Servers accept no `frame`; they use the first.
    if item.get("frame") is not None or isinstance(source, Image.Image):
        file = io.BytesIO()
        open_image(source, frame=item.get("frame")).save(file, "PNG")
        source = file.getvalue()
    return {"type": "image_url", "image_url": {"url": _data_uri(source)}}


def _data_uri(source: Any) -> str:
    """An image file (path or bytes) as a data URI; URIs pass through."""
    if isinstance(source, str) and source.startswith(("data:", "http://", "https://")):
        return source
    try:
        data = bytes(source) if isinstance(source, (bytes, bytearray)) else Path(source).expanduser().read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = Image.MIME.get(image.format or "", "image/png")
    except (OSError, TypeError, ValueError) as error:
        raise ImageError(f"image {source!r:.100} cannot be read: {error}") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(item["text"] for item in content if item.get("type") == "text")
    return content or ""
