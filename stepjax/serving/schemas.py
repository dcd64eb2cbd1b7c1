"""What requests may hold. `validation` refuses everything else by name; nothing is ignored."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from stepjax.errors import RequestError
from stepjax.inference.request import SamplingParams
from stepjax.serving.errors import ApiError

_MAX_DEPTH = 64  # of a JSON schema

_Item = TypeVar("_Item")
# A million mistakes in a list are told as one.
_List = Annotated[list[_Item], Field(fail_fast=True)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Sampling(_Strict):
    """The fields that chat and plain completions share; None is as if left out."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # an identifier of the caller's own; it changes no answer
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int = 1
    seed: int | None = None
    stop: str | _List[str] | None = None
    stop_token_ids: _List[int] | None = None
    ignore_eos: bool = False

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """
        Raises:
            ApiError: 400, a value is out of range.
        """
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "min_p", "seed")}
        top_k = 0 if self.top_k == -1 else self.top_k  # other servers spell "off" so
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 16:
            raise ApiError(400, f"stop holds {len(stop)} strings: give at most 16", param="stop")
        try:
            return SamplingParams(
                **{name: value for name, value in {**given, "top_k": top_k}.items() if value is not None},
                n=self.n,
                max_tokens=max_tokens,
                stop=stop,
                stop_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
            )
        except RequestError as error:
            name = str(error).partition("=")[0]
            raise ApiError(400, str(error), param=name if name in type(self).model_fields else None) from None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "high"] = "auto"  # views are cut by size alone


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class CalledFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | _List[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: _List[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(_Strict):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None

    @pydantic.field_validator("parameters")
    @classmethod
    def _check_depth(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        level: list[Any] = [schema]
        for _ in range(_MAX_DEPTH):
            level = [part for value in level for part in _parts(value)]
            if not level:
                return schema
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


def _parts(value: object) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class ChatTemplateOptions(_Strict):
    enable_thinking: bool | None = None


class PacoreOptions(_Strict):
    """How PaCoRe goes about a request; what is left out is the server's. See `pacore.config`."""

    schedule: str | _List[int] | None = None  # a preset's name, "32,4", or the widths
    order: Literal["shuffle", "length"] | None = None
    overflow: Literal["shorten", "drop", "fail"] | None = None
    truncated: Literal["drop", "tail"] | None = None
    images: Literal["before", "after"] | None = None
    quorum: float | None = None
    round_seconds: float | None = None
    call_seconds: float | None = None
    retries: int | None = Field(default=None, le=16)
    agreement: float | None = None
    # What events and rounds hold of the trajectories: counts alone; their messages; their reasoning, too.
    include: Literal["summary", "messages", "full"] = "messages"


class ChatRequest(_Sampling):
    messages: _List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: _List[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    pacore: PacoreOptions | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is set, but not logprobs: set it to true")
        if self.tool_choice == "auto" and not self.tools:
            raise ValueError("tool_choice is set without tools")
        return self

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def params(self) -> SamplingParams:
        """
        Raises:
            ApiError: 400, a value is out of range.
        """
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens=max_tokens, logprobs=logprobs)


class CompletionRequest(_Sampling):
    prompt: str | _List[int] | _List[str] | _List[_List[int]]
    logprobs: int | None = None

    def params(self) -> SamplingParams:
        """
        Raises:
            ApiError: 400, a value is out of range.
        """
        max_tokens = 16 if self.max_tokens is None else self.max_tokens  # as OpenAI's
        return self.sampling_params(max_tokens=max_tokens, logprobs=self.logprobs)


class ViewsRequest(_Strict):
    image: str  # a data URI
