r"""Compares two mathematical answers: normalisation, exact types, and math-verify for the rest.

- Rational numbers are compared exactly: 1/2, \frac{1}{2}, .5 and 50% are equal, 33.3 and 100/3 are not.
- A number with a unit equals the bare number but not the number with another unit; units are not converted.
- Lists, tuples, intervals and sets must have equally many, pairwise equal items. The order counts in round and square
  brackets, but not in braces or without brackets. `1,234` is a number, `1,2` and `1, 234` are lists.
- An option, `(B)` or `B. Paris`, is compared by its letter.
- Words are compared case-insensitively.
- Equations are equal if they agree up to a factor. `x = 5` equals 5, but not `y = 5`.
"""

import ast
import dataclasses
import functools
import operator
import re
from collections.abc import Iterable
from fractions import Fraction

from stepjax.tasks import math_judge

# Longer answers are compared literally.
_MOST_CHARACTERS, _MOST_ITEMS = 1000, 32
_MOST_BITS = 100_000  # of a power

_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname|boldsymbol)\{([^{}]*)\}"
)
_REWRITTEN = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"(?<!\S)\*\*([^*]+)\*\*", r"\1"),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[()\[\]]|\\?\$", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"(?<![\\\w])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\\w])pi(?!\w)|\u03c0", r"\\pi "),
        (r"(?<![\\\w])(?:infinity|inf)(?!\w)|\u221e", r"\\infty "),
        (r"\{,\}|,\\!", ","),
        (r"\\%|\s*\bpercent\b", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|\u00b0|\s+degrees?\b", " "),
        (r"\\cdot(?![a-zA-Z])|\\times(?![a-zA-Z])|\u00d7|\u00b7", "*"),
        ("[\u2212\u2013]", "-"),
        (r"(?<![\d.,])\d{1,3}(?:(?:\\[,! ]|~|\s)\d{3})+(?![\d/])", lambda match: re.sub(r"\D", "", match[0])),
        (r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\*\*", "^"),
    )
]
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_DECIMAL = re.compile(r"(?<![\w.])(?:(\d+)(?:\.(\d*))?|\.(\d+))(?:[eE]([+-]?\d{1,3}))?(?![\w.])")
_MIXED = re.compile(r"(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\})|(?<![\d/])(\d+) (\d+/\d+)(?!\d)")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(.*[\d)}%])(?:\s+(?=[A-Za-z])|(?=(?:[kcmdn]m|[km]g|k?Hz|m[lL]|min|mol|hrs?)\b))"
    r"((?:[A-Za-z]{3,}\.?|[kcmdn]?m|[km]?g|m?s|hr?|hrs|ft|in|mi|yd|lb|oz|m?[lLVAW]|[NJCFK]|k?Hz|k?Pa|e?V)"
    r"(?:(?:\s+|/|\s+per\s+)[A-Za-z]+)*(?:\s?\^?\{?[23]\}?)?)"
)
_ASSIGNED = re.compile(r"(\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]*\))?)\s*(?:=|\\in(?![a-zA-Z]))\s*([^=]+)")
_OPTION = re.compile(r"\(?([A-Ja-j])\)?(?:$|[.):]\s*(?:\S.*)?$|(?<=\))\s.*$)")
_EXPRESSION = re.compile(r"[\\^_{}=+*/<>]")
_WORD = re.compile(r"[^\W\d_]{3,}")
_OPENING, _CLOSING = {"(": "(", "[": "[", "{": "{", "\\{": "{"}, {")": ")", "]": "]", "}": "}", "\\}": "}"}


def same(gold: str, answer: str, *, asks: bool = True) -> bool | None:
    """
    Args:
        asks: call math-verify if nothing else decides.

    Returns:
        None if undecided.
    """
    return _same(normalised(gold), normalised(answer), asks, depth=0)


def normalised(text: str) -> str:
    """The text in a canonical notation, without commands that only change its looks."""
    text = " ".join(text.split())
    if len(text) > 4 * _MOST_CHARACTERS:
        return text
    for _ in range(4):  # fonts within fonts
        text, count = _FONT.subn(r" \1 ", text)
        if not count:
            break
    for pattern, by in _REWRITTEN:
        text = pattern.sub(by, text)
    return " ".join(text.split()).rstrip(" .,;:*_").lstrip(" ,;:*_")


