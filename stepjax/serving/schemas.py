"""Request schemas. Unknown fields are refused by name; no field that would change an answer is ignored. In every object
of a request, null means absent."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from stepjax.errors import RequestError
from stepjax.inference.request import SamplingParams
from stepjax.serving.errors import invalid

_MAX_DEPTH = 64  # of a JSON schema
_MAX_ITEMS = 8192  # messages, their parts and their calls; agent conversations have a few thousand
_MAX_TOOLS = 512
_MAX_NAME = 64  # characters of a tool's name, as in OpenAI's API
_DEFAULTS = SamplingParams()

_Item = TypeVar("_Item")
# Stop at the first error in a list.
_List = Annotated[list[_Item], Field(fail_fast=True)]
_Int = Annotated[int, Field(ge=-(2**64), le=2**64)]  # anything beyond is out of range for every field


def _tag_of(*kinds: type) -> Callable[[Any], str | None]:
    """Tags by type. Error locations mix tags and field names; the brackets tell them apart."""
    return lambda value: next((f"<{kind.__name__}>" for kind in kinds if isinstance(value, kind)), None)


# The value's type selects the alternative, so errors refer to the one that was meant.
_TextOr = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[_Item, Tag("<list>")],
    Discriminator(_tag_of(str, list), custom_error_type="type", custom_error_message="give a string or a list"),
]

_ANY = None  # any value of a field that changes no answer


class _Strict(pydantic.BaseModel):
    """
    Attributes:
        neutral: fields of OpenAI and other servers, accepted with these values only and then dropped: clients spell out
            defaults and echo what they received. A field with no values is refused as unsupported, not as misspelt.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    neutral: ClassVar[Mapping[str, tuple[Any, ...] | None]] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None and cls._has(name, value)}

    @classmethod
    def _has(cls, name: str, value: object) -> bool:
        """Whether the model has the field; False if it can be dropped."""
        if name in cls.model_fields:
            return True
        if name not in cls.neutral:
            context = {"field": name, "fields": list(cls.model_fields), "neutral": list(cls.neutral)}
            raise PydanticCustomError("unknown", "unknown", context)
        values = cls.neutral[name]
        is_bool = isinstance(value, bool)
        if values is not None and not any(value == each and is_bool == isinstance(each, bool) for each in values):
            raise PydanticCustomError("unsupported", "unsupported", {"field": name, "values": values})
        return False


class StreamOptions(_Strict):
    neutral = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class _Sampling(_Strict):
    """The fields that chat and plain completions share."""

    neutral = {
        **dict.fromkeys(("user", "safety_identifier", "metadata"), _ANY),
        **dict.fromkeys(("cache_control", "prompt_cache_key", "prompt_cache_retention"), _ANY),
        **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "priority"), (0,)),
        **dict.fromkeys(("repetition_penalty", "length_penalty"), (1,)),
        **dict.fromkeys(("store", "echo", "use_beam_search", "early_stopping"), (False,)),
        **dict.fromkeys(("include_stop_str_in_output", "return_token_ids", "continue_final_message"), (False,)),
        **dict.fromkeys(("parallel_tool_calls", "skip_special_tokens", "add_generation_prompt"), (True,)),
        **dict.fromkeys(("reasoning_effort", "verbosity"), ("medium",)),
        **dict.fromkeys(("functions", "documents", "bad_words"), ([],)),
        **dict.fromkeys(("audio", "prediction", "web_search_options", "structured_outputs", "prompt_logprobs"), ()),
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
        "logit_bias": ({},),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "best_of": (1,),
        "suffix": ("",),
        "function_call": ("none",),
    }

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: _Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int | None = None
    min_p: float | None = None
    n: _Int = 1
    seed: _Int | None = None
    stop: _TextOr[_List[str]] | None = None
    stop_token_ids: _List[_Int] | None = None
    ignore_eos: bool = False

    def _sampling_params(
        self, defaults: SamplingParams, *, max_tokens: int | None, logprobs: int | None, names: Mapping[str, str]
    ) -> SamplingParams:
        """
        Args:
            defaults: for fields the request leaves out.
            names: names of `SamplingParams` -> names in the request.

        Raises:
            ApiError: 400, a value is out of range.
        """
        fields = {name: getattr(self, name) for name in ("temperature", "top_p", "min_p", "seed", "n")}
        fields["top_k"] = 0 if self.top_k == -1 else self.top_k  # other servers use -1 for "off"
        fields["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop
        fields["stop_ids"] = self.stop_token_ids
        fields |= {"max_tokens": max_tokens, "ignore_eos": self.ignore_eos or None, "logprobs": logprobs}
        given = {name: value for name, value in fields.items() if value is not None}
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        try:
            return dataclasses.replace(defaults, **given)
        except RequestError as error:
            name, equals, rest = str(error).partition("=")
            name = {"stop_ids": "stop_token_ids", **names}.get(name, name)
            raise invalid(f"{name}{equals}{rest}", name) from None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # views are cut by size alone


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    frame: int | None = Field(default=None, ge=0)  # frame of an animation or page of a file


class Resend(_Strict):
    """Of a frame that arrived damaged, only those tiles are sent again (see `features.Receiver.complete`)."""

    frame: str  # from the error
    tiles: _List[_Int]


class Features(_Strict):
    data: Annotated[  # base64; or the stream itself, from a binary body (see `validation.parse_with_streams`)
        Annotated[str, Tag("<str>")] | Annotated[bytes, Tag("<bytes>")],
        Discriminator(_tag_of(str, bytes), custom_error_type="type", custom_error_message="give base64"),
    ]
    resend: Resend | None = None


class FeaturesPart(_Strict):
    """An image that a device has coded (stepjax.tofc)."""

    type: Literal["features"]
    features: Features


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[FeaturesPart, Tag("<features>")],
    Discriminator(
        _part_tag, custom_error_type="part_type", custom_error_message="give 'text', 'image_url' or 'features'"
    ),
]


