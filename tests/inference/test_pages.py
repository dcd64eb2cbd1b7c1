"""Pages of the cache: held, found, and given out again in order of use."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepjax.inference.pages import OutOfPages, Pages, page_keys


def test_pages_are_free_again_when_nobody_holds_them():
    pages = Pages(3)
    taken = pages.take(2)
    pages.hold(taken[:1])
    pages.release(taken)
    assert pages.num_free == 2
    with pytest.raises(OutOfPages):
        pages.take(3)
    assert pages.num_free == 2, "a refused request takes nothing"
    pages.release(taken[:1])
    assert sorted(pages.take(3)) == [0, 1, 2]


def test_the_page_left_longest_is_given_out_first_and_then_no_longer_found():
    pages = Pages(3)
    taken = pages.take(3)
    for page, key in zip(taken, (b"a", b"b", b"c"), strict=True):
        pages.publish(page, key)
    pages.release(taken)  # the last of a run goes first: it is of no use without those before it
    assert pages.find([b"a", b"b", b"c", b"d"]) == taken
    assert pages.take(1) == taken[2:]
    assert pages.find([b"a", b"b", b"c"]) == taken[:2]
    pages.hold(taken[:1])
    assert (pages.num_free, pages.num_cached) == (1, 1)


def test_pages_without_a_key_go_before_those_that_can_be_found():
    pages = Pages(2)
    keyed, blank = pages.take(2)
    pages.publish(keyed, b"a")
    pages.release([keyed])
    pages.release([blank])
    assert pages.take(1) == [blank]


def test_what_is_forgotten_is_not_found():
    pages = Pages(2)
    taken = pages.take(2)
    for page, key in zip(taken, (b"a", b"b"), strict=True):
        pages.publish(page, key)
    pages.release(taken[:1])
    pages.forget_all()
    assert pages.find([b"a"]) == [] and pages.num_free == 1
    pages.release(taken[1:])
    assert pages.num_free == 2 and pages.num_cached == 0


def test_a_key_is_of_all_that_stands_before():
    contents = np.arange(70)
    keys = page_keys(contents, 16)
    assert len(keys) == 4 == len(set(keys))
    assert page_keys(contents[32:], 16, keys[1]) == keys[2:]
    contents[0] = 5
    assert not set(page_keys(contents, 16)) & set(keys)


@given(st.lists(st.sampled_from(["take", "release", "share", "publish"]), max_size=60), st.randoms())
def test_no_page_is_lost_or_held_by_mistake(actions, random):
    pages, sequences, serial = Pages(5), [], 0
    for action in actions:
        if action == "take":
            try:
                sequences.append(pages.take(random.randint(0, 3)))
            except OutOfPages:
                pass
        elif sequences and action == "release":
            pages.release(sequences.pop(random.randrange(len(sequences))))
        elif sequences and action == "share":
            pages.hold(shared := random.choice(sequences)[:1])
            sequences.append(shared)
        elif sequences and action == "publish":
            for page in random.choice(sequences):
                pages.publish(page, serial.to_bytes(2, "big"))
                serial += 1
        held = {page for sequence in sequences for page in sequence}
        assert pages.num_free == 5 - len(held)
    for sequence in sequences:
        pages.release(sequence)
    assert sorted(pages.take(5)) == [0, 1, 2, 3, 4]
