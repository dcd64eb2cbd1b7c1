"""Records composed on the fly from real scans of handwritten digits: a vision-language data set of any size, offline.

| task       | image                          | prompt                                   | answer   |
|------------|--------------------------------|------------------------------------------|----------|
| transcribe | 1 to 5 digits in a strip       | Transcribe the digits from left to right. | 407      |
| count      | 1 to 6 digits scattered        | How many digits are in the image?        | 4        |
| add        | 2 or 3 digits in a strip       | Add up the digits.                       | 13       |
| point      | 2 to 4 distinct ones scattered | Point at the digit 7.                    | (62, 30) |
| arithmetic | none                           | What is 12 + 7?                          | 19       |

A point is the centre of the digit's ink in hundredths of the image's width and height, 0..99 from the top left corner.
Unconfirmed: the technical report does not state the coordinate format it trains grounding with.

Record i of a source depends on (seed, source, i) alone: any process can make any record, in any order. The splits share
neither scans nor arithmetic problems, whatever the seed.
"""

import hashlib
import operator
import zlib
from typing import Any

import numpy as np
from PIL import Image

from stepjax.config import DigitsSource, DigitsTask, Split
from stepjax.data.digits_render import Box, Layout, compose, load_scans, scatter_layout, strip_layout
from stepjax.errors import ConfigError

NUM_RECORDS = 10_000_000  # of every source; more than a run reads

# Probability of each number of digits in a picture.
NUM_DIGITS: dict[DigitsTask, dict[int, float]] = {
    "transcribe": {1: 0.4, 2: 0.3, 3: 0.25, 4: 0.03, 5: 0.02},  # short ones first teach what a digit is
    "count": {n: 1 / 6 for n in range(1, 7)},
    "add": {2: 0.5, 3: 0.5},
    "point": {n: 1 / 3 for n in range(2, 5)},
}
HELD_OUT_TRANSCRIBE = 3  # digits of every held-out transcription, so that its accuracy reads as one number
MAX_OPERAND = 20

_PROMPTS = {
    "transcribe": "Transcribe the digits from left to right.",
    "count": "How many digits are in the image?",
    "add": "Add up the digits.",
}

Problem = tuple[int, str, int]  # left operand, "+" or "-", right operand


class DigitsRecords:
    """Random access to the records of a digits source, for Grain and for evaluation. Holds no state; pickles.

    A record has, beside `id` and `messages`: `task`; `answer`, which holds the `text` and for points the `box` of the
    digit's ink (left, top, right, bottom, in hundredths of the image); and `scan_ids`, the scans in the picture.
    """

    def __init__(self, source: DigitsSource, seed: int, num_digits: int | None = None):
        """
        Args:
            num_digits: digits in every picture. None draws them from `NUM_DIGITS`, except for held-out transcriptions,
                which have three.

        Raises:
            ConfigError: the task has no pictures with `num_digits` digits.
        """
        self.source = source
        self.seed = seed
        self.num_digits = num_digits
        self._distribution = num_digits_distribution(source, num_digits)
        key = f"{source.name}/{source.task}/{source.split}".encode()
        self._source_key = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def __len__(self) -> int:
        return NUM_RECORDS

    def __repr__(self) -> str:
        return f"DigitsRecords({self.source!r}, seed={self.seed}, num_digits={self.num_digits})"

    def files(self) -> list[dict[str, Any]]:
        return []

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < NUM_RECORDS:
            raise IndexError(f"record {index} of {self.source.name}: there are {NUM_RECORDS}")
        rng = np.random.default_rng((self.seed, self._source_key, index))
        task, split = self.source.task, self.source.split
        scan_ids: list[int] = []
        if task == "arithmetic":
            problems = arithmetic_problems(split)
            left, sign, right = problems[rng.integers(len(problems))]
            content: Any = f"What is {left} {sign} {right}?"
            answer: dict[str, Any] = {"text": str(solve((left, sign, right)))}
        else:
            image, prompt, answer, scan_ids = self._picture(rng, task)
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        return {
            "id": f"digits/{task}/{split}/{index}",
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer["text"]}],
            "task": task,
            "answer": answer,
            "scan_ids": scan_ids,
        }

    def _picture(
        self, rng: np.random.Generator, task: DigitsTask
    ) -> tuple[Image.Image, str, dict[str, Any], list[int]]:
        num_digits = _draw(rng, self._distribution)
        # Classes first, then a scan of each: every class is equally likely though they differ in their number of scans.
        if task == "point":
            digits = rng.permutation(10)[:num_digits].tolist()
        else:
            digits = rng.integers(10, size=num_digits).tolist()
        by_class = load_scans().by_class[self.source.split]
        scan_ids = [by_class[digit][rng.integers(len(by_class[digit]))] for digit in digits]

        if task in ("transcribe", "add"):
            layout = strip_layout(rng, num_digits)
        else:
            layout = scatter_layout(rng, num_digits, capacity=max(NUM_DIGITS[task]))
        image, boxes = compose(rng, scan_ids, layout, augment=self.source.split == "train")

        if task == "point":
            return image, f"Point at the digit {digits[0]}.", _point_answer(boxes[0], layout), scan_ids
        texts = {
            "transcribe": "".join(map(str, digits)),
            "count": str(num_digits),
            "add": str(sum(digits)),
        }
        return image, _PROMPTS[task], {"text": texts[task]}, scan_ids


