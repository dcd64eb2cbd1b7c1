"""Groups of sequences that read pages together."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from stepjax.inference.batch import PrefixGroup, group_by_prefix


def test_samples_of_two_prompts_under_one_system_prompt():
    pages = [[1, 2, 3, 10], [1, 2, 3, 11], [1, 4, 12], [1, 4, 13], [9], []]
    assert group_by_prefix(pages, 8) == [PrefixGroup((0, 1), 3), PrefixGroup((2, 3), 2)]
    # A long common beginning outweighs what the branches would save.
    pages = [[1, 2, 3, 4, 5, i // 2, 10 + i] for i in range(6)]
    assert group_by_prefix(pages, 8) == [PrefixGroup((0, 1, 2, 3, 4, 5), 5)]


def test_only_the_best_groups_are_kept_where_there_is_room_for_few():
    pages = [[1], [1], [2, 3], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert group_by_prefix(pages, 2) == [PrefixGroup((2, 3, 4), 2), PrefixGroup((5, 6), 2)]


def test_one_that_ends_where_others_branch():
    assert group_by_prefix([[1, 2], [1, 2, 3], [1, 2, 3]], 8) == [PrefixGroup((0, 1, 2), 2)]


@given(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=6))
def test_groups_share_what_they_say_and_save_nearly_the_most(tails):
    pages = [[(i, *tail[: i + 1]) for i in range(len(tail))] for tail in tails]  # a page says its whole beginning
    pages = [[hash(page) for page in row] for row in pages]
    groups = group_by_prefix(pages, 10)
    members = [member for group in groups for member in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len({tuple(pages[member][: group.num_pages]) for member in group.members}) == 1
        assert all(len(pages[member]) >= group.num_pages for member in group.members)
    assert sum(group.saved for group in groups) >= 0.9 * most_saved(pages, list(range(len(pages))))


def most_saved(pages, members):
    """By trying every way to put the first member into a group."""
    if not members:
        return 0
    first, rest = members[0], members[1:]
    best = most_saved(pages, rest)
    for size in range(1, len(rest) + 1):
        for company in itertools.combinations(rest, size):
            common = 0
            rows = [pages[i] for i in (first, *company)]
            while all(len(row) > common for row in rows) and len({row[common] for row in rows}) == 1:
                common += 1
            others = [i for i in rest if i not in company]
            best = max(best, common * size + most_saved(pages, others))
    return best
