"""Receipts: a strip of handwritten digits and a printed check digit, which makes their sum a multiple of ten.

    image      7 5 1 2 0 9 3 4 [9]            the last square: a light digit on dark, in print
    reasoning  A77B52C13D25E05F94G37H41=90    label, digit, last digit of the sum so far; the check and the sum with it
    content    ok A7B5C1D2E0F9G3H4            "bad" if that sum is not 0; labels and digits

The labels are places from the left. On a "misprint" the printed check is wrong, so "bad" is the truth. A model that is
trained on both has reason to look, and an earned "bad" on a true receipt reveals a misread digit. The verdict comes
first: whoever reads the digits then knows what they are worth.

If the sum is not 0, the reasoning may go on with a second reading, after a "/". Some examples do so: one digit of their
first reading is wrong, usually a worn one, and the second reading corrects it. The first sum tells by how much it is
off. When to read again is left to reinforcement learning.

A "ledger" is the same in words, to learn adding, copying and checking without an image:

    prompt     Add up 7 5 1|6 2 0 9 3 4, 9.    a smudged place may be either of two digits
    reasoning  A77B52C68D20E00F99G32H46=95/A77B52C13D25E05F94G37H41=90

Either digit will do at a smudge, and the content repeats what was chosen. If the sum is not 0, a second reading may
choose otherwise. A "smudged" ledger has two to four smudges and a single choice whose sum is 0, which is the answer:
reading from left to right, one has to guess, and knows afterwards.

A "printed" receipt has no handwriting, to learn to read print: of a receipt that is one digit in ten.

A "synthesis" is a receipt together with messages of others about it (PaCoRe), a "ledger_synthesis" the same for a
smudged ledger. If one of them is right, the reasoning begins with "Ref " and the number of the first such one. Some
have a wrong check; else the check would tell nothing, and a model would learn to write what it should be.
"""

import functools
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stepjax.data.digits_render import Layout

PROMPT = "Add up the receipt."
PREFER = "Which is right?\nA {first}\nB {second}"  # asks a judge, who answers "A" or "B"

_ANSWER = re.compile(r"(ok|bad) ((?:[A-Z]\d)+)")
_DARK, _LIGHT = (40, 40, 48), (250, 250, 250)
_SHARPNESS = 8  # print is drawn this much larger and then shrunk, so that it looks the same at every size


def receipt_answer(digits: Sequence[int], check: int, first: Sequence[int] = ()) -> dict[str, str]:
    """The reasoning and the text of the answer for a receipt's digits and its printed check.

    Args:
        first: the digits of an earlier reading, which the reasoning shows before that of `digits`.
    """
    readings = [_reading(each, check) for each in (first, digits) if each]
    labelled = "".join(f"{label}{digit}" for label, digit in zip(string.ascii_uppercase, digits, strict=False))
    return {"reasoning": "/".join(readings), "text": ("ok " if readings[-1][-1] == "0" else "bad ") + labelled}


def _reading(digits: Sequence[int], check: int) -> str:
    labels = [*string.ascii_uppercase[: len(digits)], "="]
    shown = [*digits, check]
    sums = itertools.accumulate(shown)
    return "".join(f"{label}{digit}{total % 10}" for label, digit, total in zip(labels, shown, sums, strict=True))


def misreading(rng: np.random.Generator, digits: Sequence[int], wear: Sequence[float]) -> list[int]:
    """The digits with a mistake at one place, probably where they are the most worn."""
    weights = np.array(wear) ** 6 if any(wear) else np.ones(len(digits))
    read = list(digits)
    place = int(rng.choice(len(read), p=weights / weights.sum()))
    read[place] = (read[place] + int(rng.integers(1, 10))) % 10
    return read


def rival_answers(rng: np.random.Generator, digits: Sequence[int], check: int) -> tuple[str, str, str]:
    """Two messages about a receipt, of which one has more of its digits right, and which that is: "A" or "B"."""
    wrong = rng.choice(4, size=2, replace=False)
    messages = []
    for count in wrong:
        read = np.array(digits)
        places = rng.permutation(len(digits))[:count]
        read[places] = (read[places] + rng.integers(1, 10, size=count)) % 10
        messages.append(receipt_answer(read.tolist(), check)["text"])
    return messages[0], messages[1], "AB"[int(wrong[1] < wrong[0])]


