"""Ctrl-C pressed on `stepjax` at a named moment: when an import, a file, a compilation or a line of output begins.

Moments do not depend on how fast the machine is: "import NAME", "open PATH", "mkdir PATH", "bind (...)", what JAX logs
("Compiling NAME ..."), what is printed.
"""

import logging
import os
import sys
import threading


class _Noticing:
    """A stream that tells what is written."""

    def __init__(self, stream, notice):
        self._stream, self._notice = stream, notice

    def write(self, text):
        self._stream.write(text)
        self._stream.flush()
        self._notice(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


class _NoticingHandler(logging.Handler):
    def __init__(self, notice):
        super().__init__()
        self._notice = notice

    def emit(self, record):
        self._notice(record.getMessage())


def press_at(moment: str, delay: float, number: int) -> None:
    """`delay` is in seconds after the moment, `number` the signal."""
    pressed = threading.Event()

    def notice(text):
        if moment in text and not pressed.is_set():
            pressed.set()
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)

    names = {"import": "import", "open": "open", "os.mkdir": "mkdir"}
    sys.addaudithook(lambda event, args: notice(f"{names[event]} {args[0]}") if event in names else None)
    sys.addaudithook(lambda event, args: notice(f"bind {args[1]}") if event == "socket.bind" else None)
    sys.stdout, sys.stderr = _Noticing(sys.stdout, notice), _Noticing(sys.stderr, notice)
    logging.getLogger("jax").addHandler(_NoticingHandler(notice))
