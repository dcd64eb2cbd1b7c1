"""The arrays of a decoding step, of one of a few fixed shapes, from the sequences that take part.

Legend: B rows (sequences, then unused ones), P problems (groups that share pages), M pages of a row.
"""

import dataclasses
from collections.abc import Sequence as List

import numpy as np

from pallas_kernels.shared_prefix_attention import PageTables
from stepjax.inference.grouping import Group
from stepjax.inference.programs import Rows
from stepjax.inference.request import MAX_TOP_LOGPROBS
from stepjax.inference.sequence import Sequence, failing_alone
from stepjax.models.paged_cache import NO_PAGE


@dataclasses.dataclass(frozen=True)
class Batch:
    tables: PageTables
    rows: Rows
    num_top: int  # likeliest tokens to report

    @classmethod
    def empty(cls, rows: int, problems: int, row_pages: int, num_top: int) -> "Batch":
        """No sequence at all."""
        tables = PageTables(
            prefix_pages_PM=np.full((problems, row_pages), NO_PAGE, np.int32),
            prefix_lengths_P=np.zeros(problems, np.int32),
            problem_of_B=np.full(rows, -1, np.int32),
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
    groups: List[Group],
    *,
    num_rows: int,
    row_pages: int,
    page_size: int,
    max_problems: int,
) -> Batch:
    """The batch that decodes `sequences`, in rows of their order, with the pages that the groups share read once.

    Two shapes of it exist: with room for one group and for `max_problems`. What attention over groups costs on CPU and
    GPU grows with the number of groups that there is room for, and mostly there is one or none.

    Raises:
        SequenceError: a sequence does not fit its row.
    """
    top = max((s.prompt.params.logprobs or 0 for s in sequences), default=0)
    num_problems = max_problems if len(groups) > 1 else 1
    batch = Batch.empty(num_rows, num_problems, row_pages, MAX_TOP_LOGPROBS if top else 0)
    tables, rows = batch.tables, batch.rows
    shared_B = np.zeros(num_rows, np.int32)
    for problem, group in enumerate(groups):
        pages = sequences[group.members[0]].pages[: group.num_pages]
        tables.prefix_pages_PM[problem, : len(pages)] = pages
        tables.prefix_lengths_P[problem] = len(pages) * page_size
        for member in group.members:
            tables.problem_of_B[member], shared_B[member] = problem, len(pages)
    for row, sequence in enumerate(sequences):
        with failing_alone(sequence):
            own, params = sequence.pages[shared_B[row] :], sequence.prompt.params
            tables.suffix_pages_BM[row, : len(own)] = own
            tables.suffix_lengths_B[row] = sequence.length - shared_B[row] * page_size
            rows.tokens_B[row], rows.positions_B[row] = sequence.last_token, sequence.length - 1
            rows.seeds_B2[row] = sequence.seed_words
            rows.temperature_B[row], rows.top_k_B[row] = params.temperature, params.top_k
            rows.top_p_B[row], rows.min_p_B[row] = params.top_p, params.min_p
    return batch


def sizes(least: int, most: int, factor: int) -> list[int]:
    """The sizes that are compiled: least, factor x least, factor^2 x least, ... and most."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return [*found, most]


def bucket(size: int, among: list[int]) -> int:
    """The smallest of the sizes that is large enough, or the largest."""
    return next((other for other in among if other >= size), among[-1])
