"""Human-readable numbers, durations and confidence intervals; untrusted text made printable; logging to stderr."""

import contextlib
import logging
import math
import re
import sys
from collections.abc import Iterator

NORMAL_QUANTILE = 1.959964  # 97.5 %, for two-sided intervals of 95 %

# Terminal control codes, bidirectional text controls, and surrogates, which UTF-8 cannot encode. Newlines and tabs are
# fine.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_SUFFIXES = ("", "k", "M", "B", "T")


def human_number(value: float) -> str:
    """Three significant digits and a suffix: 12345 -> "12.3k"."""
    if not math.isfinite(value):
        return f"{value}"
    magnitude = abs(value)
    for power, suffix in enumerate(_SUFFIXES):
        scaled = magnitude / 1000**power
        # 999.5 would round to four digits, so it takes the next suffix.
        if scaled < 999.5 or suffix == _SUFFIXES[-1]:
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{'-' if value < 0 else ''}{scaled:.{digits}f}{suffix}"
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """The two largest units: "533ms", "4.55s", "62s", "5m20s", "7h12m", "3d04h"."""
    if not math.isfinite(seconds):
        return f"{seconds}"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f}ms"
    if seconds < 9.995:
        return f"{seconds:.2f}s"
    total = round(seconds)
    if total < 120:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(total / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(total / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927), sensible even near 0 and 1; (0, 1) without trials."""
    assert 0 <= correct <= total
    if total == 0:
        return 0.0, 1.0
    z, p = NORMAL_QUANTILE, correct / total
    centre = p + z**2 / (2 * total)
    radius = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - radius) / scale), min(1.0, (centre + radius) / scale)


def printable(text: object) -> str:
    """Untrusted text with its control characters escaped."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], str(text))


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr. Escapes control characters and leaves a progress bar intact."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(printable(self.format(record)), file=sys.stderr, nolock=True)

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        is_chatter = record.levelno < logging.WARNING and record.name.startswith(("absl", "jax"))  # absl: Orbax
        return not is_chatter and super().filter(record)


_HANDLER = _StderrHandler()


def log_to_stderr(level: int, form: str) -> None:
    """Sets up logging for a command, replacing any earlier set-up. JAX and Orbax log warnings and errors only."""
    _HANDLER.setFormatter(logging.Formatter(form))
    logging.getLogger().setLevel(level)
    logging.getLogger().addHandler(_HANDLER)


@contextlib.contextmanager
def logging_to_stderr(level: int, form: str) -> Iterator[None]:
    """`log_to_stderr` until the block ends."""
    root = logging.getLogger()
    before = root.level
    log_to_stderr(level, form)
    try:
        yield
    finally:
        root.removeHandler(_HANDLER)
        root.setLevel(before)
        _HANDLER.filters.clear()
