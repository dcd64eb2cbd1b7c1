"""Each penalty with texts that it accepts and refuses."""

import time

import pytest
from test_verifiers import HOSTILE

from stepjax.rewards.penalties import fabricated_citations, language_mixing, overconfidence

CHINESE = "\u56fe\u4e2d\u6709\u4e09\u53ea\u732b\u548c\u4e24\u53ea\u72d7"
RUSSIAN = "\u043d\u0430 \u043a\u0430\u0440\u0442\u0438\u043d\u0435 \u0442\u0440\u0438 \u043a\u043e\u0448\u043a\u0438"
JAPANESE = "\u732b\u304c\u4e09\u5339\u3044\u307e\u3059\u3002\u72ac\u3082\u3044\u307e\u3059"
URL = "https://a.org/paper"


def asked(question: str, answer: object = None) -> dict:
    content = [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "answer": answer}


@pytest.mark.parametrize(
    "question, text, value",
    [
        ("How many cats?", "There are three cats.", 0),
        ("How many cats?", f"There are {CHINESE}, so three.", -1),
        ("How many cats?", CHINESE, -1),
        ("How many cats?", "The word is \u732b.", 0),  # a single one
        ("How many cats?", "a" * 10_000 + RUSSIAN, 0),  # a quotation
        ("How many cats?", f"`{CHINESE}`, $\\text{{{RUSSIAN}}}$, three", 0),
        ("How many cats?", "The angle \u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8 of \U0001d465\U0001d466", 0),
        (CHINESE, f"{CHINESE}, GPU", 0),
        (CHINESE, "There are three cats.", 0),  # not mixed
        (CHINESE, f"{CHINESE} {RUSSIAN}", -1),
        (JAPANESE, CHINESE, 0),
        (CHINESE, JAPANESE, -1),
        (RUSSIAN, RUSSIAN, 0),
        ("Translate to Russian: three cats", RUSSIAN, 0),
    ],
)
def test_language_mixing(question, text, value):
    assert language_mixing(asked(question), text) == value


def test_the_language_of_the_gold_is_right():
    assert language_mixing(asked("What does the sign say?", CHINESE), f"It says {CHINESE}.") == 0


@pytest.mark.parametrize(
    "question, text, value",
    [
        ("q", "No citation at all, e.g. in 10.5 cases and 3/4.", 0),
        ("q", f"See {URL}.", -1),
        (f"Summarise {URL}", f"From [here]({URL}), and HTTP://www.a.org/paper/#top.", 0),
        (f"Summarise {URL}", f"See {URL}2", -1),
        ("q", "See www.a.org/b", -1),
        ("q", "Open http://localhost:8000/v1 or https://api.example.com/x.", 0),
        ("q", "doi:10.1000/182", -1),
        ("Who wrote doi 10.1000/182?", "https://doi.org/10.1000/182 is the handbook.", 0),
        ("q", "arXiv:2601.05593 says so", -1),
        ("Read https://arxiv.org/abs/2601.05593", "In arXiv 2601.05593 and https://arxiv.org/pdf/2601.05593", 0),
        ("Read arXiv:2601.05593", "It follows arXiv:2601.05594", -1),
        ("q", "Smith et al. (2020), Nature 5, p. 3", 0),  # not seen
    ],
)
def test_fabricated_citations(question, text, value):
    assert fabricated_citations(asked(question), text) == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("It is definitely 5.", -1),
        ("I am absolutely certain: 5", -1),
        ("There is no doubt that it is 5", -1),
        ("Without any doubt 5", -1),
        ("I'm 100% sure it's 5.", -1),
        ("\u6beb\u65e0\u7591\u95ee\u662f 5", -1),
        ("It is 5.", 0),
        ("Perhaps 5; I am not absolutely certain.", 0),
        ("I'm not sure, but 5", 0),
        ("It's almost certainly 5", 0),
        ("That isn't definitely known; 5", 0),
        ("A certain number, 5", 0),
    ],
)
def test_overconfidence(text, value):
    assert overconfidence({}, text, 0.0) == value
    assert overconfidence({}, text, 1.0) == 0


def test_hostile_texts_take_a_short_time():
    texts = [*HOSTILE, "arxiv " * 200_000, "http://a" * 100_000, "10.1000/" * 100_000, "not " * 200_000 + "sure"]
    begin = time.process_time()
    for text in texts:
        for value in (language_mixing(asked("q"), text), fabricated_citations(asked("q"), text)):
            assert value in (0, -1)
        assert overconfidence({}, text, 0.0) in (0, -1)
    assert time.process_time() - begin < 20
