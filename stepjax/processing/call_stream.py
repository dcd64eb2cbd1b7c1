"""Content and tool calls taken apart while they are written. `assistant_message.parse_assistant` does whole texts.

Fed in pieces of any size, the parts add up to what `parse_assistant` says of a text without reasoning, but for white
space in front of the first word, which is gone already if calls follow. A call is held back until it is complete.
"""

import json
import re
from typing import Any, NamedTuple

from stepjax.processing.assistant_message import as_call
from stepjax.processing.reasoning_stream import open_end

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_WRAPPER, _WRAPPER_END = "<tool_calls>", "</tool_calls>"
_MARKUP = re.compile(f"{_CALL}|{_WRAPPER}|{_WRAPPER_END}")
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_OUTSIDE_STRINGS = re.compile(r"[\s\w,:+.-]")  # besides brackets and quotes


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class CallStream:
    """Feed it content, then `finish`; each returns the parts, text and calls, that are certain by then."""

    def __init__(self):
        self._held = ""  # not looked at yet, or the beginning of markup
        self._call: _ObjectScanner | None = None  # of the call whose `<tool_call>` came last, while it is open
        self._num_calls = 0
        self._open_wrappers = 0  # `<tool_calls>` that were left out, and whose end will be
        self._space = ""  # dropped if a call follows, or the end after one
        self._wrapper = ""  # `<tool_calls>` and white space, dropped if a call follows
        self._begins_piece = True  # no word has come since the last call
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
        """Whether it is decided what follows `<tool_call>`, and the call if it is one; that is then taken."""
        end = scanner.scan(self._held)
        if end is None:
            return is_last or scanner.failed, None
        call = _parsed(self._held[:end])
        rest = self._held[end:].lstrip()
        if call is None:
            return True, None
        if rest.startswith(_CALL_END):
            self._held = rest[len(_CALL_END) :]
        elif is_last and not rest:  # a generation may stop right after the JSON
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
        """What is to be sent of text: pieces between calls are stripped, and joined by newlines."""
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
    """Finds the end of a JSON object in a text that grows, looking at each character once.

    Attributes:
        failed: it is no object. Only JSON whose brackets are wrong in kind passes for one, until it is parsed.
    """

    def __init__(self):
        self.failed = False
        self._position = 0
        self._depth = 0
        self._in_string = False

    def scan(self, text: str) -> int | None:
        """The end of the object, once it is there. `text` begins as it did the last time."""
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
        call = as_call(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return None if call is None else Call(**call)