@dataclasses.dataclass(frozen=True)
class Reading:
    """
    Attributes:
        text: the value as text.
        name: the variable it is assigned to, if any.
        option: the letter of an option.
        brackets: around the items, e.g. "(]".
    """

    text: str
    name: str = ""
    option: str = ""
    number: Fraction | None = None
    unit: str = ""
    items: tuple[str, ...] = ()
    brackets: str = ""

    @property
    def is_words(self) -> bool:
        return not _EXPRESSION.search(self.text) and _WORD.search(self.text) is not None

    @property
    def is_equation(self) -> bool:
        return self.text.count("=") == 1 and not re.search(r"[<>!]|\\(?:leq?|geq?|neq?)(?![a-zA-Z])", self.text)


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """What a normalised text says."""
    assigned, name = _ASSIGNED.fullmatch(text), ""
    if assigned:
        name, text = assigned[1], assigned[2].strip()
    option = _OPTION.fullmatch(text)
    if option:
        return Reading(text, name, option=option[1].upper())
    equals = text.rpartition("=")
    if equals[1] and value_of(equals[0].rpartition("=")[2]) is not None:  # 72/3 = 24
        text = equals[2].strip()
    number = value_of(text)
    if number is not None:
        return Reading(text, name, number=number)
    measured = _UNIT.fullmatch(text)
    if measured and (number := value_of(measured[1])) is not None:
        return Reading(text, name, number=number, unit=_unit(measured[2]))
    items, brackets = split_items(text)
    if len(items) == 1 and brackets and items[0]:
        return dataclasses.replace(read(items[0]), name=name)
    return Reading(text, name, items=items if len(items) > 1 else (), brackets=brackets)


def _same(gold: str, answer: str, asks: bool, depth: int) -> bool | None:
    if _plain(gold) == _plain(answer):
        return True
    if len(gold) > _MOST_CHARACTERS or len(answer) > _MOST_CHARACTERS or depth > 3:
        return False
    a, b = read(gold), read(answer)
    if a.name and b.name and a.name != b.name:
        return False
    if _plain(a.text) == _plain(b.text):
        return True
    if a.option and b.option:
        return a.option == b.option
    for one, other in ((a, b), (b, a)):
        if one.option and (other.number is not None or other.items or other.is_words):
            return False
    if a.number is not None and b.number is not None:
        return a.number == b.number and (not a.unit or not b.unit or a.unit == b.unit)
    if a.items and b.items:
        return _same_items(a, b, asks, depth)
    # `1,234` may have been meant as a list.
    if a.items and b.number is not None:
        return _same_items(a, _regrouped(b), asks, depth)
    if b.items and a.number is not None:
        return _same_items(_regrouped(a), b, asks, depth)
    if a.is_words or b.is_words:
        return False
    if a.is_equation or b.is_equation:
        texts = [each.text if each.is_equation else f"{each.name}={each.text}" for each in (a, b)]
        if any(text.startswith("=") for text in texts):
            return False
        sides = ["({})-({})".format(*text.split("=")) for text in texts]
        return math_judge.equivalent(*sides, up_to_factor=True) if asks else None
    return math_judge.equivalent(a.text, b.text) if asks else None


def _regrouped(of: Reading) -> Reading:
    items, brackets = split_items(of.text, groups=False)
    return dataclasses.replace(of, items=items, brackets=brackets)


def same_items(gold: Iterable[str], answer: Iterable[str], *, is_ordered: bool) -> bool | None:
    """
    Returns:
        None if undecided.
    """
    a, b = (tuple(map(normalised, items)) for items in (gold, answer))
    if max(len(a), len(b)) > _MOST_ITEMS:
        a, b = ([_plain(each) for each in items] for items in (a, b))
        return a == b if is_ordered else sorted(a) == sorted(b)
    brackets = "()" if is_ordered else ""
    return _same_items(Reading("", items=a, brackets=brackets), Reading("", items=b, brackets=brackets), True, 0)


