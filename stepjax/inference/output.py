"""Turns sampled tokens into text, deltas and completions."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, Any

from stepjax.inference.request import Completion, Delta, TokenLogprob
from stepjax.processing.answer_stream import open_end

if TYPE_CHECKING:
    from stepjax.inference.programs import Drawn
    from stepjax.inference.sequence import Sequence

_UNFINISHED = "\ufffd"  # a decoder's output for an incomplete character
_MAX_HELD = 8  # tokens; no character has more bytes, so text still undecodable by then is not a partial character


class TextStream:
    """Incremental detokenizer: emits whole characters only, and holds back possible starts of stop strings."""

    def __init__(self, decode: Callable[[Tokens[int]], str], stop: Tokens[str] = ()):
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here, a few tokens early, because spaces depend on the preceding tokens
        self._done = 0  # tokens whose text is in `_held` or released
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is now safe to emit."""
        self._tokens.append(token)
        before = self._decode(tuple(self._tokens[self._context : self._done]))
        text = self._decode(tuple(self._tokens[self._context :]))
        if text.endswith(_UNFINISHED) and len(self._tokens) - self._done < _MAX_HELD:
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """The remaining text, after the last token."""
        before = self._decode(tuple(self._tokens[self._context : self._done]))
        text = self._decode(tuple(self._tokens[self._context :]))[len(before) :]
        self._done = len(self._tokens)
        shown = self._release(text)
        if self.stopped_by is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._stop:
            return text
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


def make_delta(sequence: "Sequence", **fields: Any) -> Delta:
    prompt = sequence.prompt
    return Delta(
        prompt.request_id,
        sequence.sample,
        seed=prompt.seed,
        num_prompt_tokens=len(prompt.tokens_T),
        num_cached_tokens=prompt.num_cached or 0,
        **fields,
    )


def advance(sequence: "Sequence", drawn: "Drawn", row: int, stop_ids: frozenset[int]) -> Delta:
    """Appends a row's new tokens, up to the one that ends the sample; returns the delta."""
    params = sequence.prompt.params
    ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else stop_ids)
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    text, finish, reason, stop_token = "", None, None, None
    for i, token in enumerate(drawn.tokens_IB[:, row].tolist()):
        if token < 0:
            finish, reason = "error", f"the logits at position {sequence.length} are not finite"
            break
        if token in ends:
            finish, reason = "stop", token if token in params.stop_ids else None
            stop_token = None if params.logprobs is None else _logprob(drawn, i, row, params.logprobs)
            break
        tokens.append(token)
        sequence.generated.append(token)
        if params.logprobs is not None:
            logprobs.append(_logprob(drawn, i, row, params.logprobs))
        if sequence.text is not None:
            text += sequence.text.add(token)
            if sequence.text.stopped_by is not None:
                finish, reason = "stop", sequence.text.stopped_by
                break
        if sequence.length >= sequence.prompt.limit:
            finish = "length"
            break
    if finish is not None and sequence.text is not None:
        text += sequence.text.finish()
        if sequence.text.stopped_by is not None:  # finish() completed a stop string
            finish, reason = "stop", sequence.text.stopped_by
    return make_delta(
        sequence,
        tokens=tuple(tokens),
        text=text,
        logprobs=tuple(logprobs),
        stop_token=stop_token,
        finish_reason=finish,
        stop_reason=reason,
    )


def _logprob(drawn: "Drawn", i: int, row: int, num_top: int) -> TokenLogprob:
    top = zip(
        drawn.top_tokens_IBL[i, row, :num_top].tolist(), drawn.top_logprobs_IBL[i, row, :num_top].tolist(), strict=True
    )
    return TokenLogprob(
        token=int(drawn.tokens_IB[i, row]),
        logprob=float(drawn.logprobs_IB[i, row]),
        sampling_logprob=float(drawn.sampling_logprobs_IB[i, row]),
        top=tuple(top),
    )


def completions(deltas: Iterable[Delta]) -> list[Completion]:
    """The samples of one request, in order, from all its deltas."""
    by_sample: dict[int, list[Delta]] = defaultdict(list)
    for delta in deltas:
        by_sample[delta.sample].append(delta)
    return [_joined(by_sample[sample]) for sample in sorted(by_sample)]


def _joined(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish_reason is not None, f"sample {last.sample} of {last.request_id} has not ended"
    whole = {
        "tokens": tuple(token for delta in deltas for token in delta.tokens),
        "text": "".join(delta.text for delta in deltas),
        "logprobs": tuple(logprob for delta in deltas for logprob in delta.logprobs),
    }
    return Completion(**vars(last) | whole)
