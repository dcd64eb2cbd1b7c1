"""Tokens become text as they come: whole characters only, and nothing that may be the start of a stop string."""

from collections.abc import Callable, Sequence

from stepjax.processing.answer_stream import open_end

_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character
_MAX_HELD = 8  # tokens; no character has more bytes, so what is still unreadable then is no beginning of one


class TextStream:
    """Feed it tokens; it releases text, and says when a stop string came."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here: with the tokens before, for spaces depend on them
        self._done = 0  # tokens whose text is in `_held` or released
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """The text that may be shown after one more token."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._done])
        text = self._decode(self._tokens[self._context :])
        if text.endswith(_UNFINISHED) and len(self._tokens) - self._done < _MAX_HELD:
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """What is left when no more tokens come."""
        before = self._decode(self._tokens[self._context : self._done])
        text = self._decode(self._tokens[self._context :])[len(before) :]
        self._done = len(self._tokens)
        shown = self._release(text)
        if self.stopped_by is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        self._held += text
        ends = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if ends:
            end, self.stopped_by = min(ends)
            shown, self._held = self._held[:end], ""
            return shown
        longest = max((open_end(self._held, stop) for stop in self._stop), default=0)
        keep = len(self._held) - longest
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown
