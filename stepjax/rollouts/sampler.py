"""The protocol for drawing rollouts from a model; PaCoRe, evaluation, training and the server use it.

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

# A new part of a streamed message: `content`, `reasoning_content` or `tool_calls`, as in OpenAI's deltas.
Piece = dict[str, Any]


class SamplerError(RuntimeError):
    """A call failed.

    Attributes:
        is_temporary: the same call may succeed later.
        retry_after: seconds the server asks to wait.
        num_tokens: sampled before the failure, if known.
    """

    def __init__(self, message: str, *, is_temporary: bool, retry_after: float | None = None, num_tokens: int = 0):
        super().__init__(message)
        self.is_temporary, self.retry_after, self.num_tokens = is_temporary, retry_after, num_tokens


class Listener:
    """Follows a rollout while it is sampled.

    Attributes:
        num_tokens: sampled so far, if the sampler knows.
        has_answer: part of the answer was passed on, not only reasoning and white space.
        began: when the call was sent, by `time.monotonic`; before that it is queued and no time limit runs.
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
    """A conversation to sample any number of rollouts from.

    Attributes:
        num_tokens: None if the sampler cannot know.
        payload: private to the sampler.
    """

    num_tokens: int | None
    payload: Any


def check_room(num_tokens: int, answer_tokens: int, max_context: int | None) -> None:
    """
    Raises:
        ContextLengthError: prompt and answer together exceed the context.
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
    def max_context(self) -> int | None: ...  # tokens of prompt and answer; None: unknown

    @property
    def tokens(self) -> TokenCounter | None: ...  # None: no tokenizer

    def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AbstractAsyncContextManager[PreparedPrompt]:
        """Prepares a conversation; rollouts can be sampled until the context exits.

        Args:
            messages: as in OpenAI's API. Images are items `{"type": "image_url", "image_url": {"url": ...}}`, or
                `{"type": "image", "image": ...}` with anything that `processing.image_files.open_image` takes.
            answer_tokens: room the prompt must leave for the answer.

        Raises:
            ContextLengthError: the prompt leaves less room; `excess` is the number of tokens it is too long by.
            StepjaxError: the conversation cannot be used.
        """
        ...

    async def sample(self, prompt: PreparedPrompt, params: SamplingParams, listener: Listener) -> Rollout:
        """Samples one rollout. Cancelling the awaiting task cancels the call.

        Args:
            params: with a seed. With `logprobs`, an engine's rollout also has text, token ids and log-probabilities.
            listener: notified when the call is sent, of token counts and, if it wants them, of streamed pieces.

        Raises:
            SamplerError: the call failed.
        """
        ...
