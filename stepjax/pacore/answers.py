r"""Extracts answers from texts and compares them, for votes, agreement and scores.

"exact" takes the whole text. "math" takes the last \boxed{...}; else what follows the last "####", "answer is" or
"answer:", up to the next prose; else the whole text if it is a number, or the last number in it. Only the last 100,000
characters are searched. `same_answer` compares two answers.
"""

import asyncio
import functools
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from stepjax.pacore.same_answer import normalised, same

Matching = Literal["exact", "math"]
T = TypeVar("T")

_log = logging.getLogger(__name__)
_MOST_SEARCHED = 100_000
_MOST_UNKNOWN = 4  # undecided comparisons after which a vote stops calling math-verify

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_SAYS = re.compile(
    r"####|\banswer(?:\s+is|\s*[:=])\s*:?(?:\s*(?:approximately|about|roughly|exactly|option|choice)\b)?", re.IGNORECASE
)
_DISPLAYED = re.compile(r"\\\[(.*?)\\\]|\$\$(.*?)\$\$", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.])-?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?(?:\s*\\?%|(?![\w/]))"  # also 1,2 and 1/2
)
_NUMERIC = re.compile(r"[\s\d.,$\\%()\[\]{}/*^+-]*\d[\s\d.,$\\%()\[\]{}/*^+-]*|\\frac.*|\$[^$]*\$")
# Where prose begins after a formula or a number: the sentence ends, or a word follows.
_PROSE = re.compile(
    r"[.!?](?=\s|$)|[,;:]\s+(?!and\b|or\b)(?=[A-Za-z]{2,})|\s+(?:because|since|so|which|where|as|hence|thus|therefore|when|"
    r"if|for|with|in\s+total|altogether|i\s+hope)\b|\s+[(](?=[A-Za-z]{2})",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=\w{3})[.!?]\s+(?=[A-Z])")


def extract(text: str, matching: Matching) -> str:
    """The answer as written; empty if there is none."""
    text = text.strip()
    if matching == "exact":
        return text
    text = text[-_MOST_SEARCHED:]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    said = _last(_SAYS, text)
    if said is not None:
        after = text[said.end() :].strip(" \t*_").lstrip()
        displayed = _DISPLAYED.match(after)
        if displayed:
            return (displayed[1] or displayed[2] or "").strip().rstrip(".")
        return _without_prose(after.partition("\n")[0])
    if len(text) <= 200 and _NUMERIC.fullmatch(text):
        return text
    number = _last(_NUMBER, text)
    return text if number is None else number[0].strip()


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
    is_known = True
    for truth in map(str, truths):
        verdict = same(_of_truth(truth), answer)
        if verdict:
            return True
        if verdict is None:
            is_known = False
            _tell(truth[:200])
    return False if is_known else None


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


@functools.lru_cache(maxsize=1024)
def _tell(truth: str) -> None:
    """Logs each truth once."""
    _log.warning(
        "ground_truth %r: cannot be parsed, or comparing an answer with it took too long; such answers count as "
        "neither right nor wrong",
        truth,
    )


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _of_truth(truth: str) -> str:
    boxed = _last_boxed(truth)
    return boxed if boxed is not None else truth.rpartition("####")[2]


def _last_boxed(text: str) -> str | None:
    if "box" not in text:
        return None
    best: tuple[int, int] | None = None
    opened: list[tuple[int, bool]] = []  # where each brace's content begins, and whether it is a box's
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and match[0] != "\\{":
            opened.append((match.end(), len(match[0]) > 1))
        elif match[0] == "}" and opened:
            begin, is_box = opened.pop()
            if is_box and (best is None or begin > best[0]):
                best = begin, match.start()
    return None if best is None else text[best[0] : best[1]].strip()


def _without_prose(text: str) -> str:
    """Cuts a formula or number at the prose after it; a text after its first sentence."""
    text = " ".join(text.split())
    is_formula = re.match(r"[*_\s]*(?:[-+$\\(\[{]|\.?\d|[A-Za-z]\s*(?:=|[,.]\s|$))", text) is not None
    end = (_PROSE if is_formula else _SENTENCE).search(text)
    return (text[: end.start()] if end else text).strip().rstrip(".").strip("*").strip()
