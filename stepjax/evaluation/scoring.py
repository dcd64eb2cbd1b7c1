"""The accuracy of guessing, and the confidence interval of a measured accuracy."""

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence

from stepjax.config import DigitsSource, DocumentsSource
from stepjax.data.digits import arithmetic_problems, num_digits_distribution, solve
from stepjax.data.documents import DIGITS, MOST_MARKS
from stepjax.data.documents_render import SHAPES
from stepjax.figures import wilson_interval


def chance_level(source: DigitsSource) -> float:
    """The accuracy of guessing without the image or the question, computed from the task's distribution.

    - transcribe, count, add, arithmetic, and receipts of any kind: the best constant guess. All strings of n digits are
      equally likely, so that is 1 in 1000 for three-digit transcriptions; for sums it is the most frequent sum.
    - point: the centre of a random one of the n digits in the image: the mean of 1 / n. (This guess sees where the ink
      is but not which digit it is. Every constant point does worse.)
    """
    distribution = num_digits_distribution(source)
    match source.task:
        case (
            "transcribe" | "ledger" | "smudged" | "receipt" | "misprint" | "printed" | "synthesis" | "ledger_synthesis"
        ):
            return max(probability / 10**n for n, probability in distribution.items())
        case "prefer":
            return 0.5
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


def documents_chance_level(source: DocumentsSource) -> float:
    """The same for pages: the best constant guess; for points, the centre of a random mark."""
    match source.task:
        case "read":  # a training page has shorter numbers, equally often
            return 10**-DIGITS if source.split == "held_out" else 0.1 / DIGITS
        case "count":
            return 1 / MOST_MARKS
        case "point":
            others = itertools.product(range(1, MOST_MARKS + 1), repeat=len(SHAPES) - 1)
            return statistics.fmean(1 / (1 + sum(counts)) for counts in others)


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
