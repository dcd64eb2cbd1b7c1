"""Calls on data from outside, in processes of their own: time and memory end where they are said to.

Chat templates come with weights, pictures and answers from anybody. Each can keep one C call busy for hours, or have it
allocate all there is; a thread that is in it can be neither stopped nor limited, a process can. A process is started
when it is first needed, in about a third of a second, and then waits for the next call: there and back is under 1 ms.
"""

import atexit
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from stepjax.errors import LimitError, StepjaxError

_Result = TypeVar("_Result")

# What a process needs of the environment, which may hold keys.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "OPENBLAS_CORETYPE")
_TIME_IS_UP = (-signal.SIGPROF, -signal.SIGALRM)
_START = "import sys; from stepjax.processing.bounded import serve; serve(int(sys.argv[1]))"


def call(function: Callable[..., _Result], *args: Any, seconds: float, memory: int) -> _Result:
    """Calls a function of a module; it, its arguments and its result are pickled.

    Args:
        seconds: of processor time, so that a busy machine ends nothing that would have been in time; by the clock it is
            six times as much, for a call that only waits.
        memory: bytes, beside those of the process itself. Linux alone counts them.

    Raises:
        LimitError: it took more, or failed in a way that it does not foresee.
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
    except BaseException:  # Ctrl-C, for one: there may be an answer that nobody has read
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
            # The same modules are found as here. Threads of libraries, and their heaps, would count as memory.
            paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            environment |= {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # whatever libraries print
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Its exit status; of one that ended by itself, that one."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.5)
        self._process.kill()
        return self._process.wait()


_idle: list[_Worker] = []  # taking and giving back is atomic: as many as threads that call at a time


os.register_at_fork(after_in_child=_idle.clear)  # they answer to one process


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
    """The other side: answers calls until nobody asks any more."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends the process, wherever it is
    channel = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            channel.send(_outcome(*channel.recv()))


def set_limit(seconds: float) -> None:
    """Sets the time that is left to the call under way, in its process; 0 lifts the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def _outcome(function: Callable[..., Any], args: tuple, seconds: float, memory: int) -> tuple[bool, Any]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # /proc is Linux's; elsewhere the limit is not kept, or not taken
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    set_limit(seconds)
    try:
        return True, function(*args)
    except StepjaxError as error:
        return False, error
    except MemoryError:
        return False, LimitError(f"it takes more than {memory / 2**20:.0f} MiB of memory")
    except Exception as error:
        return False, LimitError(f"{type(error).__name__}: {error}"[:500])
    finally:
        set_limit(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
