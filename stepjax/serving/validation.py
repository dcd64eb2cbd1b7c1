"""From JSON to the types of `schemas`, and from their complaints to errors that name the field."""

import difflib
import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from stepjax.serving.errors import ApiError

# Fields of OpenAI's and of other servers that are taken only where they change nothing, since clients spell defaults
# out.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
}
# Known so that they are refused as unsupported, not as misspelt.
_UNSUPPORTED = {
    *("audio", "functions", "function_call", "prediction", "reasoning_effort", "verbosity", "web_search_options"),
    *(
        "min_tokens",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "structured_outputs",
        "prompt_logprobs",
        "priority",
    ),
}

_Request = TypeVar("_Request", bound=pydantic.BaseModel)


def parse_request(kind: type[_Request], body: Mapping[str, Any]) -> _Request:
    """
    Raises:
        ApiError: 400, a field is missing, unknown, not supported or of the wrong type; names it.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in fields if name not in kind.model_fields]:
        _check_neutral(kind, name, fields.pop(name))
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _as_api_error(error, fields) from None


def _check_neutral(kind: type[pydantic.BaseModel], name: str, value: object) -> None:
    if name in _NEUTRAL:
        neutral = _NEUTRAL[name]
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
            shown = " or ".join(json.dumps(each) for each in neutral)
            message = f"{name}={_shown(value)} is not supported: leave it out, or give {shown}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    elif name in _UNSUPPORTED:
        raise ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
    else:
        close = difflib.get_close_matches(name, [*kind.model_fields, *_NEUTRAL], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(kind.model_fields)}"
        raise ApiError(400, f"unknown field {_shown(name)}; {hint}", param=name[:100], code="unknown_parameter")


def _without_nulls(message: object) -> object:
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


def _as_api_error(error: pydantic.ValidationError, body: Mapping[str, Any]) -> ApiError:
    # Of a union's alternatives the one that was followed furthest is the one that was meant.
    worst = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    kind, where = worst["type"], _path(worst["loc"], body)
    if kind == "value_error":
        message = worst["msg"].removeprefix("Value error, ")
        message = f"{where}: {message}" if where else message
    elif kind == "missing":
        message = f"{where} is missing"
    elif kind == "extra_forbidden":
        message = f"{where} is not a known field"
    else:
        message = f"{where}={_shown(worst['input'])}: {worst['msg'][:1].lower()}{worst['msg'][1:]}"
    return ApiError(400, message, param=where or None, code="invalid_value")


def _path(location: tuple[int | str, ...], body: object) -> str:
    """`messages[0].content[1].text`. Locations also name alternatives of unions, which are left out."""
    path = ""
    for index, key in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(key, int):
            path += f"[{key}]"
            body = body[key] if isinstance(body, list) and key < len(body) else None
        elif isinstance(body, dict) and (key in body or is_last):
            path += f".{key}" if path else key
            body = body.get(key)
    return path


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def _shown(value: object) -> str:
    return _SHORT.repr(value)
