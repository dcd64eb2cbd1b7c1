"""Ctrl-C and SIGTERM at any moment of a command: one line and the status 130 or 143, at once.

Python runs a signal's handler between two bytecodes of the main thread, which comes seconds to minutes late while that
thread compiles or reads an array. An exception raised there unwinds through C++ callbacks or is lost in one, and an
interpreter that exits while native threads work crashes. So the signal wakes a thread (`signal.set_wakeup_fd`) that
ends the process as a kill would: all that stepjax writes survives a kill.

Training, a batch run and a server stop in order: while they run, their own handlers are installed, and the thread
leaves signals to them.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_on_signals(program: str) -> None:
    """From now on this process, but none forked of it, ends at SIGINT and SIGTERM. Call it in the main thread."""

    ending = threading.Lock()

    def end(number: int, _: FrameType | None = None) -> None:
        if not ending.acquire(blocking=False):
            return  # the main thread's handler and the one that watches may both get here
        flush = threading.Thread(target=_flush, daemon=True)  # a reader of ours may be stuck
        flush.start()
        flush.join(1)
        start = "\n" if os.isatty(2) else ""  # behind what a live progress line shows
        with contextlib.suppress(OSError):
            os.write(2, f"{start}{program}: stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while received := os.read(reader, 1):
            if signal.getsignal(received[0]) is end:
                end(received[0])

    for number in _SIGNALS:
        signal.signal(number, end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore)
    threading.Thread(target=watch, name="signals", daemon=True).start()


def _restore() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
