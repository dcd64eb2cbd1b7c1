"""Answers found in texts, compared and counted."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stepjax.pacore.answers import extract, in_thread, is_right, judge, plurality
from stepjax.tasks import gold, math_judge
from stepjax.tasks.same_answer import same


def test_the_whole_text_or_the_answer_in_it():
    assert extract(" It is 7. ", "exact") == "It is 7." and extract(" It is 7. ", "math") == "7"


def test_what_cannot_be_told_is_neither_right_nor_wrong_and_named_once(caplog):
    gold._tell.cache_clear()  # of other tests
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
