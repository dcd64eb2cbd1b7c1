"""`stepjax` in processes of their own, forked from one that has imported JAX: a start takes milliseconds, not seconds.

As a program it is that server. It reads a request a line, JSON, and answers with "ID pid PID" and "ID ended STATUS":

    {"id": 0, "arguments": ["eval", ...], "log": FILE, "environment": {...}, "devices": 2, "press": {...}}
"""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

PRELOADED = ("stepjax.training.loop", "stepjax.evaluation.evaluate", "stepjax.evaluation.contact_sheet")
PRELOADED += ("stepjax.interop.load", "stepjax.interop.convert", "stepjax.inference.engine", "tyro")


class Forked:
    """A process of a `ForkServer`, with the part of `subprocess.Popen` that tests need."""

    def __init__(self):
        self.pid, self.returncode = 0, None
        self._has_started, self._has_ended = threading.Event(), threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        if not self._has_ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def take(self, kind: str, number: int) -> None:
        if kind == "pid":
            self.pid = number
            self._has_started.set()
        else:
            self.returncode = number
            self._has_ended.set()

    def wait_for_start(self) -> None:
        assert self._has_started.wait(300) and self.pid, "the fork server has ended, or does not answer"


class ForkServer:
    def __init__(self, environment: dict[str, str], directory: Path):
        """`environment` is that of every process: JAX reads its variables when it is imported, once."""
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: some folders of tests are named like packages
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
        )
        self._processes: dict[int, Forked] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._read, daemon=True).start()

    def start(
        self,
        arguments: list[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        devices: int | None = None,
        press: dict | None = None,
    ) -> Forked:
        """Starts `stepjax ARGUMENTS`, with its output in `log`.

        Args:
            devices: simulated CPU devices.
            press: see `press.press_at`.
        """
        log.touch()
        number, process = next(self._numbers), Forked()
        self._processes[number] = process
        request = dict(arguments=arguments, log=str(log), environment=environment or {}, devices=devices, press=press)
        assert self._server.stdin is not None
        print(json.dumps({"id": number, **request}), file=self._server.stdin, flush=True)
        assert self._server.poll() is None, "the fork server has ended"
        process.wait_for_start()
        return process

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            number, kind, value = line.split()
            self._processes[int(number)].take(kind, int(value))
        for process in self._processes.values():  # the server is gone: nobody should wait for it
            if process.poll() is None:
                process.take("ended", -1)
                process.take("pid", process.pid)


def run(request: dict) -> int:
    """In the process itself."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request.get("environment") or {})
    sys.argv = ["stepjax", *request["arguments"]]
    if request.get("devices"):
        import jax

        jax.config.update("jax_num_cpu_devices", request["devices"])
    if request.get("press"):
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_log_compiles", True)
        from press import press_at

        press_at(**request["press"])
    from stepjax.cli import main

    return main()


def serve() -> None:
    for name in PRELOADED:
        __import__(name)
    logging.getLogger().handlers.clear()  # set up by a module that logged while it was imported
    waiting = 0
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork():  # a process that waits for the one that is asked for
            waiting += 1
            while waiting and os.waitpid(-1, os.WNOHANG)[0]:
                waiting -= 1
            continue
        child = os.fork()
        if not child:
            sys.exit(run(request))
        os.write(1, f"{request['id']} pid {child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"{request['id']} ended {status}\n".encode())
        os._exit(0)
    for _ in range(waiting):
        os.wait()


if __name__ == "__main__":
    tests = Path(__file__).parent
    # The root first: tests/pallas_kernels has the same name as the package.
    sys.path += [str(tests.parent), str(tests)]
    if len(sys.argv) > 1:  # a process that has imported nothing
        sys.exit(run(json.loads(sys.argv[1])))
    serve()
