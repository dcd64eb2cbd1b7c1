"""math-verify in a process with time and memory limits: untrusted text can make it run without bound."""

import functools
import logging
import math
import threading

from stepjax.errors import ConfigError, LimitError
from stepjax.processing import bounded

SECONDS = 5.0  # of CPU time per comparison; six times that in wall-clock time
_IMPORT_SECONDS = 60.0  # of CPU time, for sympy on a slow machine
_MEMORY = 2 << 30
_MOST_PROCESSES = 2

_turn = threading.BoundedSemaphore(_MOST_PROCESSES)


@functools.lru_cache(maxsize=4096)
def equivalent(gold: str, answer: str, *, up_to_factor: bool = False) -> bool | None:
    """Whether two LaTeX answers are equal. A decimal equals an irrational number if six digits match.

    Args:
        up_to_factor: they are equations written as "left - right", equal up to a factor.

    Returns:
        None if undecided: the first cannot be parsed, or the comparison exceeded its limits.

    Raises:
        ConfigError: math-verify is not installed.
    """
    if bounded.is_worker():  # the caller is bounded already
        return _verdict(gold, answer, up_to_factor)
    with _turn:
        try:
            return bounded.call(_verdict, gold, answer, up_to_factor, seconds=SECONDS, memory=_MEMORY)
        except LimitError:
            return None


# Runs in its own process.


def _verdict(gold: str, answer: str, up_to_factor: bool) -> bool | None:
    try:
        with bounded.extended(_IMPORT_SECONDS):
            from math_verify import verify
            from sympy import simplify
    except ImportError as error:
        raise ConfigError(
            f"matching math needs {error.name}: pip install math-verify, or use matching exact"
        ) from error
    logging.disable(logging.CRITICAL)  # math-verify logs every text that it cannot parse
    one, other = _parsed(gold), _parsed(answer)
    if one is None or other is None:
        return None if one is None else False
    try:
        if up_to_factor:
            factor = simplify(one / other)
            return bool(factor.is_number and factor.is_finite and factor != 0)
        return verify([one], [other], timeout_seconds=None, allow_set_relation_comp=True) and _is_near(one, other)
    except MemoryError:
        raise
    except Exception:  # the library raises many kinds
        return None


def _parsed(text: str):
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    as_it_is = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    config = LatexExtractionConfig(normalization_config=as_it_is)
    found = parse(f"${text}$", extraction_config=[config], parsing_timeout=None, fallback_mode="no_fallback")  # type: ignore
    return found[0] if found else None


def _is_near(one, other) -> bool:
    """Compares six significant digits: math-verify rounds to six decimal places, which makes small numbers equal."""
    from sympy import Expr, N

    if one == other or not (isinstance(one, Expr) and isinstance(other, Expr) and one.is_number and other.is_number):
        return True
    difference, size = abs(N(one - other, 30)), max(abs(N(one, 30)), abs(N(other, 30)))
    return bool(difference <= 1e-6 * size) if math.isfinite(size) else False
