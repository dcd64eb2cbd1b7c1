"""Verifiers: is the answer right? Each takes a record, whose `answer` is the gold, and a text without its reasoning.

A list as `answer` gives several right answers, except for `list`, `box` and `point`.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from stepjax.data.receipts import parse_receipt
from stepjax.errors import RecordError
from stepjax.rewards.registry import Record, reward
from stepjax.tasks import extraction, gold, units
from stepjax.tasks.same_answer import same_items


@reward("text")
def text_equals(record: Record, text: str) -> float:
    """1 if the text equals an answer, without white space around it."""
    return float(text.strip() in gold.answers(record))


@reward("ledger")
@reward("ledger_synthesis")
@reward("misprint")
@reward("printed")
@reward("receipt")
@reward("smudged")
@reward("synthesis")
def receipt(record: Record, text: str) -> float:
    """1 if all labelled digits of a receipt (`data.receipts`) are right.

    What it says of the check does not count; for that there is `receipt_verdict`.
    """
    truths = [parse_receipt(each) for each in gold.answers(record)]
    if None in truths:
        gold.refuse(record, 'give labelled digits and a verdict, such as "ok A7B5"')
    found = parse_receipt(text)
    return float(found is not None and found.digits in [truth.digits for truth in truths if truth is not None])


@reward("receipt_verdict", kind="follow-up")
def receipt_verdict(record: Record, text: str, verdict: float) -> float:
    """-1 if a receipt's answer says "ok" and is wrong, or "bad" and is right, else 0.

    Wrong answers earn nothing, whatever they say, so without this penalty "bad" dies out in reinforcement learning.
    """
    found = parse_receipt(text)
    return -1.0 if found is not None and found.is_ok != (verdict >= 1) else 0.0


@reward("math")
def math_equals(record: Record, text: str) -> float | None:
    """1 if the answer equals the gold: by type, else by math-verify. None if that cannot decide."""
    answer = extraction.math_answer(text)
    truths = gold.answers(record, takes_numbers=True)
    right = gold.same_as_any(answer, truths) if answer else False
    return None if right is None else float(right)


@reward("choice")
def choice(record: Record, text: str) -> float:
    """1 if the letter of the right option is chosen. `choices` may list the options' texts."""
    choices = record.get("choices", ())
    if not isinstance(choices, (list, tuple)) or not all(isinstance(each, str) for each in choices):
        raise RecordError(f"record {record.get('id')!r} has choices={choices!r:.200}: give a list of texts")
    right = [extraction.choice(each, choices) for each in gold.answers(record)]
    if None in right:
        gold.refuse(record, "name an option by its letter")
    return float(extraction.choice(text, choices) in right)


@reward("number")
def number(record: Record, text: str) -> float:
    """1 if the number is right. A unit must be convertible into the gold's, and may be missing.

    `tolerance` (absolute) and `relative_tolerance` are fields of the record; without them the number must be exact.
    """
    allowed = [_tolerance(record, name) for name in ("tolerance", "relative_tolerance")]
    truths = [extraction.quantity(each) for each in gold.answers(record, takes_numbers=True)]
    found = extraction.quantity(text)
    for truth in truths:
        if truth is None:
            gold.refuse(record, "give a number, with its unit if it has one")
        if found is None:
            continue
        value, (size, dimension), (gold_size, gold_dimension) = found[0], units.parse(found[1]), units.parse(truth[1])
        if found[1] and truth[1]:
            if dimension != gold_dimension:
                continue
            value = value * size / gold_size
        if abs(value - truth[0]) <= max(allowed[0], allowed[1] * abs(truth[0])):
            return 1.0
    return 0.0


@reward("count")
def count(record: Record, text: str) -> float:
    """1 if the text names the right whole number, and no other number."""
    truths = [extraction.whole_number(each) for each in gold.answers(record, takes_numbers=True)]
    if None in truths:
        gold.refuse(record, "give a whole number")
    return float(extraction.whole_number(text) in truths)


@reward("list")
def items(record: Record, text: str) -> float | None:
    """1 if all items are right and none is missing. The order counts only if the record says `"ordered": true`."""
    answer = record.get("answer")
    truths = tuple(map(str, answer)) if isinstance(answer, list) else extraction.items(gold.answers(record)[0])
    if not truths:
        gold.refuse(record, "list the items")
    right = same_items(truths, extraction.items(text), is_ordered=bool(record.get("ordered", False)))
    return None if right is None else float(right)


@reward("box", right=0.5)
def box(record: Record, text: str) -> float:
    """The intersection over union of the box and the gold, [left, top, right, bottom] in the same unit."""
    truth = _numbers(record, "box", 4)
    if truth[0] >= truth[2] or truth[1] >= truth[3]:
        gold.refuse(record, "left must be less than right, and top less than bottom")
    found = extraction.box(text)
    if found is None or found[0] >= found[2] or found[1] >= found[3]:
        return 0.0
    width = min(found[2], truth[2]) - max(found[0], truth[0])
    height = min(found[3], truth[3]) - max(found[1], truth[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((each[2] - each[0]) * (each[3] - each[1]) for each in (found, truth))
    return shared / (areas - shared)


@reward("point")
def point(record: Record, text: str) -> float:
    """1 inside the gold's box, else exp(-distance / scale), with the distance to the box.

    The gold is a `box`, or a point [x, y]; `scale` is a field of the record, by default 10. A coordinate without
    decimals, such as a hundredth of the width, is tested at the middle of its cell.
    """
    answer = record.get("answer")
    scale = _tolerance(record, "scale", default=10)
    if not scale:
        raise RecordError(f"record {record.get('id')!r} has scale=0: must be positive")
    if isinstance(answer, list):
        left, top = _numbers(record, "point", 2)
        right, bottom = left, top
    else:
        left, top, right, bottom = _numbers(record, "box", 4)
    found = extraction.point(text)
    if found is None:
        return 0.0
    distance = math.hypot(max(left - found[0], 0, found[0] - right), max(top - found[1], 0, found[1] - bottom))
    return math.exp(-distance / float(scale))


def _tolerance(record: Record, name: str, default: float = 0) -> Fraction:
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise RecordError(f"record {record.get('id')!r} has {name}={value!r:.100}: give a number of at least 0")
    return Fraction(str(value))


def _numbers(record: Record, name: str, length: int) -> tuple[float, ...]:
    answer = record.get("answer")
    answer = answer.get(name) if isinstance(answer, Mapping) else answer
    if isinstance(answer, (list, tuple)) and len(answer) == length and all(map(_is_number, answer)):
        return tuple(map(float, answer))
    gold.refuse(record, f"a {name} needs a dict with {name!r}, or a list, of {length} numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
