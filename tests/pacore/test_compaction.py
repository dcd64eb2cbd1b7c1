"""Compaction, the order of references, and citations."""

import json

import pytest
from fake_sampler import WordTokens

from stepjax.pacore.compaction import citations, compact, ordered
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import Reference, Trajectory
from stepjax.rollouts.rollout import Rollout

WORDS = WordTokens()


def trajectory(content="", index=0, status="ok", **fields):
    return Trajectory(round=0, index=index, status=status, rollout=Rollout(content=content, **fields))


@pytest.mark.parametrize(
    "content, text",
    [
        ("42", "42"),
        ("hm</think>\n\n42", "42"),
        ("a</think>b</think>42", "42"),
        ("<think>\nhm\n</think>\n\nIt is 42.\n", "It is 42."),
    ],
)
def test_the_conclusion_is_what_stands_after_the_last_thought(content, text):
    assert compact(trajectory(content), PacoreConfig(), None) == Reference(0, text)


@pytest.mark.parametrize("content", ["", "  \n", "hm</think>", "hm</think>\n "])
def test_nothing_after_the_thought_is_no_message(content):
    assert compact(trajectory(content), PacoreConfig(), None) == "empty"


@pytest.mark.parametrize("status", ["error", "timeout", "cancelled"])
def test_calls_that_failed_leave_no_message(status):
    assert compact(trajectory("42", status=status), PacoreConfig(), None) == status


def test_a_thought_that_was_cut_off_is_never_passed_on_whole():
    thought = " ".join(f"w{i}" for i in range(5000))
    cut = trajectory(reasoning=thought, finish_reason="length")
    assert compact(cut, PacoreConfig(), WORDS) == "truncated"
    message = compact(cut, PacoreConfig(truncated="tail", tail_tokens=3), WORDS)
    assert message == Reference(0, "[...] w4997 w4998 w4999", was_cut=True)


def test_an_answer_that_was_cut_off_is_passed_on():
    assert compact(trajectory("It is 4", finish_reason="length"), PacoreConfig(), None) == Reference(0, "It is 4")


def test_tool_calls_are_written_out():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": 1, "y": "two"})}}
    made = compact(trajectory("So:", tool_calls=(call,), finish_reason="tool_calls"), PacoreConfig(), None)
    assert made.text == (
        "So:\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\ntwo\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    broken = {"function": {"name": "f", "arguments": "{not json"}}
    assert "{not json" in compact(trajectory(tool_calls=(broken,)), PacoreConfig(), None).text


# Where the k-th shortest message stands, by the released code's permutation of each width.
FIXED = {4: [2, 1, 3, 0], 16: [7, 9, 5, 6, 14, 10, 12, 8, 1, 2, 13, 15, 4, 11, 0, 3]}


@pytest.mark.parametrize("width", FIXED)
def test_the_released_order_is_that_of_lengths_in_one_permutation(width):
    trajectories = [trajectory("x" * (width - i), index=i) for i in range(width)]
    messages = [Reference(each.index, each.rollout.content) for each in trajectories]
    for seed in (0, 1):
        order = ordered(messages, trajectories, PacoreConfig(order="length"), seed)
        assert [len(each.text) - 1 for each in order] == FIXED[width]


def test_a_shuffle_depends_on_its_seed_and_on_nothing_else():
    messages = [Reference(i, f"{i}") for i in range(16)]
    config = PacoreConfig()
    first = ordered(messages, (), config, 1)
    assert first == ordered(reversed(messages), (), config, 1) != ordered(messages, (), config, 2)
    places = [ordered(messages, (), config, seed).index(messages[0]) for seed in range(400)]
    assert all(10 <= places.count(place) <= 45 for place in range(16)), "every place is as likely"


@pytest.mark.parametrize(
    "text, cited",
    [
        ("Reference 3 and ref. 1 agree; Reference 3 is right.", {1: 1, 3: 2}),
        ("references 1, 2 and 4", {1: 1, 2: 1, 4: 1}),
        ("\u53c2\u80032\u548c\u53c2\u8003\u7b54\u6848 3", {2: 1, 3: 1}),
        ("Ref #2", {2: 1}),
        ("prefer 3 to 4; reference 9 is not there", {}),
    ],
)
def test_citations(text, cited):
    assert citations(text, 4) == cited
