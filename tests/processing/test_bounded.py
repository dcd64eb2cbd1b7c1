"""Calls in processes of their own: what is over a limit ends alone, and the next call finds things as they were."""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from stepjax.errors import LimitError, TokenError
from stepjax.processing import bounded
from stepjax.processing.tokenizer import load_tokenizer

MiB = 2**20


def call(function, *args, seconds=20.0, memory=256 * MiB):
    return bounded.call(function, *args, seconds=seconds, memory=memory)


def test_results_and_errors_come_back():
    assert call(math.factorial, 20) == math.factorial(20)
    with pytest.raises(TokenError, match="nowhere"):
        call(load_tokenizer, "/nowhere")
    with pytest.raises(LimitError, match="ValueError: invalid literal"):
        call(int, "x")


@pytest.mark.parametrize(
    ("function", "args", "reason"),
    [
        (pow, (7, 10**9), "more than 0.2 seconds"),  # one operation that no signal handler would see the end of
        (time.sleep, (60,), "more than 0.2 seconds"),  # takes no processor time
        (bytes, (2**40,), "more than 256 MiB of memory"),
        (os._exit, (3,), "its process down, with status 3"),
        (os.abort, (), "its process down, with status -6"),
    ],
)
def test_what_is_over_a_limit_ends_alone(function, args, reason):
    with pytest.raises(LimitError, match=reason):
        call(function, *args, seconds=0.2)
    assert call(math.factorial, 5) == 120


def test_limits_are_of_one_call():
    before = call(resource.getrlimit, resource.RLIMIT_AS)
    for _ in range(3):
        assert call(eval, "len(bytes(100 * 2**20))") == 100 * MiB
        with pytest.raises(LimitError):
            call(eval, "len(bytes(300 * 2**20))")
    assert call(eval, "len(bytes(300 * 2**20))", memory=512 * MiB) == 300 * MiB
    assert before[1] == call(resource.getrlimit, resource.RLIMIT_AS)[1]


def test_a_process_waits_for_the_next_call_and_threads_have_one_each():
    assert call(os.getpid) == call(os.getpid) != os.getpid()
    start = time.monotonic()
    threads = [threading.Thread(target=call, args=(time.sleep, 1)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 5  # six seconds one after another


def test_a_process_that_died_while_it_waited_is_replaced():
    process = call(os.getpid)
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert call(os.getpid) != process


def test_processes_end_with_their_parent():
    code = (
        "import os, sys; from stepjax.processing import bounded; "
        "print(bounded.call(os.getpid, seconds=9, memory=2**28)); sys.stdout.flush(); "
    )
    for end in ("sys.exit()", "os._exit(0)"):
        command = [sys.executable, "-c", code + end]
        pid = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{pid}")
