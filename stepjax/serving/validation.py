"""From JSON to the types of `schemas`, and from their complaints to errors that name the field."""

import difflib
import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from stepjax.serving.errors import ApiError

_MAX_NAME = 100  # characters of a field's name that are looked at, and shown

_Request = TypeVar("_Request", bound=pydantic.BaseModel)


def parse_request(kind: type[_Request], body: Mapping[str, Any]) -> _Request:
    """
    Raises:
        ApiError: 400, a field is missing, unknown, not supported, out of range or of the wrong type; names it.
    """
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    location = [key for key in first["loc"] if not str(key).startswith("<")]  # alternatives of unions
    field: str | None = context.get("field")
    reason = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if kind in ("model_type", "part_type"):
        if isinstance(value, dict):
            field = "type"
        else:
            reason = "give an object"
    if field is not None:
        location.append(field[:_MAX_NAME])
        kind, value = kind if field in value else "missing", value.get(field)
    where = _path(location)
    code = "invalid_value"
    if kind == "unknown" and field is not None:
        code = "unknown_parameter"
        close = difflib.get_close_matches(field[:_MAX_NAME], context["fields"] + context["neutral"], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(context['fields'])}"
        message = f"{where} is not a known field; {hint}"
    elif kind == "unsupported":
        code = "unsupported_parameter"
        shown = " or ".join(json.dumps(each) for each in context["values"])
        remedy = f"leave it out, or give {shown}" if shown else "leave it out"
        message = f"{where}={_shown(value)} is not supported: {remedy}"
    elif kind == "missing":
        message = f"{where} is missing"
    elif kind == "value_error":
        message = f"{where}: {reason.removeprefix('value error, ')}"
    else:
        message = f"{where}={_shown(value)}: {reason}"
    return ApiError(400, message, param=where, code=code)


def _path(location: list[int | str]) -> str:
    """`messages[0].content[1].text`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def _shown(value: object) -> str:
    return _SHORT.repr(value)
