"""Answers found in texts, compared and counted."""

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stepjax.errors import ConfigError
from stepjax.pacore import answers, math_judge
from stepjax.pacore.answers import extract, grouped, in_thread, is_right, judge, plurality
from stepjax.pacore.same_answer import same


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
        (r"\boxed{1} or \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        ("50%", "50%"),
        ("so 50 % of them", "50 %"),
        (".5", ".5"),
        ("sums.\n#### 1,072", "1,072"),
        ("The answer is 72, in total, so the farmer earns that much.", "72"),
        ("The answer is 72 because 8 x 9 = 72", "72"),
        ("Final Answer: The final answer is 42. I hope it is correct.", "42"),
        (r"The answer is \(42\). So it goes.", r"\(42\)"),
        ("The final answer is $\\frac{1}{2}$, as was to be shown.", "$\\frac{1}{2}$"),
        ("The answer is 1, 2 and 3.", "1, 2 and 3"),
        ("The answer is (B) Paris.", "(B) Paris"),
        ("**Final Answer**\n\nThe answer is:\n\n**1.5**", "1.5"),
        ("The answer is St. Louis. It lies on the Mississippi.", "St. Louis"),
        ("The answer is 3.14. Indeed", "3.14"),
        ("The answer is approximately 3.14", "3.14"),
        ("The answer is option C.", "C"),
        ("The answer is:\n\\[\n42.\n\\]\nas 6 x 7 = 42", "42"),
    ],
)
def test_an_answer_is_found(text, answer):
    assert extract(text, "math").strip("* ") == answer
    assert extract(f" {text} ", "exact") == text


