"""Whether an answer is right, the accuracy of guessing, and the confidence interval of a measured accuracy."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from stepjax.config import DigitsSource
from stepjax.data.digits import arithmetic_problems, num_digits_distribution, solve
from stepjax.errors import RecordError
from stepjax.figures import wilson_interval

_POINT = re.compile(r"\(\s*(\d{1,2})\s*,\s*(\d{1,2})\s*\)")
_RECEIPT = re.compile(r"((?:[A-Z]\d)+) (ok|bad)")


def score(record: dict[str, Any], text: str) -> bool:
    """Whether `text` answers the record: without reasoning and surrounding white space, it must equal an answer.

    A point "(x, y)" is right if it falls inside the box of the digit's ink. Its integers are hundredths of the image's
    width and height, and we test the middle of that cell.

    A receipt is right if all its labelled digits are, whether or not it says that the check came out: a reward for the
    verdict would teach the model to say "ok" always.

    Raises:
        RecordError: the record has no answer.
    """
    text = text.rpartition("</think>")[2].strip()
    if record.get("task") in ("ledger", "receipt", "misprint"):
        right = [parse_receipt(answer) for answer in answers(record)]
        if None in right:
            problem = f"answer={record.get('answer')!r}: a receipt's is labelled digits and a verdict, 'A7B5 ok'"
            raise RecordError(f"record {record.get('id')!r} has {problem}")
        found = parse_receipt(text)
        return found is not None and found.digits in [each.digits for each in right if each]
    if record.get("task") != "point":
        return text in answers(record)
    answer = record.get("answer")
    if not isinstance(answer, dict) or "box" not in answer:
        raise RecordError(f"record {record.get('id')!r} has answer={answer!r}: a point needs a dict with 'box'")
    point = parse_point(text)
    if point is None:
        return False
    left, top, right, bottom = answer["box"]
    x, y = point[0] + 0.5, point[1] + 0.5
    return left <= x <= right and top <= y <= bottom


def answers(record: dict[str, Any]) -> tuple[str, ...]:
    """The right answers: `answer` (a text, a list of texts, or a dict with `text`), else the last assistant turn.

    Raises:
        RecordError: the record has neither.
    """
    answer = record.get("answer")
    if answer is None and is_question(record):
        answer = record["messages"][-1].get("content")
        if isinstance(answer, list):  # of text items, unless it is malformed
            answer = "".join(str(item.get("text", "")) for item in answer if isinstance(item, dict))
        answer = answer if answer is None else str(answer).rpartition("</think>")[2]
    texts = [answer.get("text")] if isinstance(answer, dict) else answer if isinstance(answer, list) else [answer]
    right = tuple(text.strip() for text in texts if isinstance(text, str))
    if not right or len(right) < len(texts):
        raise RecordError(
            f"record {record.get('id')!r} has answer={answer!r}: give a text or a list of texts, or omit it if the "
            "last assistant turn is the answer"
        )
    return right


def is_question(record: dict[str, Any]) -> bool:
    """Whether the record is a conversation that ends with an assistant turn: the answer wanted from the model."""
    messages = record.get("messages")
    return isinstance(messages, list) and bool(messages) and messages[-1].get("role") == "assistant"


def parse_point(text: str) -> tuple[int, int] | None:
    """The x and y of "(x, y)", each 0..99; None if the stripped text is anything else."""
    match = _POINT.fullmatch(text.strip())
    return (int(match[1]), int(match[2])) if match else None


class Receipt(NamedTuple):
    digits: str  # labels and digits: "A7B5C1"
    is_ok: bool  # whether the message says that the check came out


def parse_receipt(text: str) -> Receipt | None:
    """The parts of "A7B5C1 ok"; None if the stripped text is anything else."""
    match = _RECEIPT.fullmatch(text.strip())
    return Receipt(match[1], match[2] == "ok") if match else None


def chance_level(source: DigitsSource) -> float:
    """The accuracy of guessing without the image or the question, computed from the task's distribution.

    - transcribe, count, add, arithmetic, and receipts of any kind: the best constant guess. All strings of n digits are
      equally likely, so that is 1 in 1000 for three-digit transcriptions; for sums it is the most frequent sum.
    - point: the centre of a random one of the n digits in the image: the mean of 1 / n. (This guess sees where the ink
      is but not which digit it is. Every constant point does worse.)
    """
    distribution = num_digits_distribution(source)
    match source.task:
        case "transcribe" | "ledger" | "receipt" | "misprint":
            return max(probability / 10**n for n, probability in distribution.items())
        case "count":
            return max(distribution.values())
        case "add":
            ways = {n: _ways_to_sum(n) for n in distribution}
            return max(
                sum(probability * ways[n][total] / 10**n for n, probability in distribution.items())
                for total in range(9 * max(distribution) + 1)
            )
        case "point":
            return sum(probability / n for n, probability in distribution.items())
        case "arithmetic":
            answers = Counter(solve(problem) for problem in arithmetic_problems(source.split))
            return max(answers.values()) / answers.total()


def _ways_to_sum(num_digits: int) -> Counter[int]:
    """The number of ways in which `num_digits` digits 0..9 add up to each sum."""
    ways = Counter({0: 1})
    for _ in range(num_digits):
        ways = Counter({s: sum(ways[s - digit] for digit in range(10)) for s in range(max(ways) + 10)})
    return ways


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The score on one source. Proportions are 0..1."""

    name: str
    correct: int
    total: int
    chance: float | None = None  # accuracy of guessing; None if it has no meaning
    loss: float | None = None  # of its documents, in nats per token; None without documents

    @property
    def accuracy(self) -> float:
        """NaN without questions."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.total)


def summary_table(results: Sequence[TaskResult]) -> str:
    """An aligned text table: a header, then one line per result with percentages and the loss, if measured."""
    rows = [["task", "right", "accuracy", "95 % interval", "chance", "loss"]]
    for result in results:
        low, high = result.interval
        chance = "-" if result.chance is None else f"{100 * result.chance:.1f} %"
        loss = "-" if result.loss is None else f"{result.loss:.4f}"
        scores = [f"{result.correct}/{result.total}", f"{100 * result.accuracy:.1f} %"]
        scores += [f"{100 * low:.1f} to {100 * high:.1f} %"]
        rows.append([result.name, *(scores if result.total else "---"), chance, loss])
    if all(result.loss is None for result in results):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(map("  ".join, lines))
