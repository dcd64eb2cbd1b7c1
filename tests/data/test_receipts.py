"""Receipts: answers that are true of the picture, a check that is printed where it should be, and wear by degrees."""

import itertools
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepjax.config import DigitsSource
from stepjax.config_file import load_recipe
from stepjax.data import digits as digits_module
from stepjax.data.digits import DigitsRecords
from stepjax.data.digits_render import degraded, load_scans, strip_layout
from stepjax.data.receipts import misreading, only_one_is_right, parse_receipt, print_digit, receipt_answer
from stepjax.errors import ConfigError
from stepjax.processing.images import plan_views
from stepjax.processing.processor import Processor

KINDS = ("receipt", "misprint", "printed")
SPLITS = ("train", "held_out")
RECIPE = load_recipe(Path(__file__).parents[2] / "configs" / "digits" / "sft.py")


def _records(task: Any = "receipt", split: Any = "train", degradation: float = 0.6, seed: int = 0) -> DigitsRecords:
    return DigitsRecords(DigitsSource(name="a", weight=1.0, task=task, split=split, degradation=degradation), seed)


def _image(record: dict[str, Any]) -> Image.Image:
    [image] = [item["image"] for item in record["messages"][0]["content"] if item["type"] == "image"]
    return image


def test_the_answer_labels_adds_up_and_checks():
    assert receipt_answer([7, 5, 1, 9], 8) == {"reasoning": "A77B52C13D92=80", "text": "ok A7B5C1D9"}
    assert receipt_answer([7, 5, 1, 9], 3) == {"reasoning": "A77B52C13D92=35", "text": "bad A7B5C1D9"}


def test_a_second_reading_follows_the_first_and_is_the_answer():
    answer = receipt_answer([7, 5, 1, 9], 8, first=[7, 6, 1, 9])
    assert answer == {"reasoning": "A77B63C14D93=81/A77B52C13D92=80", "text": "ok A7B5C1D9"}


def test_a_misreading_changes_one_digit_where_the_weights_are():
    rng, places = np.random.default_rng(0), Counter()
    for _ in range(100):
        read = misreading(rng, [7, 5, 1, 9], [0.0, 0.8, 0.0, 0.7])
        [place] = [i for i, (a, b) in enumerate(zip(read, [7, 5, 1, 9], strict=True)) if a != b]
        assert all(0 <= digit <= 9 for digit in read)
        places[place] += 1
    assert set(places) == {1, 3} and places[1] > 60


def test_mistakes_are_made_where_a_receipt_is_worn(monkeypatch):
    seen = []
    monkeypatch.setattr(digits_module, "misreading", lambda rng, digits, wear: seen.append(wear) or digits)
    record = _records("receipt")[0]
    _records("receipt", degradation=0.0)[0]
    worn, clear = seen
    assert len(worn) == len(record["scan_ids"]) and max(worn) > 1.3 * np.median(worn) > 0 and not any(clear)


def _checked(record: dict[str, Any], digits: list[int], check: int, smudged: Sequence[int] = ()) -> tuple[bool, bool]:
    """Asserts that the record's answer is true, for one reading or two; whether there are two, and it is "ok"."""
    turn = record["messages"][1]
    assert record["answer"] == {"reasoning": turn["reasoning_content"], "text": turn["content"]}
    *before, reasoning = turn["reasoning_content"].split("/")
    assert {"reasoning": reasoning, "text": turn["content"]} == receipt_answer(digits, check)
    if before:
        [first] = before
        read = [int(digit) for digit in first[1:-3:3]]
        assert first == receipt_answer(read, check)["reasoning"] and first[-1] != "0"
        assert (sum(digits) + check) % 10 == 0  # the second reading explains the sum
        [mistake] = [place for place, digit in enumerate(digits) if read[place] != digit]
        assert mistake in smudged or not smudged
    return bool(before), turn["content"].startswith("ok ")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", KINDS)
def test_the_answer_is_true_of_the_scans_and_of_the_print(task, split):
    labels = load_scans().labels
    num_digits, checks, verdicts, readings = Counter(), Counter(), Counter(), Counter()
    for i in range(60):
        record = _records(task, split)[i]
        digits = [labels[scan] for scan in record["scan_ids"]]
        image = np.asarray(_image(record))
        [printed] = [check for check in range(10) if _shows(image, check)]
        is_reread, is_ok = _checked(record, digits, printed)
        assert ((sum(digits) + printed) % 10 == 0) == is_ok and (task == "printed" or is_ok == (task == "receipt"))
        verdicts[is_ok] += 1
        readings[is_reread] += 1
        num_digits[len(digits)] += 1
        checks[printed] += 1
    assert set(num_digits) == {8, 9, 10} and len(checks) == 10
    assert task != "printed" or 15 < verdicts[True] < 45
    assert {"misprint": 0, "printed": 2, "receipt": 8}[task] <= readings[True] <= {"misprint": 0}.get(task, 30)


