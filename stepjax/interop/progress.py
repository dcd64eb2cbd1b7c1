"""A line on stderr that says how far a conversion is."""

import sys
import threading
import time
from typing import TextIO


class Progress:
    """`12.3 of 20.3 GB, 0.41 GB/s, 20 s left`: rewritten in place on a terminal, a new line now and then elsewhere.

    Bytes that an earlier attempt finished count as done, not as speed. Threads may call `add`.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None):
        self._total, self._done, self._before = total, done, done
        self._stream = sys.stderr if stream is None else stream
        self._in_place = self._stream.isatty()
        self._start = self._shown = time.monotonic()
        self._lock = threading.Lock()
        if done:
            print(f"going on after {done / total:.0%}", file=self._stream)

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._shown >= (0.2 if self._in_place else 10.0):
                self._shown = now
                self._show(now)

    def finish(self) -> None:
        now = time.monotonic()
        self._show(now)
        if self._in_place:
            print(file=self._stream)

    def _show(self, now: float) -> None:
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        unit, size = ("GB", 1e9) if self._total >= 1e9 else ("MB", 1e6)
        left = "" if self._done >= self._total or not rate else f", {(self._total - self._done) / rate:.0f} s left"
        line = f"{self._done / size:.2f} of {self._total / size:.2f} {unit}, {rate / 1e9:.2f} GB/s{left}"
        if self._in_place:
            print(f"\r{line:<60}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)
