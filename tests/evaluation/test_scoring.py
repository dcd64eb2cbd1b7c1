"""Right, wrong and garbage answers; chance levels against guessing; Wilson intervals against known values."""

import math
import re
from collections import Counter
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepjax.config import DigitsSource, DigitsTask
from stepjax.data.digits import DigitsRecords
from stepjax.errors import RecordError
from stepjax.evaluation.scoring import TaskResult, chance_level, summary_table
from stepjax.figures import wilson_interval
from stepjax.rewards.verify import is_right

TASKS = get_args(DigitsTask)


def _source(task: Any, split: Any = "held_out") -> DigitsSource:
    return DigitsSource(name=task, weight=1.0, task=task, split=split)


def _point_record(box: list[float]) -> dict[str, Any]:
    return {"id": "a", "task": "point", "answer": {"text": "(12, 34)", "box": box}}


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_right_and_garbage_is_wrong(task, split):
    records = DigitsRecords(_source(task, split), seed=0)
    for i in range(50):
        record = records[i]
        answer = record["messages"][1]["content"]
        assert is_right(record, answer)
        assert is_right(record, f" {answer}\n")
        for text in ("", " ", "?", answer + "0", answer + " " + answer, "<|im_end|>"):
            assert not is_right(record, text), text
        # Verifiers of text want nothing else; those of a kind of answer find it.
        assert is_right(record, "The answer is " + answer) is (task in ("count", "point"))


def test_other_answers_are_wrong():
    record = {"id": "a", "task": "transcribe", "answer": {"text": "407"}}
    assert is_right(record, "407")
    for text in ("408", "0407", "4 0 7", "47", "407.", "+407"):
        assert not is_right(record, text), text


def test_a_point_is_right_inside_the_box_only():
    record = _point_record([10.0, 20.0, 15.0, 50.0])
    for text in ("(12, 34)", "(10, 20)", "(14, 49)", "( 12 ,34 )", "(12,34)"):
        assert is_right(record, text), text
    for text in ("(9, 34)", "(15, 34)", "(12, 19)", "(12, 50)", "(34, 12)", "12, 34", "(12, 34", "(12)", "(12, 034)"):
        assert not is_right(record, text), text


def test_the_point_tested_is_the_middle_of_its_cell():
    record = _point_record([10.6, 20.0, 15.0, 50.0])
    assert not is_right(record, "(10, 30)")
    assert is_right(record, "(11, 30)")


@given(st.text())
def test_no_text_makes_scoring_fail(text):
    for record in (_point_record([0.0, 0.0, 100.0, 100.0]), {"id": "a", "task": "add", "answer": {"text": "13"}}):
        assert is_right(record, text) in (True, False)


@pytest.mark.parametrize("answer", [None, {}, {"text": "(1, 2)"}, "(1, 2)"])
def test_a_record_without_what_scoring_needs_is_refused(answer):
    with pytest.raises(RecordError, match=re.escape("record 'a' has answer=") + ".*'box'"):
        is_right({"id": "a", "task": "point", "answer": answer}, "(1, 2)")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_chance_level(task):
    assert 0 < chance_level(_source(task)) <= 1 / 2


def test_chance_levels_that_can_be_computed_by_hand():
    assert chance_level(_source("transcribe")) == pytest.approx(0.001)
    # Training mixes lengths: 40 % have one digit, of which a tenth are, say, a 7.
    assert chance_level(_source("transcribe", "train")) == pytest.approx(0.04)
    assert chance_level(_source("receipt")) == pytest.approx(1e-8 / 3)
    assert chance_level(_source("count")) == pytest.approx(1 / 6)
    assert chance_level(_source("add")) == pytest.approx((10 / 100 + 55 / 1000) / 2)
    assert chance_level(_source("point")) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", ["count", "add", "arithmetic"])
def test_chance_is_what_the_best_constant_guess_scores(task, split):
    num_records = 2000 if task == "arithmetic" else 600
    records = [DigitsRecords(_source(task, split), seed=5)[i] for i in range(num_records)]
    # The most frequent answers are enough to find the best, whose lead over the next may be within the noise.
    guesses = [text for text, _ in Counter(record["answer"]["text"] for record in records).most_common(5)]
    best = max(sum(is_right(record, guess) for record in records) for guess in guesses) / num_records
    chance = chance_level(_source(task, split))
    deviation = math.sqrt(chance * (1 - chance) / num_records)
    assert abs(best - chance) < 4 * deviation


def test_no_constant_point_beats_pointing_at_a_random_digit():
    records = [DigitsRecords(_source("point"), seed=0)[i] for i in range(300)]
    hits = [
        sum(is_right(record, f"({x}, {y})") for record in records) for x in range(5, 100, 10) for y in range(5, 100, 10)
    ]
    assert max(hits) / 300 < chance_level(_source("point"))


def test_wilson_intervals():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 1000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_intervals_hold_the_proportion_and_mirror(counts):
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12 and correct / total - 1e-12 <= high <= 1
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))


def test_summary_table():
    results = [TaskResult("transcribe", 173, 200, 0.001), TaskResult("mine", 0, 5), TaskResult("none", 0, 0)]
    documents = TaskResult("documents", 0, 0, loss=2.34567)
    assert summary_table(results).splitlines() == [
        "task          right  accuracy   95 % interval  chance",
        "transcribe  173/200    86.5 %  81.1 to 90.6 %   0.1 %",
        "mine            0/5     0.0 %   0.0 to 43.4 %       -",
        "none              -         -               -       -",
    ]
    assert summary_table([results[0], documents]).splitlines() == [
        "task          right  accuracy   95 % interval  chance    loss",
        "transcribe  173/200    86.5 %  81.1 to 90.6 %   0.1 %       -",
        "documents         -         -               -       -  2.3457",
    ]


def _turns(wanted: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": wanted}]


@pytest.mark.parametrize(
    "record, text, right",
    [
        ({"messages": _turns("a cat")}, " a cat\n", True),
        ({"messages": _turns("a cat")}, "a dog", False),
        ({"messages": _turns([{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}])}, "a cat", True),
        ({"messages": _turns("<think>hm</think>\n\na cat")}, "<think>well</think>a cat", True),
        ({"messages": _turns("A cat, I think."), "answer": "a cat"}, "a cat", True),
        ({"messages": _turns("A cat, I think."), "answer": "a cat"}, "A cat, I think.", False),
        ({"messages": _turns("?"), "answer": ["a cat", "a tabby"]}, "a tabby", True),
        ({"messages": _turns("?"), "answer": {"text": "a cat"}}, "a cat", True),
    ],
)
def test_records_of_any_source_are_scored(record, text, right):
    assert is_right({"id": "a", **record}, text) is right


@pytest.mark.parametrize("answer", [5, [], [5], {}, {"text": 5}, {"texts": ["a"]}])
def test_an_answer_that_cannot_be_compared_is_named(answer):
    with pytest.raises(RecordError, match=re.escape(f"record 'a' has answer={answer!r}")):
        is_right({"id": "a", "messages": _turns("x"), "answer": answer}, "x")