def _ledger(prompt: str) -> tuple[list[set[int]], int]:
    """What each place may be, and the check."""
    match = re.fullmatch(r"Add up ((?:\d(?:\|\d)? )*\d(?:\|\d)?), (\d)\.", prompt)
    assert match
    return [{int(digit) for digit in place.split("|")} for place in match[1].split()], int(match[2])


def test_a_ledger_is_a_receipt_in_words():
    verdicts, lengths, smudges, readings = Counter(), Counter(), Counter(), Counter()
    for i in range(200):
        record = _records("ledger", degradation=0.0)[i]
        shown, check = _ledger(record["messages"][0]["content"])
        digits = [int(each) for each in record["answer"]["text"].split()[1][1::2]]
        assert record["scan_ids"] == [] and all(digit in place for digit, place in zip(digits, shown, strict=True))
        smudged = [place for place, each in enumerate(shown) if len(each) == 2]
        smudges[bool(smudged)] += 1
        is_reread, is_ok = _checked(record, digits, check, smudged)
        assert smudged or not is_reread
        readings[is_reread] += 1
        lengths[len(digits)] += 1
        verdicts[is_ok] += 1
    assert set(lengths) == set(range(4, 11)) and 80 < verdicts[True] < 140 and 70 < smudges[True] < 120
    assert 5 < readings[True] < 30


def test_one_choice_at_the_smudges_is_right():
    counts = Counter()
    for i in range(60):
        record = _records("smudged", degradation=0.0)[i]
        shown, check = _ledger(record["messages"][0]["content"])
        right = [each for each in itertools.product(*shown) if (sum(each) + check) % 10 == 0]
        assert [receipt_answer(each, check) for each in right] == [record["answer"]]
        counts[sum(len(place) == 2 for place in shown)] += 1
    assert set(counts) == {2, 3, 4}


def test_only_one_is_right_looks_at_every_choice():
    assert only_one_is_right([1, 2, 3], {0: 2, 1: 4})  # changes of 1 and 2
    assert not only_one_is_right([1, 2, 3], {0: 3, 1: 0})  # of 2 and -2
    assert not only_one_is_right([1, 2, 3], {0: 4, 1: 5, 2: 7})  # of 3, 3 and 4


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["synthesis", "ledger_synthesis"])
def test_a_synthesis_lists_messages_and_its_reasoning_names_the_first_right_one(task, split):
    named, right, honest, counts, solvable = Counter(), [], [], Counter(), Counter()
    for i in range(200):
        record = _records(task, split)[i]
        content = record["messages"][0]["content"]
        problem, *lines = (content if isinstance(content, str) else content[0]["text"]).split("\n")
        reasoning, text = record["answer"]["reasoning"], record["answer"]["text"]
        if task == "synthesis":
            assert problem == "Add up the receipt."
            digits, image = [load_scans().labels[scan] for scan in record["scan_ids"]], np.asarray(_image(record))
            [check] = [check for check in range(10) if _shows(image, check)]
            solutions = [digits] if (sum(digits) + check) % 10 == 0 else []
        else:
            shown, check = _ledger(problem)
            digits = [int(each) for each in text.split()[1][1::2]]
            assert all(digit in place for digit, place in zip(digits, shown, strict=True))
            solutions = [list(each) for each in itertools.product(*shown) if (sum(each) + check) % 10 == 0]
        assert solutions in ([], [digits])
        solvable[bool(solutions)] += 1
        expected = receipt_answer(digits, check)
        assert text == expected["text"] and reasoning.endswith(expected["reasoning"])
        read = []
        for number, line in enumerate(lines, start=1):
            assert line.startswith(f"Ref {number} ")
            read.append(parse_receipt(line.removeprefix(f"Ref {number} ")))
        good = [bool(solutions) and each is not None and each.digits == text.split()[1] for each in read]
        assert reasoning.startswith(f"Ref {good.index(True) + 1} ") if any(good) else reasoning.startswith("A")
        if solutions:
            right += good
            honest += [each.is_ok for each, is_right in zip(read, good, strict=True) if each and is_right]
            named[any(good)] += 1
        counts[len(lines)] += 1
    least, most = (0.35, 0.65) if task == "synthesis" else (0.1, 0.45)
    assert min(counts) == 2 and 28 < max(counts) <= 32 and 0.4 < sum(counts[n] for n in range(9)) / 200 < 0.65
    assert least < np.mean(right) < most and 0.9 < np.mean(honest) < 1
    assert named[False] > 10 and (120 < solvable[True] < 160 if split == "train" else solvable[True] == 200)


