"""math-verify in processes of its own, for what foreign text makes it do cannot be bounded from within.

A comparison that takes too much time or memory ends its process, and another process takes its place. This file is also
the program of those processes: lines of JSON come in, and lines of JSON go out.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading

from stepjax.errors import ConfigError

SECONDS = 5.0  # of the processor's time, for one comparison; by the clock six times as much
_MEMORY = 2 << 30
_MOST_PROCESSES = 2
# What they need of the environment, which may hold keys.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR")

_turn = threading.BoundedSemaphore(_MOST_PROCESSES)
_idle: list[subprocess.Popen[bytes]] = []


@functools.lru_cache(maxsize=4096)
def equivalent(gold: str, answer: str, *, up_to_factor: bool = False) -> bool | None:
    """Whether two answers in LaTeX are the same. A decimal stands for an irrational number that it has six digits of.

    Args:
        up_to_factor: they are what equations say to be zero.

    Returns:
        None where that is not known: the first cannot be read, or the comparison took too much.

    Raises:
        ConfigError: math-verify cannot be started.
    """
    with _turn:
        process = _idle.pop() if _idle else _started()
        said = b""
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([gold, answer, up_to_factor, SECONDS]).encode() + b"\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except OSError:  # it is gone
            pass
        finally:
            if said.endswith(b"\n"):
                _idle.append(process)
            else:
                _end(process)
        return json.loads(said) if said.endswith(b"\n") else None


def _started() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        _end(process)
        raise ConfigError("math-verify cannot be started: `python -c 'import math_verify'` says why; or match exactly")
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # of what was not yet written
            pipe.close()
    process.wait()


@atexit.register
def _end_all() -> None:
    while _idle:
        _end(_idle.pop())


# The processes.


def _main() -> None:
    for limit, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):  # a system without it, or with a lower one
            resource.setrlimit(limit, (most, most))
    import logging

    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        gold, answer, up_to_factor, seconds = json.loads(line)
        # Neither signal has a handler, so that they end the process also within one long operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
        verdict = _verdict(gold, answer, up_to_factor)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=out, flush=True)


def _verdict(gold: str, answer: str, up_to_factor: bool) -> bool | None:
    from math_verify import verify
    from sympy import simplify

    one, other = _parsed(gold), _parsed(answer)
    if one is None or other is None:
        return None if one is None else False
    try:
        if up_to_factor:
            factor = simplify(one / other)
            return bool(factor.is_number and factor.is_finite and factor != 0)
        return verify([one], [other], timeout_seconds=None, allow_set_relation_comp=True) and _is_near(one, other)
    except MemoryError:
        raise
    except Exception:  # whatever the library makes of it
        return None


def _parsed(text: str):
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    as_it_is = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    config = LatexExtractionConfig(normalization_config=as_it_is)
    found = parse(f"${text}$", extraction_config=[config], parsing_timeout=None, fallback_mode="no_fallback")  # type: ignore
    return found[0] if found else None


def _is_near(one, other) -> bool:
    """math-verify rounds numbers to six places, so that all small ones are the same: here to six digits."""
    from sympy import Expr, N

    if one == other or not (isinstance(one, Expr) and isinstance(other, Expr) and one.is_number and other.is_number):
        return True
    difference, size = abs(N(one - other, 30)), max(abs(N(one, 30)), abs(N(other, 30)))
    return bool(difference <= 1e-6 * size) if math.isfinite(size) else False


if __name__ == "__main__":
    _main()
