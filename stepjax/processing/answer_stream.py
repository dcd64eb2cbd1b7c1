"""One sample of a chat as it is written: reasoning, content and tool calls, as fields of OpenAI's messages."""

import json
import uuid
from typing import Any

from stepjax.processing.call_stream import Call, CallStream
from stepjax.processing.reasoning_stream import ReasoningStream


class AnswerStream:
    """
    Attributes:
        num_calls: tool calls so far.
    """

    def __init__(self, *, starts_thinking: bool, parses_calls: bool):
        """
        Args:
            starts_thinking: the prompt has opened `<think>`.
            parses_calls: take tool calls out of the content.
        """
        self._reasoning = ReasoningStream(starts_thinking=starts_thinking)
        self._calls = CallStream() if parses_calls else None
        self.num_calls = 0

    def take(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """What is new with some more text: `reasoning_content`, `content` or `tool_calls`, one of them each."""
        parts = self._reasoning.feed(text) + (self._reasoning.finish() if is_last else [])
        made: list[dict[str, Any]] = []
        for kind, text in parts:
            if kind == "reasoning":
                _append(made, "reasoning_content", text)
            else:
                self._add(made, [text] if self._calls is None else self._calls.feed(text))
        if is_last and self._calls is not None:
            self._add(made, self._calls.finish())
        return made

    def _add(self, made: list[dict[str, Any]], parts: list[str | Call] | list[str]) -> None:
        for part in parts:
            if isinstance(part, Call):
                made.append({"tool_calls": [{"index": self.num_calls, **_call_json(part)}]})
                self.num_calls += 1
            else:
                _append(made, "content", part)

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self.num_calls else reason


def add_piece(message: dict[str, Any], piece: dict[str, Any]) -> None:
    """Puts a message together from what `AnswerStream.take` gives."""
    for field, value in piece.items():
        if field == "tool_calls":
            calls = [{name: each for name, each in call.items() if name != "index"} for call in value]
            message.setdefault(field, []).extend(calls)
        else:
            message[field] = (message.get(field) or "") + value


def _append(made: list[dict[str, Any]], field: str, text: str) -> None:
    if made and field in made[-1]:
        made[-1][field] += text
    else:
        made.append({field: text})


def _call_json(call: Call) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
