"""Taking apart while it is written gives what taking apart the whole gives."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from whole_answer import parse_assistant

from stepjax.processing.answer_stream import Call, CallStream, ReasoningStream, split_reasoning

WORDS = [
    "a",
    "word ",
    " ",
    "\n",
    "\n\n",
    "<",
    "</",
    "<th",
    "ink>",
    "<tool",
    "_call>",
    "{",
    "}",
    '"',
    "\\",
    "é",
    "[",
    ",",
]
CALLS = [
    '<tool_call>\n{"name": "f", "arguments": {"x": [1, {"y": "}"}]}}\n</tool_call>',
    '<tool_call>{"name": "g"}</tool_call>',
    '<tool_call>{"name": "h", "arguments": {"t": "<tool_call> \\" </tool_call>"}} </tool_call>',
    '<tool_call>{"name": "g"}',
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"name": "f", "arguments": }</tool_call>',
    '<tool_call>[{"name": "f"}]</tool_call>',
    '<tool_call>{"name": "f"} and </tool_call>',
]
MARKUP = ["<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<tool_calls>\n"]
soup = st.lists(st.sampled_from([*WORDS, *CALLS, *MARKUP]), max_size=12).map("".join)
thoughtful = st.lists(st.sampled_from([*WORDS, *CALLS, *MARKUP, "<think>", "</think>"]), max_size=12).map("".join)
cuts = st.lists(st.integers(0, 400), max_size=12)


def pieces(text, at):
    edges = [0, *sorted(min(cut, len(text)) for cut in at), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def split_stream(text, at, starts_thinking):
    stream = ReasoningStream(starts_thinking=starts_thinking)
    parts = [part for piece in pieces(text, at) for part in stream.feed(piece)] + stream.finish()
    return tuple("".join(p.text for p in parts if p.kind == kind) for kind in ("content", "reasoning"))


def call_stream(text, at):
    stream = CallStream()
    parts = [part for piece in pieces(text, at) for part in stream.feed(piece)] + stream.finish()
    calls = [{"name": part.name, "arguments": part.arguments} for part in parts if isinstance(part, Call)]
    return "".join(part for part in parts if isinstance(part, str)), calls


def ends_reasoning_once(text, starts_thinking):
    if text.count("</think>") > 1:
        return False
    return "</think>" not in text or starts_thinking or "<think>" in text.partition("</think>")[0]


@settings(max_examples=200, deadline=None)
@given(thoughtful, cuts, st.booleans())
@example("Well <think>\nhm\n</think>\n\nyes", [3, 9], False)
@example("Well <think> unclosed", [6], False)
@example(" \n<think>\nhm\n</think>\n\nyes", [1, 4, 15, 17], True)
@example("cut off </thi", [10], True)
def test_reasoning_as_of_the_whole_text(text, at, starts_thinking):
    got = split_stream(text, at, starts_thinking)
    assert got == split_stream(text, [], starts_thinking)
    assert got == split_stream(text, range(len(text)), starts_thinking)
    if ends_reasoning_once(text, starts_thinking):
        content, reasoning = split_reasoning(text, starts_thinking=starts_thinking)
        assert got == (content, reasoning or "")


@settings(max_examples=300, deadline=None)
@given(soup, cuts)
@example('<tool_calls>\n<tool_call>{"name": "g"}</tool_call>\n</tool_calls> so', [5, 20, 50])
@example('<tool_call>{"name": "g"}</tool_call><tool_calls></tool_calls><tool_call>{"name": "g"}', [])
@example('a <tool_calls><tool_calls> <tool_call>{"name": "g"}</tool_call>', [])
def test_calls_as_of_the_whole_text(text, at):
    content, calls = call_stream(text, at)
    assert (content, calls) == call_stream(text, [])
    assert (content, calls) == call_stream(text, range(len(text)))
    if "think>" not in text:  # reasoning is taken off before
        whole = parse_assistant(text)
        assert tuple(calls) == whole.tool_calls
        assert content == whole.content if not calls else content.lstrip() == whole.content


@settings(max_examples=300, deadline=None)
@given(thoughtful, cuts)
def test_both_in_a_row_as_of_the_whole_text(text, at):
    if not ends_reasoning_once(text, True):
        return
    content, reasoning = split_stream(text, at, True)
    content, calls = call_stream(content, at)
    whole = parse_assistant(text, starts_thinking=True)
    assert (content.lstrip() if calls else content, tuple(calls)) == (whole.content, whole.tool_calls)
    assert reasoning == whole.reasoning_content


def test_what_was_sent_is_not_taken_back():
    assert split_stream("one</think>two</think>three", [5], True) == ("two</think>three", "one")
    assert split_stream("one</think>two", [2], False) == ("one</think>two", "")


@pytest.mark.parametrize(
    "opening",
    ["<tool_call>{", '<tool_call>{"', '<tool_call>{"a":', '<tool_call>{"a":"', "<tool_call>[", "<tool_calls>"],
)
def test_hostile_text_takes_linear_time(opening):
    text = opening * 20_000
    stream = CallStream()
    parts = [part for at in range(0, len(text), 50) for part in stream.feed(text[at : at + 50])] + stream.finish()
    assert "".join(part for part in parts if isinstance(part, str)) == text


def test_text_is_sent_as_soon_as_it_is_certain():
    stream = ReasoningStream(starts_thinking=True)
    sent = [
        "".join(p.text for p in stream.feed(word)) for word in re.findall(r"\S+|\s", "\nLet me\nsee </think>\n\nHi !")
    ]
    assert sent == ["", "Let", " ", "me", "", "\nsee", " ", "", "", "", "Hi", " ", "!"]
