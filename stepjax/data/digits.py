"""A vision-language data set of any size, composed on the fly from real scans of handwritten digits. Works offline.

| task       | image                          | prompt                                    | answer   |
|------------|--------------------------------|-------------------------------------------|----------|
| transcribe | 1 to 5 digits in a strip       | Transcribe the digits from left to right. | 407      |
| count      | 1 to 6 digits scattered        | How many digits are in the image?         | 4        |
| add        | 2 or 3 digits in a strip       | Add up the digits.                        | 13       |
| point      | 2 to 4 distinct ones scattered | Point at the digit 7.                     | (62, 30) |
| arithmetic | none                           | What is 12 + 7?                           | 19       |
| ledger     | none                           | Add up 7 5, 8.                            | ok A7B5  |
| smudged    | none                           | Add up 2|7 5, 8.                          | ok A7B5  |
| receipt    | 8 to 10 in a strip, a check    | Add up the receipt.                       | ok A7B5  |
| misprint   | the same with a wrong check    | Add up the receipt.                       | bad A7B5 |
| printed    | the same with printed digits   | Add up the receipt.                       | ok A7B5  |
| prefer     | a receipt                      | Which is right? A (answer) B (another)    | A        |
| synthesis  | a receipt                      | Add up the receipt. Ref 1 (answer) Ref 2  | ok A7B5  |

A "ledger_synthesis" is the last one with a smudged ledger.

For receipts see `data.receipts`. A point is the centre of the digit's ink in hundredths of the image's width and
height, 0..99 from the top left corner. Unconfirmed: the technical report does not state the coordinate
format it trains grounding with.

Record i of a source depends only on (seed, source, i): any process can make any record, in any order. The splits never
share scans or arithmetic problems, for any seed.
"""

import bisect
import hashlib
import itertools
import operator
import zlib
from typing import Any

import numpy as np
from PIL import Image

from stepjax.config import DigitsSource, DigitsTask, Split
from stepjax.data.digits_render import Box, Layout, compose, load_scans, scatter_layout, strip_layout
from stepjax.data.receipts import (
    PREFER,
    PROMPT,
    ledger_prompt,
    messages_of_others,
    misreading,
    only_one_is_right,
    print_digit,
    receipt_answer,
    rival_answers,
    smudge,
    synthesis_answer,
)
from stepjax.processing.synthesis import Template

NUM_RECORDS = 10_000_000  # per source; more than a run reads

# Probability of each digit count.
NUM_DIGITS: dict[DigitsTask, dict[int, float]] = {
    "transcribe": {1: 0.4, 2: 0.3, 3: 0.25, 4: 0.03, 5: 0.02},  # short ones first teach what a digit is
    "count": {n: 1 / 6 for n in range(1, 7)},
    "add": {2: 0.5, 3: 0.5},
    "point": {n: 1 / 3 for n in range(2, 5)},
    "arithmetic": {},
    "ledger": {n: 1 / 7 for n in range(4, 11)},
    "smudged": {n: 1 / 3 for n in range(8, 11)},
    "receipt": {n: 1 / 3 for n in range(8, 11)},
    "misprint": {n: 1 / 3 for n in range(8, 11)},
    "printed": {n: 1 / 3 for n in range(8, 11)},
    "prefer": {n: 1 / 3 for n in range(8, 11)},
    "synthesis": {n: 1 / 3 for n in range(8, 11)},
    "ledger_synthesis": {n: 1 / 9 for n in range(2, 11)},  # short ones first teach what a reference is
}
NUM_REFERENCES = 2, 32  # of a synthesis; small numbers are likelier
REREAD = 0.3  # share of receipts and ledgers with a true check whose reasoning mends a mistake of a first reading
SMUDGED, SMUDGES = 0.5, 0.4  # share of ledgers with smudges; share of their digits
NUM_SMUDGES = 2, 4  # of the task "smudged"
# So that accuracy on the held-out ones means the same everywhere.
HELD_OUT: dict[DigitsTask, dict[int, float]] = {"transcribe": {3: 1.0}, "ledger_synthesis": NUM_DIGITS["smudged"]}
UNSOLVABLE = 0.3  # share of syntheses whose check is wrong, so that the sum has to be looked at there as well
MAX_OPERAND = 20

_SYNTHESIS = Template("short")

Problem = tuple[int, str, int]  # left operand, "+" or "-", right operand


