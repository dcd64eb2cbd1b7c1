"""Log-probabilities in OpenAI's two shapes. They are the model's own, whatever the temperature and the filters."""

from collections.abc import Iterable
from typing import Any

from stepjax.inference.request import TokenLogprob
from stepjax.interop.text_processor import AnyProcessor

_LEAST = -9999.0  # JSON has no infinity


def chat_logprobs(logprobs: Iterable[TokenLogprob], processor: AnyProcessor) -> dict[str, Any]:
    """One entry for every token that was drawn, those of reasoning and of markup included."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _text(processor, token)
        # A token may be a part of a character, whose bytes the tokenizer does not tell.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": data}

    return {
        "content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]} for each in logprobs
        ]
    }


class CompletionLogprobs:
    """The older shape: parallel lists, and where in the text each token begins."""

    def __init__(self, processor: AnyProcessor):
        self._processor = processor
        self._offset = 0

    def take(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
        made: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in logprobs:
            text = _text(self._processor, each.token)
            made["tokens"].append(text)
            made["token_logprobs"].append(max(each.logprob, _LEAST))
            made["top_logprobs"].append({_text(self._processor, token): max(p, _LEAST) for token, p in each.top})
            made["text_offset"].append(self._offset)
            self._offset += len(text)
        return made


def _text(processor: AnyProcessor, token: int) -> str:
    return processor.decode([token], False)
