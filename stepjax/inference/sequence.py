"""A request inside the engine: the prompt shared by its samples, and the state of each sample.

Legend: T tokens of the prompt.
"""

import functools
import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Tokens

import numpy as np

from stepjax.config import ImageConfig
from stepjax.inference.feature_store import ViewFeatures, view_digests
from stepjax.inference.output import TextStream
from stepjax.inference.pages import Key, page_keys
from stepjax.inference.request import SamplingParams
from stepjax.models.step_vl import NO_FEATURE
from stepjax.processing.tokens import Example


class Prompt:
    """Data shared by a request's samples. `contents_T` identifies the content of each position, for page keys."""

    def __init__(
        self,
        request_id: str,
        example: Example,
        params: SamplingParams,
        seed: int,
        limit: int,
        images: ImageConfig | None,
    ):
        """
        Args:
            seed: of the request.
            limit: maximum tokens of prompt plus answer.
        """
        self.request_id, self.example, self.params, self.seed, self.limit = request_id, example, params, seed, limit
        self.tokens_T = np.asarray(example.tokens, np.int32)
        self.digests = view_digests(example)
        self.num_cached: int | None = None  # cached tokens when the first sample is first admitted
        self.contents_T = self.tokens_T.astype(np.int64)
        index_T = example.feature_index
        if self.digests and images is not None:
            sizes = [images.crop_tokens] * len(example.crops) + [images.global_tokens] * len(example.global_views)
            # Negative, so that features never collide with tokens.
            first = [-1 - (int.from_bytes(digest[:8], "big") >> 2) for digest in self.digests]
            of_row = np.concatenate([start - np.arange(size) for start, size in zip(first, sizes, strict=True)])
            self.contents_T = np.where(index_T >= 0, of_row[np.maximum(index_T, 0)], self.contents_T)

    @functools.cached_property
    def key(self) -> bytes:
        """Identifies the prompt's content."""
        return hashlib.blake2b(self.contents_T.tobytes(), digest_size=16).digest()

    def feature_rows(self, views: list[ViewFeatures], start: int, end: int) -> np.ndarray:
        """Feature store rows of positions `start` to `end`, NO_FEATURE for text."""
        index_T = self.example.feature_index[start:end]
        if not views:
            return np.full(end - start, NO_FEATURE, np.int32)
        rows = np.concatenate([view.rows_Q for view in views])
        return np.where(index_T >= 0, rows[np.maximum(index_T, 0)], NO_FEATURE).astype(np.int32)


class Sequence:
    """One sample. The keys and values of tokens 0 to `computed` - 1 are in `pages`; it decodes once only the last token
    is missing there.
    """

    def __init__(self, prompt: Prompt, sample: int, decode: Callable[[Tokens[int]], str] | None):
        self.prompt, self.sample = prompt, sample
        words = hashlib.blake2b(
            (prompt.seed % 2**64).to_bytes(8, "little") + sample.to_bytes(4, "little"), digest_size=8
        ).digest()
        self.seed_words = np.frombuffer(words, np.uint32)
        self.generated: list[int] = []
        self.computed = 0
        self.pages: list[int] = []
        self.keys: list[Key] = []  # of full pages, computed or not
        self.num_published = 0  # pages findable by key
        self.counts_prompt = False  # whether `prompt.num_cached` is about its current pages
        self.views: list[ViewFeatures] | None = None  # held while the prompt is computed
        self.leader: Sequence | None = None  # the sample that computes the prompt for this one
        self.followers: list[Sequence] = []  # samples for which this one computes the prompt
        self.text = None if decode is None else TextStream(decode, prompt.params.stop)

    @property
    def length(self) -> int:
        return len(self.prompt.tokens_T) + len(self.generated)

    @property
    def decodes(self) -> bool:
        """Whether all tokens but the last are computed."""
        return self.computed == self.length - 1

    @property
    def lacks_features(self) -> bool:
        """Whether a view that it holds is not encoded yet."""
        return self.views is not None and not all(view.encoded for view in self.views)

    @property
    def last_token(self) -> int:
        return self.generated[-1] if self.generated else int(self.prompt.tokens_T[-1])

    def tokens(self, start: int, end: int) -> np.ndarray:
        return _joined(self.prompt.tokens_T, self.generated, start, end)

    def contents(self, start: int, end: int) -> np.ndarray:
        return _joined(self.prompt.contents_T, self.generated, start, end)

    def needs_features(self, start: int) -> bool:
        """Whether there is an image feature at or after `start`."""
        return bool((self.prompt.example.feature_index[start:] >= 0).any())

    def feature_rows(self, start: int, end: int) -> np.ndarray:
        prompt_end = min(end, len(self.prompt.tokens_T))
        of_prompt = self.prompt.feature_rows(self.views or [], min(start, prompt_end), prompt_end)
        return np.concatenate([of_prompt, np.full(end - start - len(of_prompt), NO_FEATURE, np.int32)])

    def extend_keys(self, length: int, page_size: int) -> list[Key]:
        """Keys of the full pages within the first `length` tokens."""
        done = len(self.keys)
        if length // page_size > done:
            contents = self.contents(done * page_size, length)
            self.keys += page_keys(contents, page_size, self.keys[-1] if self.keys else b"")
        return self.keys[: length // page_size]


class SequenceError(Exception):
    """Host work for one sequence failed; see `__cause__`. The engine ends only that sample."""

    def __init__(self, sequence: Sequence):
        super().__init__(f"sample {sequence.sample} of {sequence.prompt.request_id}")
        self.sequence = sequence


class failing_alone:
    """A context for host work of one sequence. Keep device calls outside: they concern all sequences.

    A class, because `contextlib` takes longer than most of that work.

    Raises:
        SequenceError: for any exception.
    """

    __slots__ = ("_sequence",)

    def __init__(self, sequence: Sequence):
        self._sequence = sequence

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise SequenceError(self._sequence) from error


def _joined(prompt_T: np.ndarray, generated: list[int], start: int, end: int) -> np.ndarray:
    size = len(prompt_T)
    if end <= size:
        return prompt_T[start:end]
    tail = np.asarray(generated[max(start - size, 0) : end - size], prompt_T.dtype)
    return np.concatenate([prompt_T[start:size], tail]) if start < size else tail
