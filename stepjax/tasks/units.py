"""Units of measurement, compared by dimension and size: 5 km is 5000 m, 36 km/h is 10 m/s, and 5 m is not 5 kg.

A unit that the table lacks is a dimension of its own, without its plural: 3 apples are 3 apple, but not 3 pears.
Temperatures are not converted.
"""

import functools
import re
from collections import Counter
from fractions import Fraction

_PREFIXES = {"n": -9, "\u00b5": -6, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12}
_PREFIX_WORDS = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}

# Symbols and names that take a prefix, in SI base units.
_PREFIXED = {
    **dict.fromkeys(("m", "meter", "metre"), (1, "m")),
    **dict.fromkeys(("g", "gram"), ("1/1000", "kg")),
    **dict.fromkeys(("s", "second"), (1, "s")),
    **dict.fromkeys(("A", "ampere", "amp"), (1, "A")),
    **dict.fromkeys(("mol", "mole"), (1, "mol")),
    **dict.fromkeys(("l", "L", "liter", "litre"), ("1/1000", "m^3")),
    **dict.fromkeys(("Hz", "hertz"), (1, "s^-1")),
    **dict.fromkeys(("N", "newton"), (1, "kg m s^-2")),
    **dict.fromkeys(("J", "joule"), (1, "kg m^2 s^-2")),
    **dict.fromkeys(("W", "watt"), (1, "kg m^2 s^-3")),
    **dict.fromkeys(("Pa", "pascal"), (1, "kg m^-1 s^-2")),
    **dict.fromkeys(("V", "volt"), (1, "kg m^2 s^-3 A^-1")),
    **dict.fromkeys(("\u03a9", "ohm"), (1, "kg m^2 s^-3 A^-2")),
    "eV": ("1.602176634e-19", "kg m^2 s^-2"),
    **dict.fromkeys(("cal", "calorie"), ("4.184", "kg m^2 s^-2")),
}
_OTHERS = {
    **dict.fromkeys(("min", "minute"), (60, "s")),
    **dict.fromkeys(("h", "hr", "hour"), (3600, "s")),
    "day": (86_400, "s"),
    "week": (604_800, "s"),
    **dict.fromkeys(("in", "inch", "inches"), ("0.0254", "m")),
    **dict.fromkeys(("ft", "foot", "feet"), ("0.3048", "m")),
    **dict.fromkeys(("yd", "yard"), ("0.9144", "m")),
    **dict.fromkeys(("mi", "mile"), ("1609.344", "m")),
    "mph": ("0.44704", "m s^-1"),
    **dict.fromkeys(("lb", "lbs", "pound"), ("0.45359237", "kg")),
    **dict.fromkeys(("oz", "ounce"), ("0.028349523125", "kg")),
    **dict.fromkeys(("t", "tonne"), (1000, "kg")),
    **dict.fromkeys(("ha", "hectare"), (10_000, "m^2")),
}
_FACTOR = re.compile(r"([^\W\d_]+)\.?\s*\^?\{?(-?[1-9])?\}?", re.UNICODE)
_Unit = tuple[Fraction, tuple[tuple[str, int], ...]]


def is_known(unit: str) -> bool:
    """Whether the table has all names in a unit."""
    return bool(unit) and all(_named(match[1]) is not None for match in _FACTOR.finditer(unit))


@functools.lru_cache(maxsize=1024)
def parse(unit: str) -> _Unit:
    """The unit's size in SI base units, and their exponents."""
    size, dimensions, sign = Fraction(1), Counter(), 1
    unit = re.sub(r"\bsquare\s+(\w+)", r"\1^2", re.sub(r"\bcubic\s+(\w+)", r"\1^3", unit[:100]))
    for part in re.split(
        r"(/|\bper\b)", unit.replace("\u00b2", "^2").replace("\u00b3", "^3").replace("\u03bc", "\u00b5")
    ):
        if part in ("/", "per"):
            sign = -1
            continue
        for name, exponent in _FACTOR.findall(part):
            power = sign * int(exponent or 1)
            factor, base = _named(name) or (Fraction(1), _singular(name.casefold()))
            size *= factor**power
            for each, inner in _FACTOR.findall(base):
                dimensions[each] += power * int(inner or 1)
    return size, tuple(sorted((name, power) for name, power in dimensions.items() if power))


def _named(name: str) -> tuple[Fraction, str] | None:
    for each in dict.fromkeys((name, _singular(name), _singular(name.lower()) if len(name) > 3 else name)):
        if each in _OTHERS or each in _PREFIXED:
            size, base = _OTHERS.get(each) or _PREFIXED[each]
            return Fraction(size), base
        for prefixes, is_symbol in ((_PREFIX_WORDS, False), (_PREFIXES, True)):
            for prefix, exponent in prefixes.items():
                rest = each.removeprefix(prefix)
                if rest != each and rest in _PREFIXED and (len(rest) <= 3) == is_symbol:
                    size, base = _PREFIXED[rest]
                    return Fraction(size) * Fraction(10) ** exponent, base
    return None


def _singular(name: str) -> str:
    return name[:-1] if len(name) > 3 and name.endswith("s") else name
