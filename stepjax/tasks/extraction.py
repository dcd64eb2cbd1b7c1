r"""Finds the answer in a text: one function per kind of answer.

A text may state its answer: the last \boxed{...}; else what follows the last "####", "answer is" or "answer:", up to
the next prose. Otherwise the whole text is searched, and an answer counts only if there is exactly one of its kind: a
text that names several possible answers has none. (Except for `math_answer`, which takes the last number.) Only the
last 100,000 characters are searched.
"""

import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

from stepjax.tasks import units
from stepjax.tasks.same_answer import normalised, split_items, value_of

_MOST_SEARCHED = 100_000
_MOST_ITEMS = 1000
T = TypeVar("T")

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

_DECIMAL = r"[-+]?(?:\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})"
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,400})"
_LITERAL = re.compile(
    rf"[-+]?\s?(?:{_WHOLE}?(?:\.\d{{0,400}})?(?:[eE][-+]?\d{{1,3}})?(?:\s?\*\s?10\s?\^\s?\{{?-?\d{{1,3}}\}}?)?"
    rf"|(?:{_WHOLE}\s)?{_WHOLE}\s?/\s?{_WHOLE}|(?:{_WHOLE}\s?)?\\frac\s?\{{\s?{_WHOLE}\s?\}}\s?\{{\s?{_WHOLE}\s?\}})\s?%?",
    re.ASCII,
)
_QUANTITY = re.compile(
    r"(?<![\w.,/^-])([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30})(?:[eE][-+]?\d{1,3})?"
    r"(?:\s?/\s?\d{1,30})?)(?![\w/]*\d|[.,]\d)(\s?%|\s?[A-Za-z\u00b5\u03bc\u03a9\u00b0][A-Za-z/*^23\u00b2\u00b3]*)?",
    re.ASCII,
)
_UNIT = r"[A-Za-z\u00b5\u03bc\u03a9]+\.?[\u00b2\u00b3]?(?:\s?\^\s?\{?-?[1-9]\}?|-?[1-9])?"
_MEASURED = re.compile(rf"(.*[\d)}}])(\s*)({_UNIT}(?:\s?[/*]\s?{_UNIT}|\s{_UNIT})*)")
_INTEGER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,30})", re.ASCII)
_WORDS: Sequence[str] = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_COUNTED = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
_LETTER = r"([A-Za-z])"
_OPTION = re.compile(rf"(?:option|choice)?\s*[(\[]?{_LETTER}[)\]]?(?:[.:]?$|[.):\]]\s+\S.*)", re.ASCII | re.IGNORECASE)
_MENTIONED = re.compile(rf"(?<!\w)\({_LETTER}\)|\b(?:option|choice)\s+(?:is\s*:?\s*)?\(?([A-Z])\b", re.ASCII)
_DENIES = re.compile(r"\b(?:not|neither|except)\b|n't\b", re.IGNORECASE)
_POINT = re.compile(r"(?<!\w)\(\s*(0|[1-9]\d{0,4})(\.\d{1,9})?\s*,\s*(0|[1-9]\d{0,4})(\.\d{1,9})?\s*\)(?!\w)", re.ASCII)
_BOX = re.compile(r"(?<!\w)[\[(]\s*" + r"\s*,\s*".join([f"({_DECIMAL})"] * 4) + r"\s*[\])](?!\w)", re.ASCII)
_FENCED = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_BULLET = re.compile(r"\s*(?:[-*\u2022]|\d{1,3}[.)])\s+(.*)")


def answer_text(text: str) -> str:
    """The text without reasoning and surrounding white space."""
    return text.rpartition("</think>")[2].strip()


def math_answer(text: str) -> str:
    """As stated; else the whole text if it is a number, else the last number in it, else the whole text."""
    text = text[-_MOST_SEARCHED:].strip()
    answer = stated(text)
    if answer is not None:
        return answer
    if len(text) <= 200 and _NUMERIC.fullmatch(text):
        return text
    number = _last(_NUMBER, text)
    return text if number is None else number[0].strip()


def stated(text: str) -> str | None:
    """The answer that a text states, as written."""
    text = text[-_MOST_SEARCHED:]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    said = _last(_SAYS, text)
    if said is None:
        return None
    after = text[said.end() :].strip(" \t*_").lstrip()
    displayed = _DISPLAYED.match(after)
    if displayed:
        return (displayed[1] or displayed[2] or "").strip().rstrip(".")
    return _without_prose(after.partition("\n")[0])


def choice(text: str, choices: Iterable[str] = ()) -> str | None:
    """The capital letter of the option named.

    Args:
        choices: texts of the options A, B, ...; an answer may repeat one of them instead.
    """
    answer = _stated_or_all(text)
    text = normalised(answer)
    option = _OPTION.fullmatch(text)
    if option:
        return option[1].upper()
    repeated = {i for i, each in enumerate(choices) if normalised(each).casefold() == text.casefold()}
    if repeated:
        return chr(ord("A") + repeated.pop()) if len(repeated) == 1 else None
    if _DENIES.search(answer):
        return None
    return _only({next(filter(None, match.groups())).upper() for match in _MENTIONED.finditer(answer)})


