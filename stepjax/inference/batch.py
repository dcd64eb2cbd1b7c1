"""Builds the arrays of a decoding step, in one of a few fixed shapes.

Legend: B rows (sequences, then unused ones), P prefix groups, M pages per row.
"""

import dataclasses
import itertools
from collections.abc import Sequence as List

import numpy as np

from pallas_kernels.shared_prefix_attention import PageTables
from stepjax.inference.programs import Rows
from stepjax.inference.request import MAX_TOP_LOGPROBS
from stepjax.inference.sequence import Sequence, failing_alone
from stepjax.models.paged_cache import NO_PAGE


@dataclasses.dataclass(frozen=True)
class PrefixGroup:
    """Sequences, by index, that share their first pages, which are read once for the group."""

    members: tuple[int, ...]
    num_pages: int

    @property
    def saved(self) -> int:
        """Page reads saved."""
        return self.num_pages * (len(self.members) - 1)


def group_by_prefix(pages: List[List[int]], max_groups: int) -> list[PrefixGroup]:
    """At most `max_groups` groups, largest savings first; ungrouped sequences read their own pages.

    Page lists are the leaves of a tree: a system prompt branches into prompts, and a prompt into samples. Working up
    from the leaves, the ungrouped sequences below a branch form a group. A group below the branch is merged into it if
    its members save more there.
    """

    def visit(rows: List[int]) -> tuple[list[int], list[PrefixGroup]]:
        """Ungrouped sequences and groups of `rows`, which are sorted by their pages."""
        common = _num_shared(pages[rows[0]], pages[rows[-1]])  # sorted: shared by all
        loose, groups = [], []
        for next_page, branch in itertools.groupby(rows, key=lambda row: pages[row][common : common + 1]):
            below = visit(branch) if len(branch := list(branch)) > 1 and next_page else (branch, [])
            loose, groups = loose + below[0], groups + below[1]
        joining = [group for group in groups if group.saved <= common * len(group.members)]
        members = sorted(itertools.chain(loose, *(group.members for group in joining)))
        whole = PrefixGroup(tuple(members), common)
        if whole.saved <= sum(group.saved for group in joining):
            return loose, groups
        return [], [whole, *(group for group in groups if group not in joining)]

    _, groups = visit(sorted(range(len(pages)), key=lambda i: tuple(pages[i]))) if pages else ([], [])
    return sorted(groups, key=lambda group: (-group.saved, group.members))[:max_groups]


def _num_shared(a: List[int], b: List[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclasses.dataclass(frozen=True)
class Batch:
    tables: PageTables
    rows: Rows
    num_top: int  # top_logprobs to report

    @classmethod
    def empty(cls, rows: int, groups: int, row_pages: int, num_top: int) -> "Batch":
        """A batch without sequences."""
        tables = PageTables(
            prefix_pages_PM=np.full((groups, row_pages), NO_PAGE, np.int32),
            prefix_lengths_P=np.zeros(groups, np.int32),
            group_of_B=np.full(rows, -1, np.int32),
            suffix_pages_BM=np.full((rows, row_pages), NO_PAGE, np.int32),
            suffix_lengths_B=np.zeros(rows, np.int32),
        )
        off = Rows(
            tokens_B=np.zeros(rows, np.int32),
            positions_B=np.zeros(rows, np.int32),
            seeds_B2=np.zeros((rows, 2), np.uint32),
            temperature_B=np.zeros(rows, np.float32),
            top_k_B=np.zeros(rows, np.int32),
            top_p_B=np.ones(rows, np.float32),
            min_p_B=np.zeros(rows, np.float32),
        )
        return cls(tables, off, num_top)


def make_batch(
    sequences: List[Sequence],
    groups: List[PrefixGroup],
    *,
    num_rows: int,
    row_pages: int,
    page_size: int,
    max_prefix_groups: int,
) -> Batch:
    """The batch that decodes `sequences`, one per row, in order. Pages shared by a group are read once.

    It has one of two shapes: one prefix group, or `max_prefix_groups`. On CPU and GPU, the cost of attention over
    groups grows with the groups allocated, and usually there is at most one.

    Raises:
        SequenceError: a sequence does not fit its row.
    """
    top = max((s.prompt.params.logprobs or 0 for s in sequences), default=0)
    num_groups = max_prefix_groups if len(groups) > 1 else 1
    batch = Batch.empty(num_rows, num_groups, row_pages, MAX_TOP_LOGPROBS if top else 0)
    tables, shared_B = batch.tables, [0] * len(sequences)
    for index, group in enumerate(groups):
        pages = sequences[group.members[0]].pages[: group.num_pages]
        tables.prefix_pages_PM[index, : len(pages)] = pages
        tables.prefix_lengths_P[index] = len(pages) * page_size
        for member in group.members:
            tables.group_of_B[member], shared_B[member] = index, len(pages)
    try:
        _fill(batch, sequences, shared_B, page_size)
    except Exception:
        for sequence, shared in zip(sequences, shared_B, strict=True):
            with failing_alone(sequence):
                _fill(batch, [sequence], [shared], page_size)
        raise
    return batch


def _fill(batch: Batch, sequences: List[Sequence], shared_B: List[int], page_size: int) -> None:
    """Writes the rows of all sequences, whose first `shared_B` pages are in their groups' prefix. A column at a time:
    NumPy takes as long for one number as for a hundred.
    """
    tables, rows, count = batch.tables, batch.rows, len(sequences)
    length_B = np.array([sequence.length for sequence in sequences], np.int32)
    tables.suffix_lengths_B[:count] = length_B - np.array(shared_B, np.int32) * page_size
    own = [sequence.pages[shared:] for sequence, shared in zip(sequences, shared_B, strict=True)]
    size_B = np.array([len(pages) for pages in own], np.int32)
    row_X, first_B = np.repeat(np.arange(count), size_B), np.cumsum(size_B) - size_B
    column_X = np.arange(len(row_X)) - np.repeat(first_B, size_B)
    tables.suffix_pages_BM[row_X, column_X] = np.array(list(itertools.chain.from_iterable(own)), np.int32)
    params = [sequence.prompt.params for sequence in sequences]
    # np.array checks the range; assigning a list would not.
    rows.tokens_B[:count] = np.array([sequence.last_token for sequence in sequences], np.int32)
    rows.positions_B[:count] = length_B - 1
    rows.seeds_B2[:count] = [sequence.seed_words for sequence in sequences]
    rows.temperature_B[:count] = [each.temperature for each in params]
    rows.top_k_B[:count] = np.array([each.top_k for each in params], np.int32)
    rows.top_p_B[:count] = [each.top_p for each in params]
    rows.min_p_B[:count] = [each.min_p for each in params]