def _shows(image_HWC: np.ndarray, check: int) -> bool:
    """Whether the digit is printed near the right edge."""
    box = image_HWC.shape[0]
    canvas = Image.new("RGB", (box, box))
    rng = np.random.default_rng(0)
    layout = strip_layout(rng, 1)
    while layout.box != box or layout.corners[0] != (0, 0):
        layout = strip_layout(rng, 1)
    print_digit(canvas, check, layout)
    width = image_HWC.shape[1]
    return any(
        np.array_equal(image_HWC[:, x : x + box], np.asarray(canvas)) for x in range(width - 3 * box // 2, width)
    )


@pytest.mark.parametrize("split", SPLITS)
def test_a_record_depends_on_its_index_alone(split):
    def described(record):
        return _image(record).tobytes(), record["answer"], record["scan_ids"]

    records = _records(split=split)
    forwards = [described(records[i]) for i in range(10)]
    fresh = pickle.loads(pickle.dumps(records))
    assert [described(fresh[i]) for i in reversed(range(10))] == forwards[::-1]


def test_the_splits_share_no_scan():
    train, held_out = ({scan for i in range(60) for scan in _records(split=s)[i]["scan_ids"]} for s in SPLITS)
    assert len(held_out) > 100 and not train & held_out


def test_degradation_changes_the_ink_and_nothing_else():
    """So that accuracy at two levels is compared on the same receipts."""
    worn, clear = _records(degradation=0.6), _records(degradation=0.0)
    for i in range(10):
        assert worn[i]["answer"]["text"] == clear[i]["answer"]["text"] and worn[i]["scan_ids"] == clear[i]["scan_ids"]
        assert _image(worn[i]).size == _image(clear[i]).size
        assert _image(worn[i]).tobytes() != _image(clear[i]).tobytes()


def test_more_degradation_is_more_wear_and_none_is_none():
    layout = strip_layout(np.random.default_rng(0), 1)
    ink = load_scans().images[0].resize((layout.box, layout.box))
    wear = [
        np.mean([_distance(degraded(np.random.default_rng(i), ink, level, 7), ink) for i in range(50)])
        for level in (0.0, 0.3, 0.6, 1.0)
    ]
    assert wear[0] == 0 and wear == sorted(wear) and wear[1] > 5


def _distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize("degradation", [-0.1, 1.1, float("nan")])
def test_a_degradation_outside_its_range_is_refused(degradation):
    with pytest.raises(ConfigError, match=r"data.sources.a.degradation=.*must be from 0 to 1"):
        DigitsSource(name="a", weight=1.0, task="receipt", degradation=degradation)


@pytest.mark.parametrize("split", SPLITS)
def test_receipts_fit_the_recipe_and_most_crops_hold_one_digit(split):
    processor = Processor.from_config(RECIPE.images, RECIPE.tokenizer)
    extra = Counter()
    for i in range(100):
        record = _records(split=split)[i]
        plan = plan_views(*_image(record).size, RECIPE.images)
        extra[plan.num_crops - len(record["scan_ids"]) - 1] += 1
        example = processor.draft(record)
        budget = RECIPE.batch
        assert len(example.tokens) <= budget.tokens
        assert example.num_views[0] <= budget.global_views and example.num_views[1] <= budget.crops
        assert example.loss_weights.sum() <= RECIPE.evaluation.max_new_tokens
    assert extra[0] > 90 and set(extra) <= {0, 1}


def test_parse_receipt():
    assert parse_receipt(" ok A7B5\n") == ("A7B5", True)
    assert parse_receipt("bad A7") == ("A7", False)
    assert parse_receipt("ok A7B") is None and parse_receipt("ok ") is None and parse_receipt("o A7") is None


@pytest.mark.parametrize("split", SPLITS)
def test_judges_are_asked_about_answers_of_which_one_has_more_right_digits(split):
    verdicts = Counter()
    for index in range(60):
        record = _records("prefer", split)[index]
        question = record["messages"][0]["content"][1]["text"]
        first, second = (parse_receipt(line[2:]) for line in question.splitlines()[1:])
        truth = [load_scans().labels[scan] for scan in record["scan_ids"]]
        assert first is not None and second is not None
        right = [sum(a == str(b) for a, b in zip(each.digits[1::2], truth, strict=True)) for each in (first, second)]
        assert record["answer"]["text"] == ("A" if right[0] > right[1] else "B") and right[0] != right[1]
        verdicts[record["answer"]["text"]] += 1
    assert min(verdicts.values()) > 15
