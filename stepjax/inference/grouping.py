"""Which sequences read which pages together in a decoding step.

Sequences whose page lists begin alike can have those pages read once for all of them: a group. With m sequences and d
pages in common a group saves d (m - 1) page reads, and a sequence can be in one group only. Where lists branch again
and again (a system prompt, under it problems, under them samples) it is not obvious which groups save most: the lists
are the leaves of a tree, and the best groups of each subtree are found for every depth that the group around it has.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences, by index, and how many of their first pages they share."""

    members: tuple[int, ...]
    num_pages: int

    @property
    def saved(self) -> int:
        return self.num_pages * (len(self.members) - 1)


class _Choice(NamedTuple):
    saved: int  # pages that the subtree's sequences do not read, less those that its groups read
    outside: tuple[int, ...]  # sequences that are left to the group around
    groups: tuple[Group, ...]


def group_by_prefix(pages: Sequence[Sequence[int]], max_groups: int) -> list[Group]:
    """The groups that save most, at most `max_groups` of them; sequences in none read their pages alone."""
    order = sorted(range(len(pages)), key=lambda i: tuple(pages[i]))
    rows = [pages[i] for i in order]

    @functools.cache
    def best(first: int, last: int, depth: int, around: int) -> _Choice:
        """Of rows first to last - 1, which agree in `depth` pages; the group around them shares `around`."""
        # Sorted: what the first and the last have in common, all have.
        common, head, tail = depth, rows[first], rows[last - 1]
        while common < min(len(head), len(tail)) and head[common] == tail[common]:
            common += 1

        def below(around: int) -> _Choice:
            saved, outside, groups = 0, (), ()
            for start, end in _branches(rows, first, last, common):
                if end - start == 1 or len(rows[start]) == common:
                    choice = _Choice(around * (end - start), tuple(range(start, end)), ())
                else:
                    choice = best(start, end, common + 1, around)
                saved, outside, groups = saved + choice.saved, outside + choice.outside, groups + choice.groups
            return _Choice(saved, outside, groups)

        apart, together = below(around), below(common)
        if together.saved - common <= apart.saved:
            return apart
        return _Choice(together.saved - common, (), (*together.groups, Group(together.outside, common)))

    found = best(0, len(rows), 0, 0).groups if len(rows) > 1 else ()
    groups = [Group(tuple(sorted(order[i] for i in group.members)), group.num_pages) for group in found]
    return sorted(groups, key=lambda group: (-group.saved, group.members))[:max_groups]


def _branches(rows: Sequence[Sequence[int]], first: int, last: int, depth: int) -> Iterator[tuple[int, int]]:
    """Runs of rows that agree in the page at `depth`, too; rows that end there are a run."""
    start = first
    for i in range(first + 1, last + 1):
        if i == last or rows[i][depth : depth + 1] != rows[start][depth : depth + 1]:
            yield start, i
            start = i
