"""Runs calls on untrusted data in separate processes, with time and memory limits.

Chat templates come with weights; images and answers come from anybody. Each can keep one C call busy for hours, or make
it allocate all memory. A thread in such a call can be neither stopped nor limited; a process can. A process starts on
first use, in about a third of a second, and is then reused: a round trip takes under 1 ms.
"""

import atexit
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from stepjax.errors import LimitError, StepjaxError

_Result = TypeVar("_Result")

# Environment variables that a process needs; others may hold keys.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "OPENBLAS_CORETYPE")
_TIME_IS_UP = (-signal.SIGPROF, -signal.SIGALRM)
_START = "import sys; from stepjax.processing.bounded import serve; serve(int(sys.argv[1]))"


def call(function: Callable[..., _Result], *args: Any, seconds: float, memory: int) -> _Result:
    """Calls a module-level function. The function, its arguments and its result are pickled.

    Args:
        seconds: CPU time, so that calls do not fail on a busy machine. The wall-clock limit, for calls that only wait,
            is six times as much.
        memory: bytes beyond the process's own; enforced only on Linux.

    Raises:
        LimitError: the call exceeded a limit or failed with an unexpected exception.
        StepjaxError: raised by the function.
    """
    worker = _take()
    try:
        worker.channel.send((function, args, seconds, memory))
        is_good, value = worker.channel.recv()
    except (EOFError, ConnectionError):
        status = worker.end()
        reason = (
            f"more than {seconds:g} seconds" if status in _TIME_IS_UP else f"its process down, with status {status}"
        )
        raise LimitError(f"it takes {reason}") from None
    except BaseException:  # such as Ctrl-C: an answer may be unread
        worker.end()
        raise
    _idle.append(worker)
    if not is_good:
        raise value
    return value


class _Worker:
    def __init__(self):
        self.channel, theirs = Pipe()
        with theirs:
            # Same modules as here. Library threads and their heaps would count as memory.
            paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            environment |= {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries may print
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Ends the process if it is still running; returns its exit status."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.5)
        self._process.kill()
        return self._process.wait()


_is_worker = False
_idle: list[_Worker] = []  # pop and append are atomic; one worker per concurrent call


os.register_at_fork(after_in_child=_idle.clear)  # workers belong to the parent


def _take() -> _Worker:
    with contextlib.suppress(IndexError):
        while True:
            worker = _idle.pop()
            if worker.is_alive:
                return worker
            worker.end()
    return _Worker()


@atexit.register
def _end_idle() -> None:
    while _idle:
        _idle.pop().end()


def serve(descriptor: int) -> None:
    """Worker side: answers calls until the channel closes."""
    global _is_worker
    _is_worker = True
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # kills the process even inside a C call
    channel = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            channel.send(_outcome(*channel.recv()))


def is_worker() -> bool:
    """Whether this process is a worker, so that what it does is bounded already."""
    return _is_worker


@contextlib.contextmanager
def extended(seconds: float) -> Iterator[None]:
    """Inside a worker: the block, such as a slow import, has a limit of its own and does not count as the call's."""
    left = signal.getitimer(signal.ITIMER_PROF)[0], signal.getitimer(signal.ITIMER_REAL)[0]
    _set_limit(seconds, 6 * seconds)
    try:
        yield
    finally:
        _set_limit(*left)


def _set_limit(seconds: float, wall_seconds: float) -> None:
    """Of the current call; 0 removes the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _outcome(function: Callable[..., Any], args: tuple, seconds: float, memory: int) -> tuple[bool, Any]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # /proc exists only on Linux; no limit elsewhere
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    _set_limit(seconds, 6 * seconds)
    try:
        return True, function(*args)
    except StepjaxError as error:
        return False, error
    except MemoryError:
        return False, LimitError(f"it takes more than {memory / 2**20:.0f} MiB of memory")
    except Exception as error:
        return False, LimitError(f"{type(error).__name__}: {error}"[:500])
    finally:
        _set_limit(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
