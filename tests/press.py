"""Ctrl-C pressed on `stepjax` at a named moment: when an import, a file, a compilation or a line of output begins.

A program (`python -P press.py JSON`: some folders of tests are named like packages) or, to import once, a server that
forks a process for each JSON line of its input and answers with its exit status. Moments do not depend on how fast the
machine is:

    {"arguments": ["eval", ...], "moment": "import flax", "delay": 0, "number": 2, "log": FILE}

Texts of moments: "import NAME", "open PATH", "mkdir PATH", "bind (...)", what JAX logs ("Compiling NAME ..."), what is
printed.
"""

import json
import logging
import os
import signal
import sys
import threading

PRELOADED = ("stepjax.training.loop", "stepjax.evaluation.evaluate", "stepjax.evaluation.contact_sheet")
PRELOADED += ("stepjax.interop.load", "stepjax.interop.convert", "stepjax.inference.engine", "tyro")


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


def run(request: dict) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["stepjax", *request["arguments"]]
    if request["moment"]:
        press_at(request["moment"], request["delay"], signal.Signals(request["number"]))
    from stepjax.cli import main

    return main()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(run(json.loads(sys.argv[1])))
    for name in PRELOADED:
        __import__(name)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            sys.exit(run(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
