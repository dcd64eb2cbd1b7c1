"""Builds the arrays of a prefill call, in one of a few fixed shapes.

A call computes B rows of C tokens. Either one row is a chunk of a single prompt, up to `prefill_tokens` long, or
several rows of `row_tokens` hold chunks of several prompts:

    row 0   prompt 0, tokens 0 to 31        pages 7 8 9
    row 1   prompt 0, tokens 32 to 40       pages 7 8 9
    row 2   prompt 1, tokens 64 to 95       pages 7 8 2 4    its first 64 tokens are cached
    row 3   unused

All rows are written to the pool before any is read, so a prompt may have several rows. Padding is less than
`row_tokens` a prompt, and at most half of the rows.

Legend: B rows, C tokens of a row, M pages of a row.
"""

from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np

from stepjax.inference.buckets import bucket, sizes
from stepjax.inference.config import EngineConfig
from stepjax.inference.sequence import Sequence, failing_alone
from stepjax.models.paged_cache import NO_PAGE, Chunks
from stepjax.models.step_vl import NO_FEATURE

MIN_CHUNK, MAX_ROWS = 32, 16
# Every row reads its own pages, and as many as the longest one; prompts with long contexts are computed alone.
MAX_READS = 16_384  # rows times tokens that the longest of them reads


class Part(NamedTuple):
    """Tokens `start` to `end` of a sequence, to be computed in one call."""

    sequence: Sequence
    start: int
    end: int


class PrefillArrays(NamedTuple):
    tokens_BC: np.ndarray
    feature_rows_BC: np.ndarray  # rows of the feature store, or NO_FEATURE
    chunks: Chunks

    @classmethod
    def empty(cls, rows: int, tokens: int, pages: int) -> "PrefillArrays":
        chunks = Chunks(np.full((rows, pages), NO_PAGE, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32))
        return cls(np.zeros((rows, tokens), np.int32), np.full((rows, tokens), NO_FEATURE, np.int32), chunks)

    @property
    def size(self) -> int:
        """Tokens computed, including padding."""
        return self.tokens_BC.size


class PrefillShapes:
    """
    Args:
        row_pages: pages of the longest sequence.
        reads_whole_rows: whether the cost depends on the width of the page table and not on the pages in use.
    """

    def __init__(self, config: EngineConfig, row_pages: int, *, reads_whole_rows: bool):
        most, self.page_size = config.prefill_tokens, config.page_size
        self.chunk_sizes = sizes(min(MIN_CHUNK, most), most, 2)
        self.row_tokens = max(MIN_CHUNK, -(-most // MAX_ROWS))
        self.max_rows = most // self.row_tokens if most >= 2 * self.row_tokens else 0
        self.row_counts = sizes(min(4, self.max_rows), self.max_rows, 2) if self.max_rows else []
        self.reads_whole_rows = reads_whole_rows
        self.widths = sizes(min(16, row_pages), row_pages, 4) if reads_whole_rows else [row_pages]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """All shapes, as rows, tokens of a row and pages of a row."""
        for width in self.widths:
            yield from ((1, tokens, width) for tokens in self.chunk_sizes)
            for rows in self.row_counts:
                if not self.reads_whole_rows or rows * width * self.page_size <= MAX_READS:
                    yield rows, self.row_tokens, width

    def rows_of(self, tokens: int) -> int:
        return -(-tokens // self.row_tokens)

    def most_rows(self, budget: int) -> int:
        """Rows of a call of several prompts for this many tokens: all that are computed anyway."""
        return bucket(self.rows_of(budget), self.row_counts) if self.row_counts else 0

    def fits(self, rows: int, longest: int) -> bool:
        """Whether one call takes this many rows of several prompts, if they read up to `longest` tokens."""
        if rows > self.max_rows:
            return False
        if self.reads_whole_rows:
            longest = self._width(longest) * self.page_size
        return bucket(rows, self.row_counts) * longest <= MAX_READS

    def _width(self, tokens: int) -> int:
        return bucket(-(-tokens // self.page_size), self.widths)

    def arrays(self, parts: List[Part]) -> PrefillArrays:
        """
        Raises:
            SequenceError: the rows of a sequence could not be built.
        """
        alone = len(parts) == 1
        size = bucket(parts[0].end - parts[0].start, self.chunk_sizes) if alone else self.row_tokens
        count = 1 if alone else bucket(sum(self.rows_of(end - start) for _, start, end in parts), self.row_counts)
        tokens_BC, features_BC, chunks = made = PrefillArrays.empty(count, size, self._width(max(p.end for p in parts)))
        row = 0
        for sequence, start, end in parts:
            with failing_alone(sequence):
                tokens_T, features_T = sequence.tokens(start, end), sequence.feature_rows(start, end)
                pages = sequence.pages[: -(-end // self.page_size)]
                for first in range(0, end - start, size):
                    length = min(size, end - start - first)
                    tokens_BC[row, :length] = tokens_T[first : first + length]
                    features_BC[row, :length] = features_T[first : first + length]
                    chunks.pages_BM[row, : len(pages)] = pages
                    chunks.start_B[row], chunks.length_B[row] = start + first, length
                    row += 1
        return made
