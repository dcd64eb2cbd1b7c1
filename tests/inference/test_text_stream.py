"""Text as it comes: nothing is shown that may change, nothing is kept that need not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepjax.inference.output import TextStream
from stepjax.processing.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def read(stream, tokens):
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped_by is not None:
            return pieces
    return [*pieces, stream.finish()]


@given(text=st.text(max_size=40))
def test_pieces_add_up_to_the_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert "".join(read(TextStream(tokenizer.decode), tokens)) == tokenizer.decode(tokens)


def test_characters_come_whole(tokenizer):
    tokens = tokenizer.encode("né 数字 🙂!")
    pieces = read(TextStream(tokenizer.decode), tokens)
    assert "".join(pieces) == "né 数字 🙂!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_do_not_hold_up_what_follows(tokenizer):
    (first, *_) = tokenizer.encode("🙂")
    tokens = [first] * 12 + tokenizer.encode("after")
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces).endswith("after")
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)


@given(
    text=st.text(alphabet="ab c", max_size=30),
    stop=st.lists(st.text(alphabet="ab c", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_where_the_first_stop_string_begins(tokenizer, text, stop):
    stream = TextStream(tokenizer.decode, stop)
    pieces = read(stream, tokenizer.encode(text))
    # The one that is complete first; of those complete with the same token, the one that begins first.
    if stream.stopped_by is None:
        assert "".join(pieces) == text and not any(s in text for s in stop)
    else:
        shown = "".join(pieces)
        assert text.startswith(shown + stream.stopped_by)
        assert not any(s in shown for s in stop)


def test_text_that_cannot_be_a_stop_string_is_not_held_back(tokenizer):
    stream = TextStream(tokenizer.decode, ("abX",))
    shown = ""
    for character in "abcab":
        for token in tokenizer.encode(character):
            shown += stream.add(token)
    assert shown == "abc"
    assert stream.finish() == "ab"
