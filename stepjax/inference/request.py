"""Requests and results of the engine, as plain data, and the engine's protocol for servers and samplers."""

import dataclasses
import numbers
import reprlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Literal, Protocol

from stepjax.errors import RequestError

if TYPE_CHECKING:
    from stepjax.processing.tokens import Example

# "error": the logits were not finite, or the sample could not be built; see stop_reason.
FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_TOP_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARS = 16, 256  # every new token is checked against all of them
_MAX_STOP_IDS = 256
_INT32 = 2**31 - 1  # device integers


class EngineError(RuntimeError):
    """A sample failed, e.g. because its logits were not finite. Not the caller's fault."""


class EngineFailedError(EngineError):
    """The engine itself failed and is unusable: the process should exit with `exit_status` and be restarted."""

    exit_status = 70  # EX_SOFTWARE


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw a request's samples, and when they end. The defaults are the public checkpoint's.

    Temperature, top-k, top-p and min-p apply in this order, each to the tokens left by the previous one.

    Raises:
        RequestError: a value is out of range.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # 64 bits; None draws one. Samples of one request differ anyway.
    n: int = 1  # samples; they share the prompt's pages
    max_tokens: int | None = None  # None: until the context is full
    stop: tuple[str, ...] = ()  # strings that end a sample; not part of its text
    stop_ids: tuple[int, ...] = ()  # tokens that end a sample, besides the tokenizer's
    ignore_eos: bool = False  # treat the tokenizer's stop tokens like any other token
    logprobs: int | None = None  # report log-probabilities and this many top_logprobs; None: neither

    def __post_init__(self):
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise RequestError(f"{name}={reprlib.repr(getattr(self, name))}: must {remedy}")

        def require_number(kind: type, name: str, least: float, most: float, remedy: str) -> None:
            value = getattr(self, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            require(is_number and least <= value <= most, name, remedy)  # false for NaN, too
            if kind is numbers.Integral:
                object.__setattr__(self, name, int(value))  # NumPy integers have fewer bits

        require_number(numbers.Real, "temperature", 0, 100, "be 0 or more, and at most 100")
        require_number(numbers.Integral, "top_k", 0, _INT32, f"be 0 (off) or more, and at most {_INT32}")
        require_number(numbers.Real, "top_p", 0, 1, "be above 0 and at most 1 (off)")
        require(self.top_p > 0, "top_p", "be above 0 and at most 1 (off)")
        require_number(numbers.Real, "min_p", 0, 1, "be from 0 (off) to 1")
        require_number(numbers.Integral, "n", 1, 2**16, f"be at least 1 and at most {2**16}")
        if self.max_tokens is not None:
            require_number(numbers.Integral, "max_tokens", 1, _INT32, f"be at least 1 and at most {_INT32}")
        if self.seed is not None:
            require_number(numbers.Integral, "seed", -(2**63), 2**64 - 1, "fit 64 bits")
        if self.logprobs is not None:
            require_number(numbers.Integral, "logprobs", 0, MAX_TOP_LOGPROBS, f"be from 0 to {MAX_TOP_LOGPROBS}")
        strings = not isinstance(self.stop, str) and all(isinstance(stop, str) for stop in self.stop)
        require(strings and all(self.stop), "stop", "be a tuple of strings that are not empty")
        require(
            len(self.stop) <= MAX_STOPS and all(len(stop) <= MAX_STOP_CHARS for stop in self.stop),
            "stop",
            f"hold at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters",
        )
        require(
            len(self.stop_ids) <= _MAX_STOP_IDS and all(0 <= index <= _INT32 for index in self.stop_ids),
            "stop_ids",
            f"hold at most {_MAX_STOP_IDS} ids of tokens, which are from 0 to {_INT32}",
        )


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A sampled token and its log-probability under the model, before temperature and filters."""

    token: int
    logprob: float
    sampling_logprob: float  # under the sampling distribution; 0 for temperature 0
    top: tuple[tuple[int, float], ...] = ()  # likeliest tokens and their log-probabilities, descending


@dataclasses.dataclass(frozen=True)
class Delta:
    """New output of one sample.

    Text lags behind the tokens while it may be the start of a stop string or half a character. The last delta, the one
    with a `finish_reason`, flushes the rest.
    """

    request_id: str
    sample: int  # from 0 to n - 1
    tokens: tuple[int, ...] = ()  # without the stop token
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, if requested
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the request's stop string or id that ended the sample
    seed: int = 0  # of the request; reusing it reproduces the samples
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens already cached when the request's first sample was admitted
    stop_token: TokenLogprob | None = None  # the token that ended the sample, if log-probabilities were requested


@dataclasses.dataclass(frozen=True)
class Completion(Delta):
    """A whole sample: all its deltas joined."""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Current state of an engine, and totals since it was created."""

    running: int  # samples that hold pages
    waiting: int
    pages: int
    pages_used: int  # by running samples
    pages_cached: int  # free, but kept for prompts with the same prefix
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished_samples: int = 0
    cancelled_samples: int = 0
    preemptions: int = 0
    images_encoded: int = 0  # views
    images_cached: int = 0  # views found in the cache
    steps: int = 0
    compilations: int = 0


class EngineClient(Protocol):
    """An engine behind asyncio: `async_engine.AsyncEngine`, or `replicas.AsyncReplicas` for several."""

    @property
    def max_context(self) -> int: ...  # tokens of prompt and answer

    @property
    def healthy(self) -> bool: ...  # whether it takes requests

    def stream(
        self, prompt: "Example", params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Streams the deltas of all samples of a request.

        Closing the stream, or cancelling the task that reads it, cancels the request.

        Raises:
            RequestError: the request can never be served.
            BusyError: the queue is full, or the engine is shutting down.
            EngineError: a sample failed, or the engine was stopped.
            EngineFailedError: the engine failed.
        """
        ...

    def stats(self) -> EngineStats: ...
