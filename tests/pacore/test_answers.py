"""Answers found in texts, compared and counted; citations."""

import pytest

from stepjax.pacore.answers import canonical, extract, is_right, plurality
from stepjax.pacore.citations import citations


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        ("The answer is 7.", "7"),
        ("**Answer:** blue\nbecause of 12 things", "blue"),
        ("6 x 7 makes 42, I think", "42"),
        ("x1 is 3.5", "3.5"),
        ("no numbers here", "no numbers here"),
        ("", ""),
    ],
)
def test_an_answer_is_found(text, answer):
    assert extract(text, "math").strip("* ") == answer
    assert extract(f" {text} ", "exact") == text


@pytest.mark.parametrize(
    "one, other",
    [
        ("42", "42.0"),
        ("1,000", "1000"),
        (r"\frac{1}{2}", "0.5"),
        ("1/2", "2/4"),
        ("$7$", "7"),
        (r"\text{Blue}", "blue"),
        ("( 1, 2 )", "(1,2)"),
        (r"\boxed{5}", "5"),
    ],
)
def test_the_same_answer(one, other):
    assert canonical(one, "math") == canonical(other, "math")
    assert canonical(one, "exact") != canonical(other, "exact")


def test_other_answers():
    assert canonical("042", "exact") != canonical("42", "exact")
    assert canonical("1/0", "math") == "1/0" and canonical("12", "math") != canonical("21", "math")


def test_right_and_wrong():
    assert is_right(r"It is \boxed{42}", 42, "math") and is_right("It is 42", ["41", "42"], "math")
    assert not is_right("It is 43", "42", "math") and not is_right("", "42", "math")
    assert is_right(" 407\n", "407", "exact") and not is_right("It is 407", "407", "exact")


def test_the_plurality_is_the_first_of_the_most_frequent():
    assert plurality(["1", "2", "answer: 2.0", "3"], "math") == (1, 2)
    assert plurality(["2", "1", "1", "2"], "math") == (0, 2)
    assert plurality(["", " "], "math") == (0, 0) and plurality([], "math") == (0, 0)


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
