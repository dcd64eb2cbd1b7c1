"""The protocol between a model and whatever draws rollouts of it: PaCoRe, evaluation, training, the server.

`EngineSampler` (an engine in this process) and `EndpointSampler` (any OpenAI-compatible server) implement it.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from stepjax.errors import ContextLengthError
from stepjax.inference.request import SamplingParams
from stepjax.rollouts.rollout import Rollout

# What is new of a message while it is written: `content`, `reasoning_content` or `tool_calls`, as in OpenAI's deltas.
Piece = dict[str, Any]


class SamplerError(RuntimeError):
    """A call failed.

    Attributes:
        is_temporary: the same call may succeed later.
        retry_after: seconds that the server asks to wait.
        num_tokens: sampled before the failure, as far as they are known.
    """

    def __init__(self, message: str, *, is_temporary: bool, retry_after: float | None = None, num_tokens: int = 0):
        super().__init__(message)
        self.is_temporary, self.retry_after, self.num_tokens = is_temporary, retry_after, num_tokens


class Listener:
    """Follows a rollout while it is sampled.

    Attributes:
        num_tokens: sampled so far, as far as the sampler knows.
        has_answer: a part of the answer was passed on, not only reasoning and white space.
        began: by `time.monotonic`, when the call was sent; until then it waits for its turn and no time limit runs.
    """

    def __init__(
        self,
        on_piece: Callable[[Piece], None] | None = None,
        *,
        on_begin: Callable[[], None] = lambda: None,
    ):
        self.num_tokens = 0
        self.has_answer = False
        self.began: float | None = None
        self._on_piece, self._on_begin = on_piece, on_begin

    def begin(self) -> None:
        """Called by the sampler, once."""
        self.began = time.monotonic()
        self._on_begin()

    def piece(self, piece: Piece) -> None:
        if self._on_piece is not None:
            self.has_answer |= bool(piece.get("content", "").strip() or piece.get("tool_calls"))
            self._on_piece(piece)


@dataclasses.dataclass(frozen=True)
class PreparedPrompt:
    """A conversation that any number of rollouts can be sampled from.

    Attributes:
        num_tokens: None where the sampler cannot know.
        payload: the sampler's own.
    """

    num_tokens: int | None
    payload: Any


def check_room(num_tokens: int, answer_tokens: int, max_context: int | None) -> None:
    """
    Raises:
        ContextLengthError: prompt and answer have more tokens than the context.
    """
    excess = 0 if max_context is None else num_tokens + answer_tokens - max_context
    if excess > 0:
        raise ContextLengthError(
            f"the prompt has {num_tokens} tokens; with {answer_tokens} for the answer that is {excess} more than the "
            f"context of {max_context}",
            excess=excess,
        )


class TokenCounter(Protocol):
    """Counts text as the model does."""

    def count(self, text: str) -> int: ...

    def tail(self, text: str, count: int) -> str:
        """The last `count` tokens."""
        ...


class Sampler(Protocol):
    @property
    def max_context(self) -> int | None: ...  # tokens of prompt and answer; None: not known

    @property
    def tokens(self) -> TokenCounter | None: ...  # None: it has no tokenizer

    def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AbstractAsyncContextManager[PreparedPrompt]:
        """Prepares a conversation; rollouts can be sampled until the context is left.

        Args:
            messages: as in OpenAI's API. Images are items `{"type": "image_url", "image_url": {"url": ...}}`, or
                `{"type": "image", "image": ...}` with anything that `processing.image_files.open_image` takes.
            answer_tokens: the room that the prompt must leave for the answer.

        Raises:
            ContextLengthError: the prompt leaves less room; `excess` says how many tokens it is too long by.
            StepjaxError: the conversation cannot be used.
        """
        ...

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """Samples one rollout. Cancelling the task that waits for it cancels the call.

        Args:
            params: with a seed. With `logprobs`, an engine's rollout also has text, token ids and log-probabilities.
            listener: is told when the call is sent, of tokens and, if it wants them, of pieces as they are written.

        Raises:
            SamplerError: the call failed.
        """
        ...