def num_digits_distribution(source: DigitsSource, num_digits: int | None = None) -> dict[int, float]:
    """Probability of each number of digits in a source's pictures; empty for arithmetic. See `DigitsRecords`."""
    distribution = NUM_DIGITS.get(source.task, {})
    if num_digits is None:
        is_fixed = source.task == "transcribe" and source.split == "held_out"
        return {HELD_OUT_TRANSCRIBE: 1.0} if is_fixed else distribution
    if num_digits not in distribution:
        allowed = f"one of {list(distribution)}" if distribution else "None: the task has no pictures"
        raise ConfigError(f"num_digits={num_digits} for the task {source.task!r} of {source.name}: must be {allowed}")
    return {num_digits: 1.0}


def arithmetic_problems(split: Split) -> tuple[Problem, ...]:
    """A split's problems: sums and non-negative differences of 0..20. About a fifth are held out."""
    return _PROBLEMS[split]


def solve(problem: Problem) -> int:
    left, sign, right = problem
    return left + right if sign == "+" else left - right


def _is_held_out(problem: Problem) -> bool:
    left, sign, right = problem
    if sign == "+":
        left, right = sorted((left, right))  # 7 + 12 would give 12 + 7 away
    return zlib.crc32(f"{left}{sign}{right}".encode()) % 5 == 0


def _all_problems() -> dict[Split, tuple[Problem, ...]]:
    operands = range(MAX_OPERAND + 1)
    problems = [(a, sign, b) for sign in "+-" for a in operands for b in operands if sign == "+" or b <= a]
    return {
        "train": tuple(problem for problem in problems if not _is_held_out(problem)),
        "held_out": tuple(problem for problem in problems if _is_held_out(problem)),
    }


_PROBLEMS = _all_problems()


def _point_answer(box: Box, layout: Layout) -> dict[str, Any]:
    left, right = (100 * x / layout.width for x in (box[0], box[2]))
    top, bottom = (100 * y / layout.height for y in (box[1], box[3]))
    text = f"({int((left + right) / 2)}, {int((top + bottom) / 2)})"
    return {"text": text, "box": [left, top, right, bottom]}


def _draw(rng: np.random.Generator, distribution: dict[int, float]) -> int:
    values, probabilities = tuple(distribution), tuple(distribution.values())
    return values[np.searchsorted(np.cumsum(probabilities)[:-1], rng.random(), side="right")]
