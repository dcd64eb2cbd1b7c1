"""Ctrl-C and SIGTERM end a command at once, with one line and the status 130 or 143.

Python runs signal handlers between two bytecodes of the main thread, so seconds to minutes late while that thread
compiles or reads an array. An exception raised there unwinds through C++ callbacks or is lost in one, and an
interpreter that exits while native threads work crashes. So the signal wakes a thread (`signal.set_wakeup_fd`) that
ends the process like a kill, which is safe: everything stepjax writes survives a kill.

Training, batch runs and servers shut down cleanly: they install their own handlers, and the thread leaves signals to
them.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_on_signals(program: str) -> None:
    """From now on SIGINT and SIGTERM end this process, but not its forks. Call it in the main thread."""

    ending = threading.Lock()

    def end(number: int, _: FrameType | None = None) -> None:
        if not ending.acquire(blocking=False):
            return  # the main thread's handler and the watching thread may both get here
        flush = threading.Thread(target=_flush, daemon=True)  # stdout's reader may be stuck
        flush.start()
        flush.join(1)
        start = "\n" if os.isatty(2) else ""  # below a live progress line
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