class CalledFunction(_Strict):
    name: str
    arguments: str = "{}"

    @pydantic.field_validator("arguments")
    @classmethod
    def _fill(cls, arguments: str) -> str:
        return (
            "{}" if not arguments or arguments.isspace() else arguments
        )  # some clients send this for a call without arguments


class ToolCall(_Strict):
    neutral = {"index": _ANY}  # from streamed tool calls

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Strict):
    neutral = {
        "cache_control": _ANY,
        "annotations": ([],),
        "refusal": ("",),
        **dict.fromkeys(("audio", "function_call"), ()),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _TextOr[_List[Part]] | None = None
    reasoning_content: str | None = None
    tool_calls: _List[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(_Strict):
    name: str = Field(min_length=1, max_length=_MAX_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments are not constrained to the schema either way

    @pydantic.field_validator("parameters")
    @classmethod
    def _check(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        level: list[Any] = [schema]
        for _ in range(_MAX_DEPTH):
            if any(isinstance(value, float) and not math.isfinite(value) for value in level):
                raise ValueError("it has a number that is not finite")
            level = [part for value in level for part in _parts(value)]
            if not level:
                return schema
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


def _parts(value: object) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class Tool(_Strict):
    neutral = {"cache_control": _ANY}

    type: Literal["function"]
    function: Function


class ChatTemplateOptions(_Strict):
    enable_thinking: bool | None = None


class PacoreOptions(_Strict):
    """PaCoRe options of a request; absent ones default to the server's. See `pacore.config`."""

    schedule: _TextOr[_List[_Int]] | None = None  # a preset's name, "32,4", or the widths
    order: Literal["shuffle", "length"] | None = None
    overflow: Literal["shorten", "drop", "fail"] | None = None
    truncated: Literal["drop", "tail"] | None = None
    images: Literal["before", "after"] | None = None
    quorum: float | None = None
    round_seconds: float | None = None
    call_seconds: float | None = None
    retries: int | None = Field(default=None, ge=0, le=16)
    agreement: float | None = None
    # Detail of the trajectories in events and rounds: counts; also messages; also reasoning.
    include: Literal["summary", "messages", "full"] = "messages"


class ChatRequest(_Sampling):
    messages: Annotated[_List[ChatMessage], Field(min_length=1)]
    max_completion_tokens: _Int | None = None
    logprobs: bool = False
    top_logprobs: _Int | None = None
    tools: Annotated[_List[Tool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    pacore: PacoreOptions | None = None

    @pydantic.field_validator("messages", mode="before")
    @classmethod
    def _check_count(cls, messages: Any) -> Any:
        if isinstance(messages, list):
            dicts = [message for message in messages if isinstance(message, dict)]
            lists = [message.get(name) for message in dicts for name in ("content", "tool_calls")]
            count = len(messages) + sum(len(each) for each in lists if isinstance(each, list))
            if count > _MAX_ITEMS:
                raise ValueError(f"{count} messages, parts and tool calls are more than the limit of {_MAX_ITEMS}")
        return messages

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ"
            raise invalid(f"{message}: give one of them", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs={self.top_logprobs} is set, but not logprobs: set it to true"
            raise invalid(message, "top_logprobs")
        self.params()
        return self

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def params(self, defaults: SamplingParams = _DEFAULTS) -> SamplingParams:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        names = {"logprobs": "top_logprobs", "max_tokens": limit}
        return self._sampling_params(defaults, max_tokens=getattr(self, limit), logprobs=logprobs, names=names)


def _prompt_tag(prompt: Any) -> str | None:
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return "<lists>" if isinstance(first, list) else "<strs>" if isinstance(first, str) else _tag_of(str, list)(prompt)


class CompletionRequest(_Sampling):
    prompt: Annotated[
        Annotated[str, Tag("<str>")]
        | Annotated[_List[_Int], Tag("<list>")]
        | Annotated[_List[str], Tag("<strs>")]
        | Annotated[_List[_List[_Int]], Tag("<lists>")],
        Discriminator(_prompt_tag, custom_error_type="type", custom_error_message="give text, or token ids"),
    ]
    logprobs: _Int | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        self.params()
        return self

    def params(self) -> SamplingParams:
        max_tokens = 16 if self.max_tokens is None else self.max_tokens  # as in OpenAI's API
        return self._sampling_params(_DEFAULTS, max_tokens=max_tokens, logprobs=self.logprobs, names={})


class ViewsRequest(_Strict):
    image: str  # a data URI
    frame: int | None = Field(default=None, ge=0)