def _same_items(a: Reading, b: Reading, asks: bool, depth: int) -> bool | None:
    if len(a.items) != len(b.items) or len(a.items) > _MOST_ITEMS:
        return False
    if a.brackets and b.brackets and a.brackets != b.brackets:
        return False
    if {a.brackets, b.brackets} - {"", "{}"}:
        return _all(_same(*pair, asks, depth + 1) for pair in zip(a.items, b.items, strict=True))
    left, is_known = list(b.items), True
    for item in a.items:
        verdicts = []
        for other in left:
            verdicts.append(_same(item, other, asks, depth + 1))
            if verdicts[-1]:
                left.remove(other)
                break
        else:
            if None not in verdicts:
                return False
            is_known = False
    return True if is_known else None


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    is_known = True
    for verdict in verdicts:
        if verdict is False:
            return False
        is_known &= verdict is not None
    return True if is_known else None


def _plain(text: str) -> str:
    text = re.sub(r"\s+", "", text)
    return text if _EXPRESSION.search(text) else text.casefold()


def _unit(text: str) -> str:
    text = re.sub(r"[\s{}^.]", "", text)
    return text.casefold().rstrip("s") if len(text) > 3 else text


def split_items(text: str, *, groups: bool = True) -> tuple[tuple[str, ...], str]:
    """Splits at commas, semicolons, "and" and "or"; also returns the brackets around the whole.

    Args:
        groups: read `1,234` as one number.
    """
    if "\\begin" in text:
        return (text,), ""
    opening = next((each for each in ("\\{", "(", "[", "{") if text.startswith(each)), None)
    closing = next((each for each in ("\\}", ")", "]", "}") if text.endswith(each)), None)
    if opening and closing and len(text) >= len(opening) + len(closing):
        inner = text[len(opening) : -len(closing)]
        if _is_balanced(inner):
            return split_items(inner, groups=groups)[0], _OPENING[opening] + _CLOSING[closing]
    if groups:
        text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    parts, depth, begin = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|,(?:\s*(?:and|or)\s)?|;|\s(?:and|or)\s", text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif not depth:
            parts.append(text[begin : match.start()].strip())
            begin = match.end()
    return (*parts, text[begin:].strip()), ""


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return not depth


# Exact arithmetic.


def value_of(text: str) -> Fraction | None:
    """The value of a number or an arithmetic expression, else None."""
    if not re.search(r"\d", text) or len(text) > _MOST_CHARACTERS:
        return None
    text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    text = _MIXED.sub(lambda match: f"({match[1] or match[3]}+{match[2] or match[4]})", text)
    for _ in range(8):
        text, count = _FRACTION.subn(r"((\1)/(\2))", text)
        if not count:
            break
    percent = text.endswith("%")
    text = _DECIMAL.sub(_as_ratio, text.removesuffix("%").replace("{", "(").replace("}", ")").replace("^", "**"))
    if not re.fullmatch(r"[\d\s+\-*/()]+", text):
        return None
    try:
        value = _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return None if value is None else value / 100 if percent else value


def _as_ratio(match: re.Match[str]) -> str:
    whole, places, exponent = match[1] or "0", match[2] or match[3] or "", int(match[4] or 0)
    if not places and not exponent:
        return str(int(whole))
    shift = exponent - len(places)
    digits = int(whole + places)
    return f"({digits * 10**shift})" if shift >= 0 else f"({digits}/{10**-shift})"


_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def _evaluated(node: ast.expr) -> Fraction | None:
    """None if it is not arithmetic or too large."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluated(node.operand)
        return value if value is None or isinstance(node.op, ast.UAdd) else -value
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _evaluated(node.left), _evaluated(node.right)
    operation = _OPERATIONS.get(type(node.op))
    if left is None or right is None or operation is None or _bits(left) + _bits(right) > _MOST_BITS:
        return None
    if operation is operator.pow and (right.denominator != 1 or _bits(left) * abs(right.numerator) > _MOST_BITS):
        return None
    return operation(left, right)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()