class DigitsRecords:
    """Random access to the records of a digits source, for Grain and evaluation. Stateless and picklable.

    Besides `id` and `messages`, a record has `task`; `scan_ids`, the scans in the image; and `answer` with the `text`
    and, for points, the `box` of the digit's ink (left, top, right, bottom, in hundredths of the image), for receipts
    the `reasoning`.
    """

    def __init__(self, source: DigitsSource, seed: int):
        self.source, self.seed = source, seed
        distribution = num_digits_distribution(source)
        self._num_digits, self._ends = tuple(distribution), tuple(itertools.accumulate(distribution.values()))[:-1]
        key = f"{source.name}/{source.task}/{source.split}".encode()
        self._source_key = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def __len__(self) -> int:
        return NUM_RECORDS

    def __repr__(self) -> str:
        return f"DigitsRecords({self.source!r}, seed={self.seed})"

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
        elif task in ("ledger", "smudged", "ledger_synthesis"):
            content, answer = self._ledger(rng)
        else:
            image, prompt, answer, scan_ids = self._picture(rng)
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            if task in ("receipt", "misprint", "printed", "synthesis"):
                content.reverse()  # so that messages do not come between the receipt and its answer
        turn = {"role": "assistant", "content": answer["text"]}
        if "reasoning" in answer:
            turn["reasoning_content"] = answer["reasoning"]
        return {
            "id": f"digits/{task}/{split}/{index}",
            "messages": [{"role": "user", "content": content}, turn],
            "task": task,
            "answer": answer,
            "scan_ids": scan_ids,
        }

    def _is_misprint(self, rng: np.random.Generator) -> bool:
        """Whether a synthesis has no right answer. Held-out ones have one."""
        is_synthesis = self.source.task in ("synthesis", "ledger_synthesis")
        return is_synthesis and self.source.split == "train" and rng.random() < UNSOLVABLE

    def _draw_num_digits(self, rng: np.random.Generator) -> int:
        return self._num_digits[bisect.bisect_right(self._ends, rng.random())]

    def _ledger(self, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
        """Returns prompt and answer."""
        task, num_digits = self.source.task, self._draw_num_digits(rng)
        if task == "ledger":
            # A sum of unrelated digits modulo 10 tells nothing of either, so nothing leads a model to look at both.
            # If the digits are small, a sum is likely to be near the one before; from there it learns the rest.
            largest = 9 if rng.random() < 0.5 else rng.integers(1, 9)
            digits = rng.integers(largest + 1, size=num_digits).tolist()
            check = -sum(digits) % 10 if rng.random() < 0.5 else int(rng.integers(10))
            is_smudged = (rng.random(num_digits) < SMUDGES) & (rng.random() < SMUDGED)
            smudges = smudge(rng, digits, np.flatnonzero(is_smudged).tolist())
            first = list(digits)
            for place in rng.permutation(list(smudges))[:1].tolist():
                first[place] = smudges[place]
            return ledger_prompt(digits, check, smudges), _reasoned(rng, digits, check, first)
        digits = rng.integers(10, size=num_digits).tolist()
        check, [fewest, most] = -sum(digits) % 10, NUM_SMUDGES
        places = rng.permutation(num_digits)[: rng.integers(fewest, most + 1)].tolist()
        while not only_one_is_right(digits, smudges := smudge(rng, digits, places)):
            pass
        if task == "smudged":
            return ledger_prompt(digits, check, smudges), receipt_answer(digits, check)
        if self._is_misprint(rng):
            choices = itertools.product(*({digit, smudges.get(i, digit)} for i, digit in enumerate(digits)))
            check = int(rng.choice(sorted(set(range(10)) - {-sum(each) % 10 for each in choices}) or [check]))
        prompt = ledger_prompt(digits, check, smudges)
        messages = messages_of_others(rng, digits, check, _draw_references(rng), smudges)
        return _with_messages(prompt, messages), synthesis_answer(digits, check, messages)

    def _picture(self, rng: np.random.Generator) -> tuple[Image.Image, str, dict[str, Any], list[int]]:
        """Returns image, prompt, answer and scans."""
        task = self.source.task
        num_digits = self._draw_num_digits(rng)
        # Draw classes first, then a scan of each, so that classes are equally likely despite unequal scan counts.
        drawn = rng.permutation(10)[:num_digits] if task == "point" else rng.integers(10, size=num_digits)
        digits = drawn.tolist()
        by_class = load_scans().by_class[self.source.split]
        scan_ids = [by_class[digit][rng.integers(len(by_class[digit]))] for digit in digits]
        check = 0
        if task in ("transcribe", "add"):
            layout = strip_layout(rng, num_digits)
        elif task in ("receipt", "misprint", "printed", "prefer", "synthesis"):
            is_wrong = task == "misprint" or (task == "printed" and rng.random() < 0.5) or self._is_misprint(rng)
            check = int((rng.integers(1, 10) if is_wrong else 0) - sum(digits)) % 10
            layout = strip_layout(rng, num_digits + 1)  # the last place is the check's
        else:
            layout = scatter_layout(rng, num_digits, capacity=max(NUM_DIGITS[task]))
        is_train, degradation = self.source.split == "train", self.source.degradation
        image, placed = compose(rng, scan_ids, layout, augment=is_train, degradation=degradation)
        match task:
            case "receipt" | "misprint" | "printed":
                for place, digit in enumerate(digits if task == "printed" else ()):
                    print_digit(image, digit, layout, place)
                print_digit(image, check, layout)
                first = misreading(rng, digits, [each.wear for each in placed])
                return image, PROMPT, _reasoned(rng, digits, check, first), scan_ids
            case "prefer":
                print_digit(image, check, layout)
                first, second, text = rival_answers(rng, digits, check)
                prompt = PREFER.format(first=first, second=second)
            case "synthesis":
                print_digit(image, check, layout)
                messages = messages_of_others(rng, digits, check, _draw_references(rng))
                return image, _with_messages(PROMPT, messages), synthesis_answer(digits, check, messages), scan_ids
            case "transcribe":
                prompt, text = "Transcribe the digits from left to right.", "".join(map(str, digits))
            case "count":
                prompt, text = "How many digits are in the image?", str(num_digits)
            case "add":
                prompt, text = "Add up the digits.", str(sum(digits))
            case _:
                return image, f"Point at the digit {digits[0]}.", _point_answer(placed[0].box(), layout), scan_ids
        return image, prompt, {"text": text}, scan_ids


def num_digits_distribution(source: DigitsSource) -> dict[int, float]:
    """Probability of each digit count in a source's images; empty for arithmetic."""
    return (HELD_OUT if source.split == "held_out" else NUM_DIGITS).get(source.task, NUM_DIGITS[source.task])


def arithmetic_problems(split: Split) -> tuple[Problem, ...]:
    """Problems of a split: sums and non-negative differences of 0..20. About a fifth are held out."""
    return _PROBLEMS[split]


def _reasoned(rng: np.random.Generator, digits: list[int], check: int, first: list[int]) -> dict[str, str]:
    """The answer to a receipt or ledger; its reasoning may have read it otherwise at first."""
    if (sum(digits) + check) % 10 or rng.random() >= REREAD or first == digits:
        return receipt_answer(digits, check)
    return receipt_answer(digits, check, first)


def _draw_references(rng: np.random.Generator) -> int:
    fewest, most = NUM_REFERENCES
    return round(fewest * (most / fewest) ** rng.random())  # each doubling is equally likely


def _with_messages(prompt: str, messages: list[str]) -> str:
    [turn] = _SYNTHESIS.conversation([{"role": "user", "content": prompt}], messages)
    return turn["content"]


def solve(problem: Problem) -> int:
    left, sign, right = problem
    return left + right if sign == "+" else left - right


def _split_of(problem: Problem) -> Split:
    left, sign, right = problem
    if sign == "+":
        left, right = sorted((left, right))  # 7 + 12 would give 12 + 7 away
    return "held_out" if zlib.crc32(f"{left}{sign}{right}".encode()) % 5 == 0 else "train"


_OPERANDS = range(MAX_OPERAND + 1)
_ALL = [(a, sign, b) for sign in "+-" for a in _OPERANDS for b in _OPERANDS if sign == "+" or b <= a]
_SPLITS: tuple[Split, ...] = ("train", "held_out")
_PROBLEMS = {split: tuple(problem for problem in _ALL if _split_of(problem) == split) for split in _SPLITS}


def _point_answer(box: Box, layout: Layout) -> dict[str, Any]:
    left, right = (100 * x / layout.width for x in (box[0], box[2]))
    top, bottom = (100 * y / layout.height for y in (box[1], box[3]))
    text = f"({int((left + right) / 2)}, {int((top + bottom) / 2)})"
    return {"text": text, "box": [left, top, right, bottom]}
