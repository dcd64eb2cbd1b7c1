"""Progress of a long task on stderr: a bar on a terminal, an occasional line elsewhere (a log file, a pod's console).

with progress(total, unit="B", description="converting") as bar:
    bar.update(n)
"""

import sys
import threading
from typing import TextIO

from tqdm import tqdm

from stepjax.figures import printable

SECONDS = 30.0  # minimum time between lines without a terminal
_LINE = "{desc}: {percentage:3.0f}%  {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """Create it with `progress`. Thread-safe."""

    _lock = threading.RLock()  # tqdm's default lock also holds a semaphore shared with other processes
    monitor_interval = 0  # no monitor thread

    def __init__(self, stream: TextIO, **options):
        self._stream, self._is_live = stream, stream.isatty()
        if not self._is_live:  # short tasks print nothing
            options |= {"mininterval": SECONDS, "delay": SECONDS, "bar_format": _LINE, "leave": False}
        super().__init__(file=stream, dynamic_ncols=self._is_live, miniters=0, **options)
        if not self._is_live:
            # Otherwise tqdm would redraw it after every log message.
            self._instances.discard(self)  # pyright: ignore[reportAttributeAccessIssue]

    def update(self, n: float = 1, note: str | None = None) -> bool | None:
        """
        Args:
            n: progress since the last update.
            note: text shown after the figures from now on.
        """
        with self._lock:
            if note is not None:
                self.postfix = printable(note)
            return super().update(n)

    def print(self, message: str) -> None:
        """Puts a message on a line of its own, without tearing the bar."""
        if self._is_live and not self.disable:
            self.write(printable(message), file=self.fp)
        else:
            print(printable(message), file=self._stream, flush=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if self._is_live:
            return super().display(msg, pos)
        if msg is None:  # "" would clear the line
            print(self, file=self._stream, flush=True)


def progress(
    total: float | None,
    *,
    unit: str = "",
    description: str = "",
    done: float = 0,
    shown: bool = True,
    stream: TextIO | None = None,
) -> Progress:
    """A progress display, used as a context manager.

    Args:
        total: None if unknown.
        unit: of `total`; "B" and "tok" are scaled to k, M, G.
        done: progress of an earlier attempt; excluded from the rate.
        shown: False hides the progress but not printed messages: for all processes but the first.
        stream: stderr by default.
    """
    return Progress(
        sys.stderr if stream is None else stream,
        total=total,
        unit=unit,
        unit_scale=unit in ("B", "tok"),
        desc=description,
        initial=done,
        disable=not shown,
    )
