"""Reasoning and content taken apart while they are written. `assistant_message.split_reasoning` does whole texts.

    [<think>] REASONING </think> CONTENT      `<think>` is in the prompt already, or opens the text
    CONTENT <think> REASONING </think> CONTENT

Fed in pieces of any size, the parts add up to what `split_reasoning` says, if at most one `</think>` is written and a
thought was open before it. What has been sent cannot be taken back: here reasoning ends at the first `</think>`, not at
the last one, and a `</think>` that ends nothing is content.
"""

from typing import Literal, NamedTuple

_OPEN, _CLOSE = "<think>", "</think>"

_State = Literal["start", "reasoning", "content", "inner thought", "answer"]


class Part(NamedTuple):
    kind: Literal["reasoning", "content"]
    text: str


class ReasoningStream:
    """Feed it text, then `finish`; each returns the parts that are certain by then.

    States: `start` while only white space has come; `content` until a thought, if one comes; `inner thought` from a
    `<think>` in the middle, which counts only if it is closed; `answer` after the reasoning.
    """

    def __init__(self, *, starts_thinking: bool):
        """
        Args:
            starts_thinking: the prompt has opened `<think>`.
        """
        self._starts_thinking = starts_thinking
        self._state: _State = "start"
        self._held = ""  # what may yet turn out to be markup, or a newline that is cut off
        self._drops_newlines = False  # those in front of reasoning, and of the answer

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
                "inner thought": self._take_inner_thought,
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
            self._state = "inner thought"
            return [Part("content", head)]
        certain = len(head) if is_last else len(head) - open_end(head, _OPEN)
        self._held = head[certain:]
        return [Part("content", head[:certain])]

    def _take_inner_thought(self, is_last: bool) -> list[Part]:
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
    """Length of the longest end of `text` that `marker` begins with, but is not all of."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