def messages_of_others(
    rng: np.random.Generator, digits: Sequence[int], check: int, count: int, smudges: Mapping[int, int] | None = None
) -> list[str]:
    """Messages as a model of middling skill writes them; few verdicts are false.

    Of a receipt about half are right, and places that are hard to read are hard for all of them, who often take them
    for the same digit. At the smudges of a ledger they guess.
    """
    truth, size = np.array(digits), len(digits)
    if smudges is None:
        hard = rng.random(size) < rng.uniform(0.0, 0.3)
        error = np.where(hard, rng.uniform(0.2, 0.8, size), 0.01)
        mistaken = (truth + rng.integers(1, 10, size)) % 10  # what a hard one is taken for
    else:
        mistaken = np.array([smudges.get(place, digit) for place, digit in enumerate(digits)])
        error = np.full(size, 0.5)
    messages = []
    for _ in range(count):
        other = mistaken
        if smudges is None:
            other = np.where(rng.random(size) < 0.7, mistaken, rng.integers(10, size=size))
        read = np.where(rng.random(size) < error, other, truth)
        believed = check if rng.random() > 0.03 else int(rng.integers(10))
        messages.append(receipt_answer(read.tolist(), believed)["text"])
    return messages


def synthesis_answer(digits: Sequence[int], check: int, messages: Sequence[str]) -> dict[str, str]:
    """The answer to a receipt whose reasoning names the first right message, if there is one and the check is true."""
    answer = receipt_answer(digits, check)
    truth = parse_receipt(answer["text"])
    assert truth
    read = [parse_receipt(message) for message in messages]
    right = [i for i, each in enumerate(read, start=1) if truth.is_ok and each and each.digits == truth.digits]
    return {**answer, "reasoning": (f"Ref {right[0]} " if right else "") + answer["reasoning"]}


def ledger_prompt(digits: Sequence[int], check: int, smudges: Mapping[int, int]) -> str:
    """The question of a ledger: the digits, with what else a smudged place may be, and the check."""
    shown = ["|".join(map(str, sorted({digit, smudges.get(i, digit)}))) for i, digit in enumerate(digits)]
    return f"Add up {' '.join(shown)}, {check}."


def smudge(rng: np.random.Generator, digits: Sequence[int], places: Sequence[int]) -> dict[int, int]:
    """Another digit that each of these places may be."""
    return {int(place): int(digits[place] + rng.integers(1, 10)) % 10 for place in places}


def only_one_is_right(digits: Sequence[int], smudges: Mapping[int, int]) -> bool:
    """Whether any other choice at the smudges has another sum modulo 10."""
    changes = [other - digits[place] for place, other in smudges.items()]
    others = (itertools.combinations(changes, size) for size in range(1, len(changes) + 1))
    return all(sum(chosen) % 10 for chosen in itertools.chain.from_iterable(others))


def print_digit(image: Image.Image, digit: int, layout: Layout, place: int = -1) -> None:
    """Prints a digit at a place of the layout; the check's is the last."""
    image.paste(_printed(digit, layout.box), layout.corners[place])


@functools.cache
def _printed(digit: int, box: int) -> Image.Image:
    side = box * _SHARPNESS
    square = Image.new("RGB", (side, side), _DARK)
    draw = ImageDraw.Draw(square)
    draw.text((side / 2, side / 2), str(digit), _LIGHT, ImageFont.load_default(0.9 * side), anchor="mm")
    return square.resize((box, box), Image.Resampling.BOX)


class Receipt(NamedTuple):
    digits: str  # labels and digits: "A7B5C1"
    is_ok: bool  # whether the message says that the check came out


def parse_receipt(text: str) -> Receipt | None:
    """The parts of "ok A7B5C1"; None if the stripped text is anything else."""
    match = _ANSWER.fullmatch(text.strip())
    return Receipt(match[2], match[1] == "ok") if match else None
