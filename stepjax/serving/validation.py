"""Body bytes -> a request of `schemas`. Cost is bounded before parsing, and errors name the field as the client wrote
it.
"""

import difflib
import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic
from pydantic_core import from_json

from stepjax.serving.errors import ApiError, TooLongError, invalid
from stepjax.serving.schemas import ChatMessage, ChatRequest, TextPart
from stepjax.serving.settings import Limits

# Most tokens have more bytes, so the excess in tokens is not underestimated.
_BYTES_PER_TOKEN = 2
_MAX_NAME = 100  # characters of a field's name that are compared and shown
# A string, which may contain structural characters, or a sign that precedes a further value.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,:{[]', re.DOTALL)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120

_Request = TypeVar("_Request", bound=pydantic.BaseModel)


def parse_object(body: bytes, max_values: int) -> dict[str, Any]:
    """Raises ApiError: 400, the body is not a JSON object or has too many values."""
    if has_more_values(body, max_values):
        message = f"the body has more than {max_values} values: names of fields, texts, numbers, lists and objects"
        raise invalid(message, None, "too_many_values")
    try:
        value = from_json(body)
    except ValueError as error:
        reason = str(error).replace(" column", ", column").replace("recursion limit exceeded", "nested too deeply")
        if "hex escape" in reason:
            reason += "; a lone surrogate is not a character"
        raise invalid(f"the body is not JSON: {reason:.200}", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(f"the body is a JSON {type(value).__name__}: send an object", None, "invalid_json")
    return value


def parse_with_streams(body: bytes, max_values: int) -> dict[str, Any]:
    """A JSON object in one line, and after it the streams that its features parts name, in order and without gaps.

    Such a part, `{"type": "features", "features": {"bytes": 412}}`, gets its stream as `data`.

    Raises:
        ApiError: 400, as `parse_object`, or the bytes after the line are more or fewer than the parts name.
    """
    line, _, rest = body.partition(b"\n")
    fields, position = parse_object(line, max_values), 0
    for i, message in enumerate(_list(fields.get("messages"))):
        for j, part in enumerate(_list(message.get("content") if isinstance(message, dict) else None)):
            features = part.get("features") if isinstance(part, dict) else None
            if not isinstance(features, dict) or "bytes" not in features:
                continue
            where, size = f"messages[{i}].content[{j}].features.bytes", features.pop("bytes")
            if type(size) is not int or not 0 <= size <= len(rest) - position or "data" in features:
                left = len(rest) - position
                raise invalid(f"{where}={_SHORT.repr(size)}: give the stream's size; {left} bytes are left", where)
            features["data"] = rest[position : position + size]
            position += size
    if position < len(rest):
        message = f"the body has {len(rest) - position} bytes after its line of JSON that no features part names"
        raise invalid(message, None, "extra_bytes")
    return fields


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def has_more_values(body: bytes, count: int) -> bool:
    """Whether JSON has more than `count` values.

    Every value but the first follows one of four signs. A value costs far more memory than its one or two bytes, so
    they are counted before parsing: first all signs, which is fast, and only if there are too many those outside of
    strings.
    """
    if sum(map(body.count, (b",", b":", b"{", b"["))) <= count:
        return False
    return any(index >= 2 * count for index, _ in enumerate(_TOKEN.finditer(body)))  # it matches strings too


def parse_request(kind: type[_Request], body: Mapping[str, Any]) -> _Request:
    """Raises ApiError: 400, names a field that is missing, unknown, unsupported, out of range or of the wrong type."""
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
    # Such as `messages[0].content[1].text`.
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".")
    shown, code = f"{where}={_SHORT.repr(value)}", "invalid_value"
    if kind == "unknown" and field is not None:
        code = "unknown_parameter"
        close = difflib.get_close_matches(field[:_MAX_NAME], context["fields"] + context["neutral"], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(context['fields'])}"
        message = f"{where} is not a known field; {hint}"
    elif kind == "unsupported":
        code = "unsupported_parameter"
        values = " or ".join(json.dumps(each) for each in context["values"])
        message = f"{shown} is not supported: leave it out{values and f', or give {values}'}"
    elif kind == "missing":
        message = f"{where} is missing"
    elif kind == "value_error":
        message = f"{where}: {reason.removeprefix('value error, ')}"
    else:
        message = f"{shown}: {reason}"
    return invalid(message, where, code)


def check_chat_text(request: ChatRequest, limits: Limits) -> None:
    """Raises ApiError: messages and tools together are too large, or a call's arguments have too many values."""
    tools = sum(len(tool.model_dump_json().encode()) for tool in request.tools or ())
    check_text(tools + sum(_text_bytes(message) for message in request.messages), "messages", limits)
    for i, message in enumerate(request.messages):
        for j, call in enumerate(message.tool_calls or ()):
            if has_more_values(call.function.arguments.encode(errors="replace"), limits.body_values):
                where = f"messages[{i}].tool_calls[{j}].function.arguments"
                raise invalid(f"{where}: its JSON has more than {limits.body_values} values", where, "too_many_values")


def check_text(size: int, where: str, limits: Limits) -> None:
    """Raises TooLongError: `size` bytes exceed the limit."""
    if size > limits.text_bytes:
        message = f"{where}: {size} bytes of text are more than the limit of {limits.text_bytes}"
        raise TooLongError(message, param=where, excess=1 + (size - limits.text_bytes) // _BYTES_PER_TOKEN)


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _text_bytes(message: ChatMessage) -> int:
    texts = [message.reasoning_content, message.name, message.tool_call_id]
    if isinstance(message.content, str):
        texts.append(message.content)
    elif message.content is not None:
        texts += [part.text for part in message.content if isinstance(part, TextPart)]
    for call in message.tool_calls or ():
        texts += [call.id, call.function.name, call.function.arguments]
    return sum(utf8_length(text) for text in texts if text)
