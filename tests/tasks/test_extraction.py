"""Answers found in texts, by kind."""

import pytest

from stepjax.tasks import extraction


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
    assert extraction.math_answer(text).strip("* ") == answer