# Each once the truth and once the answer.
SAME = [
    ("42", "42.0"),
    ("1,000", "1000"),
    (r"\frac{1}{2}", "0.5"),
    ("1/2", "2/4"),
    ("$7$", "7"),
    (r"\text{Blue}", "blue"),
    ("( 1, 2 )", "(1,2)"),
    (".5", "0.5"),
    ("50%", r"50\%"),
    ("50 percent", "50%"),
    ("50%", "0.5"),
    (r"1{,}000", "1000"),
    (r"1\,000\,000", "1000000"),
    (r"1,\!000", "1000"),
    ("1 000", "1000"),
    ("042", "42"),
    ("1e3", "1000"),
    (r"1.5 \times 10^{3}", "1500"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    (r"-1\frac12", "-1.5"),
    (r"\dfrac{3}{4}", r"\tfrac34"),
    (r"\left(\frac{1}{2}, 3\right)", "(0.5, 3)"),
    ("90^\\circ", "90"),
    (r"90^{\circ}", "90 degrees"),
    (r"\$18.00", "18"),
    ("**18**", "18"),
    ("5 km", "5"),
    (r"5\text{ km}", "5km"),
    (r"12\,\mathrm{cm}^2", "12 cm^{2}"),
    ("3 apples", "3 apple"),
    ("72/3 = 24", "24"),
    ("x = 5", "5"),
    (r"x \in [1,2]", "[1,2]"),
    ("1, 2", "2, 1"),
    (r"\{3, 1, 2\}", r"\{1,2,3\}"),
    ("1 and 2", "1, 2"),
    ("x=1, y=2", "x = 1 and y = 2"),
    ("100, 200", "100,200"),
    ("1,234, 5,678", "5678, 1234"),
    ("(B)", "B"),
    ("B. Paris", "b"),
    ("red, green and blue", "Blue, red, green"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("sqrt(8)", r"2\sqrt2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("y=2x+1", "y - 2x = 1"),
    ("x>1", r"(1,\infty)"),
    (r"\sqrt{2}", "1.414214"),
    (r"\sqrt{2}, 1", r"1, 2^{1/2}"),
    ("1/0", "1/0"),
]
OTHER = [
    ("12", "1,2"),
    ("357", "3,5,7"),
    ("12", "21"),
    ("1331 and 1728", "1728"),
    ("1/2^{99}", "1/2^{98}"),
    (r"\frac{\sqrt{2}}{2^{99}}", r"\frac{\sqrt{2}}{2^{98}}"),
    ("x+y=0", "2x-y=0"),
    ("x=5", "y=5"),
    ("x + y = 5", "5"),
    ("5 m", "5 km"),
    ("10%", "10"),
    ("33.3", "100/3"),
    (r"\sqrt{2}", "1.41"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("1, 2, 3", "1, 2"),
    ("B", "C. Paris"),
    ("B", "12"),
    ("blue", "lube"),
    ("Room 12", "Moor 12"),
    ("7", "seven"),
    ("5", "5x"),
    (r"\infty", r"-\infty"),
    ("3", "}{"),
    ("3", "3" + " 3" * 5000),
]


@pytest.mark.parametrize("one, other", SAME)
def test_the_same_answer(one, other):
    assert same(one, other) is True and same(other, one) is True
    assert one == other or grouped([one, other], "exact") == [0, 1]


@pytest.mark.parametrize("one, other", OTHER)
def test_other_answers(one, other):
    assert same(one, other) is False


def test_what_cannot_be_told_is_neither_right_nor_wrong_and_named_once(caplog):
    answers._tell.cache_clear()  # of other tests
    for _ in range(2):
        assert judge("It is 3.", r"\frac{", "math") is None and not is_right("It is 3.", r"\frac{", "math")
    assert judge("It is 3.", [r"\frac{", "3"], "math") is True and judge("", r"\frac{", "math") is False
    assert len(caplog.records) == 1 and "\\\\frac{" in caplog.text


def test_a_comparison_that_does_not_end_is_ended(monkeypatch):
    """And blocks neither the loop nor the next comparison, in whatever thread."""
    monkeypatch.setattr(math_judge, "SECONDS", 0.5)

    async def main():
        longest, begin = 0.0, time.monotonic()
        before = begin
        judging = asyncio.ensure_future(in_thread(judge, r"\boxed{9^{9^{9^9}}}", r"\sqrt{2}", "math"))
        while not judging.done():
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        return await judging, longest / (before - begin)

    verdict, share = asyncio.run(main())
    assert verdict is None and share < 0.5
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda i: same(rf"\sqrt{{{i}}}", rf"{i}^{{1/2}}"), range(2, 10)))


def test_what_math_verify_breaks_is_its_own_affair(monkeypatch):
    assert same(r"\sqrt{2}", "[" * 60) is False
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        math_judge._verdict(r"\sqrt{3}", r"\sqrt{5}", False, 5.0)


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 30_000, "answer: " + " " * 10**6 + "x", "1," * 200_000 + "x", "** " * 50_000, "9" * 10**6]
)
def test_long_texts_take_no_long_time(text):
    begin = time.process_time()
    is_right(text, "7", "math")
    plurality([text, text, "7"], "math")
    assert time.process_time() - begin < 2


def test_right_and_wrong():
    assert is_right(r"It is \boxed{42}", 42, "math") and is_right("It is 42", ["41", "42"], "math")
    assert not is_right("It is 43", "42", "math") and not is_right("", "42", "math")
    assert is_right(" 407\n", "407", "exact") and not is_right("It is 407", "407", "exact")


def test_the_plurality_is_the_first_of_the_most_frequent():
    assert plurality(["1", "2", "answer: 2.0", "3"], "math") == (1, 2)
    assert plurality(["2", "1", "1", "2"], "math") == (0, 2)
    assert plurality([r"\boxed{1,2}", r"\boxed{12}", r"\boxed{7}"], "math") == (0, 1)
    assert plurality([r"\boxed{\sqrt{8}}", "3", r"\boxed{2\sqrt2}"], "math") == (0, 2)
    assert plurality(["", " "], "math") == (0, 0) and plurality([], "math") == (0, 0)
