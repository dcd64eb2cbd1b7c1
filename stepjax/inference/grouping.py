"""Which sequences read which pages together in a decoding step.

Sequences whose page lists begin alike can have those pages read once for all of them: a group. With m sequences and d
pages in common a group saves d (m - 1) page reads, and a sequence can be in one group only. Where lists branch again
and again (a system prompt, under it problems, under them samples) the choice between one wide group and several deep
ones is made by what they save.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences, by index, and how many of their first pages they share."""

    members: tuple[int, ...]
    num_pages: int

    @property
    def saved(self) -> int:
        return self.num_pages * (len(self.members) - 1)


def group_by_prefix(pages: Sequence[Sequence[int]], max_groups: int) -> list[Group]:
    """The groups that save most, at most `max_groups` of them; sequences in none read their pages alone."""
    order = sorted(range(len(pages)), key=lambda i: tuple(pages[i]))
    groups = _best(pages, order, 0)
    return sorted(groups, key=lambda group: -group.saved)[:max_groups]


def _best(pages: Sequence[Sequence[int]], members: list[int], depth: int) -> list[Group]:
    """Of sequences, sorted, that agree in their first `depth` pages."""
    if len(members) < 2:
        return []
    # Sorted: what the first and the last have in common, all have.
    first, last = pages[members[0]], pages[members[-1]]
    common = depth
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    together = [Group(tuple(members), common)] if common else []
    apart: list[Group] = []
    branch: list[int] = []
    for member in [*members, None]:
        page = None if member is None or len(pages[member]) <= common else pages[member][common]
        same = (
            bool(branch) and member is not None and page is not None and pages[branch[0]][common : common + 1] == [page]
        )
        if not same:
            apart += _best(pages, branch, common + 1) if len(branch) > 1 else []
            branch = []
        if member is not None and page is not None:
            branch.append(member)
    return max(together, apart, key=lambda groups: sum(group.saved for group in groups))
