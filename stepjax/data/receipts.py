"""Receipts: a strip of handwritten digits and a printed check digit, their sum modulo 10.

    image      7 5 1 2 0 9 3 3 [0]            the last square: a light digit on dark, in print
    reasoning  A77B52C13D25E05F94G37H30       label, digit, sum of the digits so far modulo 10
    content    A7B5C1D2E0F9G3H3 ok            labels and digits; "bad" if their sum is not the printed check

The labels are places from the left. On a "misprint" the printed check is wrong, so "bad" is the truth. A model that is
trained on both learns to compare, and its "bad" on a true receipt reveals that it misread a digit.

A "ledger" is the same in words, to learn adding, copying and comparing without an image.
"""

import functools
import itertools
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stepjax.data.digits_render import Layout

PROMPT = "Add up the receipt."
PREFER = "Which is right?\nA {first}\nB {second}"  # asks a judge, who answers "A" or "B"

_ANSWER = re.compile(r"((?:[A-Z]\d)+) (ok|bad)")
_DARK, _LIGHT = (40, 40, 48), (250, 250, 250)
_SHARPNESS = 8  # print is drawn this much larger and then shrunk, so that it looks the same at every size


def receipt_answer(digits: Sequence[int], check: int) -> dict[str, str]:
    """The reasoning and the text of the answer for a receipt's digits and its printed check."""
    sums = [total % 10 for total in itertools.accumulate(digits)]
    labelled = [f"{label}{digit}" for label, digit in zip(string.ascii_uppercase, digits, strict=False)]
    return {
        "reasoning": "".join(f"{each}{total}" for each, total in zip(labelled, sums, strict=True)),
        "text": "".join(labelled) + (" ok" if sums[-1] == check else " bad"),
    }


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


def ledger_prompt(digits: Sequence[int], check: int) -> str:
    """The question of a ledger: the digits, and the check."""
    return f"Add up {' '.join(map(str, digits))}, {check}."


def print_check(image: Image.Image, check: int, layout: Layout) -> None:
    """Prints the check digit at the layout's last place."""
    image.paste(_printed(check, layout.box), layout.corners[-1])


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
    """The parts of "A7B5C1 ok"; None if the stripped text is anything else."""
    match = _ANSWER.fullmatch(text.strip())
    return Receipt(match[1], match[2] == "ok") if match else None
