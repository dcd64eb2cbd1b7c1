r"""The answer within a text, and whether two are the same: for votes, agreement and scores.

"exact" takes the whole text. "math" takes the last \boxed{...}; without one, what follows the last "answer is" or
"answer:"; without that, the last number; and numbers are the same if their values are. A judge that proves algebraic
identities is none of it.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Literal

Matching = Literal["exact", "math"]

_SAYS = re.compile(r"answer(?:\s+is|\s*:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d(?:[\d,]*\d)?(?:\.\d+)?(?:\s*/\s*\d+)?")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")


def extract(text: str, matching: Matching) -> str:
    """The answer as it is written; empty where there is none."""
    text = text.strip()
    if matching == "exact":
        return text
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    said = _SAYS.findall(text)
    if said:
        return said[-1].strip().rstrip(".").strip("*").strip()
    numbers = _NUMBERS_OUTSIDE_WORDS.findall(text)
    return numbers[-1].strip() if numbers else text


_NUMBERS_OUTSIDE_WORDS = re.compile(r"(?<![\w.])" + _NUMBER.pattern + r"(?!\w)")


def canonical(answer: object, matching: Matching) -> Hashable:
    """Equal for answers that are the same."""
    if matching == "exact":
        return str(answer).strip()
    text = str(answer).strip()
    boxed = _last_boxed(text)
    text = boxed if boxed is not None else text
    text = _TEXT.sub(r"\1", text.strip("$ ").replace("\\left", "").replace("\\right", "").replace("\\!", ""))
    text = _FRACTION.sub(r"\1\2/\3", text).replace("\\,", "").replace("\\%", "").rstrip(". ").replace("\\$", "")
    value = _value(text)
    return value if value is not None else re.sub(r"\s+", "", text).lower()


def is_right(text: str, ground_truth: object, matching: Matching) -> bool:
    """Whether a text answers as it should; `ground_truth` may be a list of answers that are all right."""
    answer = canonical(extract(text, matching), matching)
    truths = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    return any(answer == canonical(truth, matching) for truth in truths)


def plurality(texts: Sequence[str], matching: Matching) -> tuple[int, int]:
    """The first text whose answer is the most frequent one, and how many have that answer. Texts without an answer have
    no say; of answers that are as frequent, the one that comes first.

    Returns:
        Index and votes; (0, 0) if no text has an answer.
    """
    answers = [extract(text, matching) for text in texts]
    keys = [canonical(answer, matching) for answer in answers]
    votes = Counter(key for key, answer in zip(keys, answers, strict=True) if answer)
    if not votes:
        return 0, 0
    best = max(votes.values())
    index = next(i for i, (key, answer) in enumerate(zip(keys, answers, strict=True)) if answer and votes[key] == best)
    return index, best


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[begin:i].strip()
    return None


def _value(text: str) -> Fraction | None:
    text = text.replace(" ", "")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