def quantity(text: str) -> tuple[Fraction, str] | None:
    """A number and its unit as written, which may be empty. In prose only units that `units` knows count as units."""
    answer = _stated_or_all(text)
    if _FOREIGN_DIGIT.search(answer):
        return None
    if len(answer) < 1000:
        whole = normalised(answer)
        number = _number(whole)
        if number is not None:
            return number, ""
        measured = _MEASURED.fullmatch(whole)
        if measured and (measured[2] or units.is_known(measured[3])) and (number := _number(measured[1])) is not None:
            return number, measured[3]
    match = _only(_QUANTITY.finditer(answer))
    number = match and _number(match[1])
    if match is None or number is None:
        return None
    unit = (match[2] or "").strip()
    if unit == "%":
        return number / 100, ""
    if unit and unit == match[2] and not units.is_known(unit):  # 5x
        return None
    ends = not answer[match.end() :].strip() or answer[match.end()] in ".,;:)"
    return number, unit if units.is_known(unit) and (ends or unit != "in") else ""


def whole_number(text: str) -> int | None:
    """A whole number in digits, or as a word up to twenty."""
    answer = _stated_or_all(text)
    if re.search(r"\d", answer):
        match = _only(re.finditer(r"[\w.,/-]*\d[\w.,/]*", answer))
        number = match and _INTEGER.fullmatch(match[0].rstrip(".,"))
        return int(number[0].replace(",", "")) if number else None
    return _only(_WORDS.index(match[0].lower()) for match in _COUNTED.finditer(answer))


def items(text: str) -> tuple[str, ...]:
    """The items of a list: a JSON array, one a line with bullets, or separated by commas, "and", "or" or line ends."""
    said = _last(_SAYS, text[-_MOST_SEARCHED:])
    boxed = last_boxed(text[-_MOST_SEARCHED:])
    rest = text[-_MOST_SEARCHED:] if said is None else text[-_MOST_SEARCHED:][said.end() :]
    bullets = [match[1].strip() for match in map(_BULLET.fullmatch, rest.splitlines()) if match]
    if bullets and boxed is None:
        return tuple(bullets[:_MOST_ITEMS])
    answer = _stated_or_all(text)
    if len(answer) > 10_000:
        return ()
    if answer.startswith("["):
        try:
            return tuple(each if isinstance(each, str) else json.dumps(each) for each in json.loads(answer))
        except (ValueError, RecursionError):
            pass
    lines = tuple(line.strip() for line in answer.splitlines() if line.strip())
    return lines if len(lines) > 1 else split_items(normalised(answer))[0]


def point(text: str) -> tuple[float, float] | None:
    """The x and y of "(x, y)". A coordinate without decimals is the middle of its cell: 12 is 12.5."""
    found = _POINT.finditer(text[-_MOST_SEARCHED:])
    return _only(tuple(float(a + (b or ".5")) for a, b in (match.group(1, 2), match.group(3, 4))) for match in found)  # type: ignore


def box(text: str) -> tuple[float, float, float, float] | None:
    """The left, top, right and bottom of "[l, t, r, b]"."""
    return _only(tuple(map(float, match.groups())) for match in _BOX.finditer(text[-_MOST_SEARCHED:]))  # type: ignore


def program(text: str) -> str:
    """The last fenced block of Python code, else the whole text."""
    block = _last(_FENCED, text[-_MOST_SEARCHED:])
    return text if block is None else block[1]


def last_boxed(text: str) -> str | None:
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


def _stated_or_all(text: str) -> str:
    answer = stated(text)
    return text[-_MOST_SEARCHED:].strip() if answer is None else answer


def _number(text: str) -> Fraction | None:
    """The value of a literal, in normalised notation. A sum, or a quotient that comes out even, may be the question."""
    if not _LITERAL.fullmatch(text.strip()):
        return None
    number = value_of(text)
    is_quotient = "/" in text or "frac" in text
    return None if number is not None and is_quotient and number.denominator == 1 else number


def _only(found: Iterable[T]) -> T | None:
    """The one that was found; None if there are none or several."""
    first = list(itertools.islice(found, 2))
    return first[0] if len(first) == 1 else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _without_prose(text: str) -> str:
    """Cuts a formula or number at the prose after it; a text after its first sentence."""
    text = " ".join(text.split())
    is_formula = re.match(r"[*_\s]*(?:[-+$\\(\[{]|\.?\d|[A-Za-z]\s*(?:=|[,.]\s|$))", text) is not None
    end = (_PROSE if is_formula else _SENTENCE).search(text)
    return (text[: end.start()] if end else text).strip().rstrip(".").strip("*").strip()
