"""Extracts answers from texts and compares them, for votes, agreement and scores.

"exact" takes the whole text; "math" is `tasks.extraction.math_answer`. `tasks.same_answer` compares two answers.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from stepjax.tasks.extraction import math_answer
from stepjax.tasks.gold import same_as_any
from stepjax.tasks.same_answer import normalised, same

Matching = Literal["exact", "math"]
T = TypeVar("T")

_MOST_UNKNOWN = 4  # undecided comparisons after which a vote stops calling math-verify


def extract(text: str, matching: Matching) -> str:
    """The answer as written; empty if there is none."""
    return text.strip() if matching == "exact" else math_answer(text)


def judge(text: str, ground_truth: object, matching: Matching) -> bool | None:
    """Whether a text has the right answer; None if undecided, which is logged.

    Args:
        ground_truth: an answer, or a list of accepted answers.

    Raises:
        ConfigError: math-verify is not installed.
    """
    answer = extract(text, matching)
    if not answer:
        return False
    truths = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    if matching == "exact":
        return any(answer == str(truth).strip() for truth in truths)
    return same_as_any(answer, map(str, truths))


def is_right(text: str, ground_truth: object, matching: Matching) -> bool:
    """See `judge`; False if undecided."""
    return judge(text, ground_truth, matching) is True


def grouped(answers: Sequence[str], matching: Matching) -> list[int | None]:
    """For each answer, the index of the first equal one; None for an empty answer."""
    made: list[int | None] = []
    firsts: dict[str, int] = {}  # normalised answer -> group
    unknown = 0
    for i, answer in enumerate(answers):
        written = answer.strip() if matching == "exact" else normalised(answer)
        if not written:
            made.append(None)
            continue
        group = firsts.get(written)
        for first in () if group is not None or matching == "exact" else dict.fromkeys(firsts.values()):
            verdict = same(answers[first], answer, asks=unknown < _MOST_UNKNOWN)
            unknown += verdict is None
            if verdict:
                group = first
                break
        group = i if group is None else group
        firsts[written] = group
        made.append(group)
    return made


def plurality(texts: Sequence[str], matching: Matching) -> tuple[int, int]:
    """The first text with the most frequent answer. Texts without an answer do not vote; ties go to the first.

    Returns:
        Index and votes; (0, 0) if no text has an answer.
    """
    groups = grouped([extract(text, matching) for text in texts], matching)
    votes = Counter(group for group in groups if group is not None)
    # Groups, and so equal counts, are in the order of their first texts.
    return votes.most_common(1)[0] if votes else (0, 0)


_threads = ThreadPoolExecutor(4, "answers")


async def in_thread(compare: Callable[..., T], *arguments: Any) -> T:
    """Runs a comparison in a thread: it may take seconds, and other calls continue meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(_threads, compare, *arguments)
