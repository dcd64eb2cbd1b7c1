"""Two answers compared."""

import sys

import pytest

from stepjax.errors import ConfigError
from stepjax.tasks import math_judge
from stepjax.tasks.same_answer import same

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


@pytest.mark.parametrize("one, other", OTHER)
def test_other_answers(one, other):
    assert same(one, other) is False


def test_what_math_verify_breaks_is_its_own_affair(monkeypatch):
    assert same(r"\sqrt{2}", "[" * 60) is False
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        math_judge._verdict(r"\sqrt{3}", r"\sqrt{5}", False)
