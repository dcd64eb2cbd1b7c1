"""The log of a server that strangers talk to: what they can cause is told once a minute, however often it happens."""

import logging
import math
import time
import traceback
from collections.abc import Callable

from stepjax.figures import log_to_stderr

_MOST_KINDS = 1000


def start_log() -> None:
    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, OncePerMinute) for each in handler.filters):
            handler.addFilter(OncePerMinute())


class OncePerMinute(logging.Filter):
    """Passes one warning or error of a kind in a minute; the next of its kind says how many were left out.

    Of one kind are records with one logger and format and, where there is one, one exception from one line of code.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}  # when it was passed, and how many were not since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        error, _, trace = record.exc_info or (None, None, None)
        line = str(traceback.extract_tb(trace, limit=-1))  # where it was raised
        kind, now = (record.name, str(record.msg).partition("\n")[0], error, line), self._clock()
        passed, left_out = self._seen.get(kind, (-math.inf, 0))
        if now - passed < 60:
            self._seen[kind] = passed, left_out + 1
            return False
        if len(self._seen) >= _MOST_KINDS:
            self._seen.clear()
        self._seen[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} more since the last such line)"
        return True
