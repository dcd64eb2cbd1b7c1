"""A sampler that answers from a script, at once or when told."""

import asyncio
import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from stepjax.errors import ContextLengthError
from stepjax.inference.request import SamplingParams
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, PreparedPrompt


@dataclasses.dataclass(frozen=True)
class Asked:
    """A call as the script sees it."""

    messages: tuple[dict[str, Any], ...]
    params: SamplingParams
    number: int  # of the call, from 0

    @property
    def text(self) -> str:
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else "\n".join(item.get("text", "") for item in content)


# Gives a text, a rollout, an exception to raise; or a number of seconds, or something to await, before "late".
Script = Callable[[Asked], Any]


class WordTokens:
    def count(self, text: str) -> int:
        return len(text.split())

    def tail(self, text: str, count: int) -> str:
        return " ".join(text.split()[-count:]) if count > 0 else ""


class FakeSampler:
    """A token is a word."""

    def __init__(self, script: Script, *, max_context: int | None = None, tokens: Any = "words"):
        self.script, self.max_context = script, max_context
        self.tokens = WordTokens() if tokens == "words" else tokens
        self.asked: list[Asked] = []
        self.prompts: list[tuple[dict[str, Any], ...]] = []
        self.cancelled = 0

    @contextlib.asynccontextmanager
    async def prompt(self, messages, tools, *, answer_tokens):
        made = tuple(messages)
        self.prompts.append(made)
        count = len(Asked(made, SamplingParams(), 0).text.split())
        if self.max_context is not None and count + answer_tokens > self.max_context:
            raise ContextLengthError("too long", excess=count + answer_tokens - self.max_context)
        yield PreparedPrompt(count, made)

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        asked = Asked(prompt.payload, params, len(self.asked))
        self.asked.append(asked)
        listener.begin()
        await asyncio.sleep(0)
        made = self.script(asked)
        if isinstance(made, (int, float)):
            made = asyncio.sleep(made)
        if inspect.isawaitable(made):
            try:
                await made
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            made = "late"
        if isinstance(made, BaseException):
            raise made
        if isinstance(made, str):
            made = Rollout(content=made, num_tokens=len(made.split()), num_prompt_tokens=prompt.num_tokens or 0)
        listener.num_tokens += made.num_tokens
        for word in made.content.split(" ") if made.content else ():
            listener.piece({"content": word + " "})
        return made
