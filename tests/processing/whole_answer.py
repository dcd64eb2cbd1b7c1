"""Whole answers taken apart at once: what the streams of `processing.answer_stream` are compared with."""

import dataclasses
import json
import re
from typing import Any

from stepjax.processing.answer_stream import split_reasoning

_SPACE = re.compile(r"\s*")
_CALL_END = re.compile(r"\s*(</tool_call>|\Z)")  # a generation may stop right after the JSON
_WRAPPER_START = re.compile(r"<tool_calls>\s*\Z")


@dataclasses.dataclass(frozen=True)
class AssistantMessage:
    """`tool_calls` holds `{"name": str, "arguments": dict}`; `reasoning_content` is None without a `<think>` block."""

    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    def as_message(self) -> dict[str, Any]:
        """The message to append to the conversation. It renders as the model wrote it, but for white space."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


def parse_assistant(text: str, *, starts_thinking: bool = False) -> AssistantMessage:
    content, reasoning = split_reasoning(text, starts_thinking=starts_thinking)
    content, calls = _split_calls(content)
    return AssistantMessage(content, reasoning, tuple(calls))


def _split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []
    pieces = [""]  # the text before, between and after the calls
    position = 0
    for match in re.finditer("<tool_call>", text):
        if match.start() < position:
            continue  # it is inside the arguments of the call before
        pieces[-1] += text[position : match.start()]
        position = match.start()
        parsed = _parse_call(text, match.end())
        if parsed is not None:
            call, position = parsed
            calls.append(call)
            pieces.append("")
    pieces[-1] += text[position:]
    if not calls:
        return text, []

    for index in range(len(calls)):
        opening = _WRAPPER_START.search(pieces[index])
        if opening:
            pieces[index] = pieces[index][: opening.start()]
            closing = next((i for i in range(index + 1, len(pieces)) if "</tool_calls>" in pieces[i]), None)
            if closing is not None:
                pieces[closing] = pieces[closing].replace("</tool_calls>", "", 1)
    return "\n".join(piece.strip() for piece in pieces if piece.strip()), calls


def _parse_call(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    # The JSON decides where the call ends: its strings may hold any markup.
    space = _SPACE.match(text, start)
    assert space is not None
    try:
        call, end = json.JSONDecoder().raw_decode(text, space.end())
    except (ValueError, RecursionError):
        return None
    closing, call = _CALL_END.match(text, end), _as_call(call)
    return None if closing is None or call is None else (call, closing.end())


def _as_call(value: Any) -> dict[str, Any] | None:
    """Name and arguments of a JSON value that is a call; None of another one."""
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    return {"name": name, "arguments": arguments} if isinstance(name, str) and isinstance(arguments, dict) else None
