"""Parses an answer as it is generated into reasoning, content and tool calls. `chat_template` does the reverse.

    [<think>] REASONING </think> CONTENT      `<think>` ends the prompt or starts the text
    CONTENT <think> REASONING </think> CONTENT

`split_reasoning` parses whole texts. `ReasoningStream` takes pieces of any size; its result is the same if there is at
most one `</think>` and it closes open reasoning. A stream cannot take back what it has sent: its reasoning ends at the
first `</think>`, not the last, and an unmatched `</think>` is content.

A tool call is JSON with a name and an arguments object between `<tool_call>` and `</tool_call>`; anything else there
stays content. `CallStream` holds a call back until it is complete. It strips the text between calls and removes a
surrounding `<tool_calls>`, which the public checkpoint is known to write.
"""

import json
import re
import uuid
from typing import Any, Literal, NamedTuple

_OPEN, _CLOSE = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_WRAPPER, _WRAPPER_END = "<tool_calls>", "</tool_calls>"
_MARKUP = re.compile(f"{_CALL}|{_WRAPPER}|{_WRAPPER_END}")
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_OUTSIDE_STRINGS = re.compile(r"[\s\w,:+.-]")  # besides brackets and quotes


class Part(NamedTuple):
    kind: Literal["reasoning", "content"]
    text: str


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class AnswerStream:
    """One answer, as fields of OpenAI messages.

    Attributes:
        num_calls: tool calls so far.
    """

    def __init__(self, *, starts_thinking: bool, parses_calls: bool):
        """
        Args:
            starts_thinking: the prompt opened `<think>`.
            parses_calls: extract tool calls from the content.
        """
        self._reasoning = ReasoningStream(starts_thinking=starts_thinking)
        self._calls = CallStream() if parses_calls else None
        self.num_calls = 0

    def take(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Feeds text; returns new pieces, each a dict of `reasoning_content`, `content` or `tool_calls`."""
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
    """Adds a piece from `AnswerStream.take` to a message."""
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


def split_reasoning(text: str, *, starts_thinking: bool = False) -> tuple[str, str | None]:
    """Content and reasoning of an assistant's whole text; without reasoning, the unchanged text and None.

    Args:
        starts_thinking: the prompt opened `<think>`. Text that never closes it, such as a truncated generation, is all
            reasoning.
    """
    head, is_closed, tail = text.rpartition(_CLOSE)
    if not is_closed:
        head = text
    content = tail.lstrip("\n") if is_closed else ""
    before, is_open, after = head.partition(_OPEN)
    starts_reasoning = is_open and not before.strip()
    if starts_reasoning or (is_open and is_closed and not starts_thinking):
        # Text before the reasoning belongs to the answer.
        return (before if before.strip() else "") + content, after.strip("\n")
    if is_closed or starts_thinking:
        return content, head.strip("\n")
    return text, None


_State = Literal["start", "reasoning", "content", "inner reasoning", "answer"]


class ReasoningStream:
    """Call `feed` with text, then `finish`; each returns the parts that are certain by then.

    States: `start` while there is only white space; `content` until reasoning begins, if it does; `inner reasoning`
    after a `<think>` mid-text, which counts only if it is closed; `answer` after the reasoning.
    """

    def __init__(self, *, starts_thinking: bool):
        """
        Args:
            starts_thinking: the prompt has opened `<think>`.
        """
        self._starts_thinking = starts_thinking
        self._state: _State = "start"
        self._held = ""  # possible markup, or a newline to strip
        self._drops_newlines = False  # strip newlines before reasoning and before the answer

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return self._take(is_last=False)

    def finish(self) -> list[Part]:
        return self._take(is_last=True)

    def _take(self, *, is_last: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            state = self._state
            step = {
                "start": self._take_start,
                "reasoning": self._take_reasoning,
                "content": self._take_content,
                "inner reasoning": self._take_inner_reasoning,
                "answer": self._take_answer,
            }[state]
            parts += step(is_last)
            if self._state == state:
                return [part for part in parts if part.text]

    def _take_start(self, is_last: bool) -> list[Part]:
        text = self._held.lstrip()
        if text.startswith(_OPEN):
            self._held = text[len(_OPEN) :]
            self._enter_reasoning()
        elif is_last or not _OPEN.startswith(text):
            if self._starts_thinking:
                self._enter_reasoning()
            else:
                self._state = "content"
        return []

    def _enter_reasoning(self) -> None:
        self._state, self._drops_newlines = "reasoning", True

    def _enter_answer(self) -> None:
        self._state, self._drops_newlines = "answer", True

    def _take_reasoning(self, is_last: bool) -> list[Part]:
        self._drop_newlines()
        head, is_closed, tail = self._held.partition(_CLOSE)
        if is_closed:
            self._held = tail
            self._enter_answer()
            return [Part("reasoning", head.rstrip("\n"))]
        if is_last:
            self._held = ""
            return [Part("reasoning", head.rstrip("\n"))]
        certain = len(head[: len(head) - open_end(head, _CLOSE)].rstrip("\n"))
        self._held = head[certain:]
        return [Part("reasoning", head[:certain])]

    def _take_content(self, is_last: bool) -> list[Part]:
        head, is_open, tail = self._held.partition(_OPEN)
        if is_open:
            self._held = tail
            self._state = "inner reasoning"
            return [Part("content", head)]
        certain = len(head) if is_last else len(head) - open_end(head, _OPEN)
        self._held = head[certain:]
        return [Part("content", head[:certain])]

    def _take_inner_reasoning(self, is_last: bool) -> list[Part]:
        head, is_closed, tail = self._held.partition(_CLOSE)
        if is_closed:
            self._held = tail
            self._enter_answer()
            return [Part("reasoning", head.strip("\n"))]
        if is_last:
            self._held = ""
            return [Part("content", _OPEN + head)]
        return []

    def _take_answer(self, is_last: bool) -> list[Part]:
        self._drop_newlines()
        text, self._held = self._held, ""
        return [Part("content", text)]

    def _drop_newlines(self) -> None:
        if self._drops_newlines:
            self._held = self._held.lstrip("\n")
            self._drops_newlines = not self._held


def open_end(text: str, marker: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


class CallStream:
    """Call `feed` with content, then `finish`; each returns the text and calls that are certain by then."""

    def __init__(self):
        self._held = ""  # not parsed yet, or possibly the start of markup
        self._call: _ObjectScanner | None = None  # scanner of the open call, if any
        self._num_calls = 0
        self._open_wrappers = 0  # number of dropped `<tool_calls>` whose end tag is to be dropped too
        self._space = ""  # white space, dropped before a call, or at the end after a call
        self._wrapper = ""  # `<tool_calls>` and white space, dropped before a call
        self._begins_piece = True  # no words since the last call
        self._has_text = False

    def feed(self, text: str) -> list[str | Call]:
        self._held += text
        return self._take(is_last=False)

    def finish(self) -> list[str | Call]:
        parts = [*self._take(is_last=True), *self._words(self._wrapper)]
        if self._space and not self._num_calls:
            parts.append(self._space)
        return parts

    def _take(self, *, is_last: bool) -> list[str | Call]:
        parts: list[str | Call] = []
        while True:
            if self._call is not None:
                is_decided, call = self._take_call(self._call, is_last)
                if not is_decided:
                    return parts
                self._call = None
                parts += self._end_piece(call) if call else self._text(_CALL)
                continue
            markup = _MARKUP.search(self._held)
            if markup is None:
                unsure = 0 if is_last else max(open_end(self._held, m) for m in (_CALL, _WRAPPER, _WRAPPER_END))
                end = len(self._held) - unsure
                parts += self._text(self._held[:end])
                self._held = self._held[end:]
                return parts
            parts += self._text(self._held[: markup.start()])
            self._held = self._held[markup.end() :]
            if markup[0] == _CALL:
                self._call = _ObjectScanner()
            elif markup[0] == _WRAPPER:
                parts += self._words(self._wrapper)
                self._wrapper = _WRAPPER
            elif self._open_wrappers:
                self._open_wrappers -= 1
            else:
                parts += self._text(_WRAPPER_END)

    def _take_call(self, scanner: "_ObjectScanner", is_last: bool) -> tuple[bool, Call | None]:
        """Whether the text after `<tool_call>` is decided, and the call if it is one, which is then consumed."""
        end = scanner.scan(self._held)
        if end is None:
            return is_last or scanner.failed, None
        call = _parsed(self._held[:end])
        rest = self._held[end:].lstrip()
        if call is None:
            return True, None
        if rest.startswith(_CALL_END):
            self._held = rest[len(_CALL_END) :]
        elif is_last and not rest:  # generation may stop right after the JSON
            self._held = ""
        else:
            return is_last or not _CALL_END.startswith(rest), None
        return True, call

    def _end_piece(self, call: Call) -> list[str | Call]:
        self._open_wrappers += bool(self._wrapper)
        self._wrapper = self._space = ""
        self._begins_piece = True
        self._num_calls += 1
        return [call]

    def _text(self, text: str) -> list[str | Call]:
        if self._wrapper:
            text = self._wrapper + text
            if text[len(_WRAPPER) :].isspace() or text == _WRAPPER:
                self._wrapper = text
                return []
        return self._words(text)

    def _words(self, text: str) -> list[str | Call]:
        """The text to send: pieces between calls are stripped and joined by newlines."""
        self._wrapper = ""
        text = self._space + text
        words = text.rstrip()
        self._space = text[len(words) :]
        if not words:
            return []
        if self._begins_piece and self._num_calls:
            words = ("\n" if self._has_text else "") + words.lstrip()
        self._begins_piece, self._has_text = False, True
        return [words]


class _ObjectScanner:
    """Finds the end of a JSON object in a growing text, reading each character once.

    Attributes:
        failed: the text is not an object. Mismatched kinds of brackets are only detected when it is parsed.
    """

    def __init__(self):
        self.failed = False
        self._position = 0
        self._depth = 0
        self._in_string = False

    def scan(self, text: str) -> int | None:
        """The end of the object, or None so far. `text` must extend the previous call's text."""
        while self._position < len(text) and not self.failed:
            if self._in_string:
                mark = _QUOTE_OR_ESCAPE.search(text, self._position)
                if mark is None:
                    self._position = len(text)
                elif mark[0] == '"':
                    self._position, self._in_string = mark.end(), False
                elif mark.end() == len(text):
                    self._position = mark.start()
                    return None
                else:
                    self._position = mark.end() + 1
                continue
            character = text[self._position]
            if character in "}]" and self._depth == 1:
                return self._position + 1
            self._position += 1
            if character in "{[":
                self._depth += 1
                self.failed = self._depth == 1 and character == "["
            elif character in "}]":
                self._depth -= 1
            elif character == '"':
                self._in_string = True
            elif not _OUTSIDE_STRINGS.match(character):
                self.failed = True
            if not self._depth and not character.isspace():
                self.failed = True
        return None


def _parsed(text: str) -> Call | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = (value.get("name"), value.get("arguments", {})) if isinstance(value, dict) else (None, None)
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
