"""A chat completions answer, whole or assembled from a stream; every field is validated."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from stepjax.processing.answer_stream import Part, ReasoningStream
from stepjax.rollouts.sampler import Listener, SamplerError

_MOST_TEXT = 16 << 20  # characters of an answer: content, reasoning and tool calls
_MOST_CALLS = 1024
_MOST_TOKENS = 1 << 31


class EndpointAnswer:
    """What the endpoint has sent so far. Fields may be missing or null.

    Raises:
        ValueError: a field is not valid in OpenAI's API.
        SamplerError: the endpoint reported a failure, or its answer is too long.
    """

    def __init__(self, listener: Listener, *, opens_thinking: bool, has_logprobs: bool):
        self._listener, self._has_logprobs = listener, has_logprobs
        self._parts = ReasoningStream(starts_thinking=opens_thinking)  # for content that includes the reasoning
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self._length = 0
        self.finish_reason: str | None = None
        self.prompt_tokens = self.cached_tokens = self.num_parts = 0
        self.output_tokens: int | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[float] = []

    def take(self, answer: Any) -> None:
        """Adds a whole answer or a chunk."""
        error = getattr(answer, "error", None)
        if error:
            message = f"the endpoint failed: {error!s:.2000}"
            raise SamplerError(message, is_temporary=True, num_tokens=self._listener.num_tokens)
        usage = getattr(answer, "usage", None)
        if usage is not None:
            self.prompt_tokens = _count(usage, "prompt_tokens") or 0
            self.output_tokens = _count(usage, "completion_tokens")
            self.cached_tokens = _count(getattr(usage, "prompt_tokens_details", None), "cached_tokens") or 0
        for choice in answer.choices or ():
            if not choice.index:
                message = choice.delta if hasattr(choice, "delta") else choice.message
                if message is not None:
                    self._take_message(message)
                self._take_end(choice)

    @property
    def mean_logprob(self) -> float | None:
        return sum(self._logprobs) / len(self._logprobs) if self._logprobs else None

    def calls(self) -> list[dict[str, Any]]:
        return [
            {**call, "function": {**call["function"], "arguments": "".join(call["function"]["arguments"])}}
            for _, call in sorted(self._calls.items())
        ]

    def _take_message(self, message: Any) -> None:
        content = api_string("content", message.content)
        # Some servers name it "reasoning".
        said = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        reasoning = api_string("reasoning_content", said)
        self._grow(len(content) + len(reasoning))
        if content or reasoning:
            self.num_parts += 1
            self._listener.num_tokens += 1
        if reasoning:
            self.reasoning.append(reasoning)
            self._listener.piece({"reasoning_content": reasoning})
        if content:
            self.content.append(content)
            self._tell([Part("content", content)] if self.reasoning else self._parts.feed(content))
        given = message.tool_calls or ()
        if not isinstance(given, (list, tuple)):
            refuse("tool_calls", given)
        calls = [self._take_call(call, place) for place, call in enumerate(given)]
        if calls:
            self._listener.piece({"tool_calls": calls})

    def _take_call(self, call: Any, place: int) -> dict[str, Any]:
        index, function = getattr(call, "index", None), getattr(call, "function", None)
        index = place if index is None else index
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < _MOST_CALLS or function is None:
            refuse("tool_calls", call)
        name, written = api_string("a tool call's name", function.name), function.arguments
        # Some servers send an object rather than a JSON string.
        arguments = json.dumps(written) if isinstance(written, dict) else api_string("a tool call's arguments", written)
        name_of = api_string("a tool call's id", call.id)
        self._grow(len(name) + len(arguments) + len(name_of))
        made = self._calls.setdefault(
            index, {"id": None, "type": "function", "function": {"name": "", "arguments": []}}
        )
        made["id"] = name_of or made["id"]
        made["function"]["name"] += name
        made["function"]["arguments"].append(arguments)
        told = {key: value for key, value in (("name", name), ("arguments", arguments)) if value}
        begun = {"id": name_of, "type": "function"} if name_of else {}
        return {"index": index, **begun, "function": told}

    def _take_end(self, choice: Any) -> None:
        reason = api_string("finish_reason", choice.finish_reason)
        if reason and not re.fullmatch(r"[\w.:-]{1,64}", reason):
            refuse("finish_reason", reason)
        if reason and self.finish_reason is None:
            self.finish_reason = reason
            self._tell(self._parts.finish())
        logprobs = getattr(choice, "logprobs", None) if self._has_logprobs else None
        for each in (logprobs.content if logprobs else None) or ():
            value = each.logprob
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                refuse("logprob", value)
            self._logprobs.append(float(value))

    def _tell(self, parts: Sequence[Part]) -> None:
        for kind, text in parts:
            self._listener.piece({"content" if kind == "content" else "reasoning_content": text})

    def _grow(self, count: int) -> None:
        self._length += count
        if self._length > _MOST_TEXT:
            message = f"the answer is longer than {_MOST_TEXT} characters"
            raise SamplerError(message, is_temporary=True, num_tokens=self._listener.num_tokens)


def _count(of: Any, name: str) -> int | None:
    """A token count; None if the value is not one."""
    value = getattr(of, name, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value <= _MOST_TOKENS and value == int(value) else None


def api_string(name: str, value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else refuse(name, value)


def refuse(name: str, value: Any) -> NoReturn:
    raise ValueError(f"{name} is {value!r:.100}, which is not valid in OpenAI's API")


def whole_text(text: str) -> str:
    """Joins surrogate pairs that came as JSON escapes, and replaces lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
