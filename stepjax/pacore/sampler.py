"""What PaCoRe needs of a model: one small asynchronous protocol. `local_sampler` and `http_sampler` implement it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from stepjax.errors import RequestError
from stepjax.inference.request import SamplingParams

# A part of a message while it is written: `content`, `reasoning_content` or `tool_calls`, as in OpenAI's deltas.
Piece = dict[str, Any]


def is_answer(piece: Piece) -> bool:
    """Whether it is a part of the answer: neither of the thought, nor white space alone."""
    return bool(piece.get("content", "").strip() or piece.get("tool_calls"))


class SamplerError(RuntimeError):
    """A call failed.

    Attributes:
        is_temporary: the same call may succeed later.
        retry_after: seconds that the other side asks to wait.
        output_tokens: drawn before it failed, as far as they are known.
    """

    def __init__(self, message: str, *, is_temporary: bool, retry_after: float | None = None, output_tokens: int = 0):
        super().__init__(message)
        self.is_temporary, self.retry_after, self.output_tokens = is_temporary, retry_after, output_tokens


class PromptTooLongError(RequestError):
    """A prompt does not leave room for an answer.

    Attributes:
        excess: how many tokens it is too long by.
    """

    def __init__(self, message: str, *, excess: int):
        super().__init__(message)
        self.excess = excess


class Listener:
    """Follows a sample while it is drawn.

    Attributes:
        at: round and index of the trajectory.
        tokens: drawn so far, as far as the sampler knows.
        has_content: a part of the answer, not only of the thought, was passed on.
        began: by `time.monotonic`, when the call was sent; until then it waits for its turn, and no time limit runs.
    """

    def __init__(
        self,
        on_piece: Callable[[Piece], None] | None = None,
        *,
        at: tuple[int, int] = (0, 0),
        on_begin: Callable[[], None] = lambda: None,
    ):
        self.at = at
        self.tokens = 0
        self.has_content = False
        self.began: float | None = None
        self._on_piece, self._on_begin = on_piece, on_begin

    def begin(self) -> None:
        """The sampler says so, once."""
        self.began = time.monotonic()
        self._on_begin()

    @property
    def wants_pieces(self) -> bool:
        return self._on_piece is not None

    def piece(self, piece: Piece) -> None:
        if self._on_piece is not None:
            self.has_content |= is_answer(piece)
            self._on_piece(piece)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation, ready for any number of samples.

    Attributes:
        num_tokens: None where the sampler cannot know.
        payload: the sampler's own.
    """

    num_tokens: int | None
    payload: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A sample that ended by itself or at its limit of tokens.

    Attributes:
        content: without the thought. Empty where the thought was cut off.
        tool_calls: in OpenAI's form.
        finish_reason: "stop", "length" or "tool_calls".
        mean_logprob: of its tokens under the model, where the parameters ask for log-probabilities.
    """

    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    mean_logprob: float | None = None


class Tokens(Protocol):
    """Counts text as the model does."""

    def count(self, text: str) -> int: ...

    def tail(self, text: str, count: int) -> str:
        """The last `count` tokens."""
        ...


class Sampler(Protocol):
    @property
    def max_context(self) -> int | None: ...  # tokens of prompt and answer; None: not known

    @property
    def tokens(self) -> Tokens | None: ...  # None: it has no tokenizer

    def prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, answer_tokens: int
    ) -> AbstractAsyncContextManager[Prompt]:
        """Prepares a conversation; samples may be drawn of it until the context is left.

        Args:
            messages: as of OpenAI's API. Images are items `{"type": "image_url", "image_url": {"url": ...}}`, or
                `{"type": "image", "image": ...}` with whatever `processing.image_files.open_image` takes.
            answer_tokens: that there must be room for.

        Raises:
            PromptTooLongError: it would leave less room.
            StepjaxError: it is not usable.
        """
        ...

    async def sample(self, prompt: Prompt, params: SamplingParams, listener: Listener) -> Reply:
        """Draws one sample. To cancel the task that waits for it cancels the sample.

        Args:
            params: with a seed.
            listener: is told when the call is sent, of tokens and, if it wants them, of the parts that are written.

        Raises:
            SamplerError: it failed.
        """
        ...
