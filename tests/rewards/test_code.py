"""Programs that pass and fail, and programs that attack the machine."""

import asyncio
import contextlib
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from stepjax.errors import ConfigError, RecordError
from stepjax.rewards import sandbox
from stepjax.rewards.code import code
from stepjax.rewards.config import RewardConfig
from stepjax.rewards.scorer import Group, Scorer
from stepjax.rollouts.rollout import Rollout

CASES = {"answer": {"cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 -7", "output": "-2"}]}}
TESTS = {"answer": {"tests": "assert add(1, 2) == 3\nassert add(5, -7) == -2"}}
ADDS = "def add(a, b):\n    return a + b\n"
PRINTS = "print(sum(map(int, input().split())))"


def _can_confine() -> bool:
    try:
        sandbox._backend()
    except ConfigError:
        return False
    return True


confined = pytest.mark.skipif(not _can_confine(), reason="neither bwrap nor unshare works here")


def fenced(program: str) -> str:
    return f"I think:\n```python\nprint('draft')\n```\nSo:\n```python\n{program}\n```\nThat is it."


@confined
@pytest.mark.parametrize(
    "record, text, value",
    [
        (CASES, PRINTS, 1),
        (CASES, fenced(PRINTS), 1),
        (CASES, f"if __name__ == '__main__':\n    {PRINTS}", 1),
        (CASES, PRINTS + "\nprint()", 1),
        (CASES, "print(3)", 0),
        (CASES, PRINTS + "\nraise SystemExit(1)", 0),
        (CASES, "print(", 0),
        (CASES, "", 0),
        (CASES, "The program adds its numbers.", 0),
        (TESTS, ADDS, 1),
        (TESTS, fenced(ADDS), 1),
        (TESTS, ADDS + "print('chatter')", 1),
        (TESTS, ADDS.replace("+", "-"), 0),
        (TESTS, "raise SystemExit(0)", 0),
        (TESTS, "import os\nos._exit(0)", 0),
        (TESTS, "import sys, os\nsys.stdout.write('ok')\nos.kill(os.getpid(), 9)", 0),
        ({"answer": {"cases": CASES["answer"]["cases"], "tests": "assert True"}}, PRINTS.replace("input()", "'3'"), 0),
        (CASES, "while True:\n    pass", 0),
        (CASES, "x = bytes(2**31)\n" + PRINTS, 0),
        (CASES, "while True:\n    print('x' * 1000)", 0),
        (CASES, "open('/tmp/a', 'wb').write(bytes(2**26))\n" + PRINTS, 0),
        (CASES, "import numpy\n" + PRINTS, 0),
        (CASES, "print(9**9**9**9)", 0),
        (CASES, "x = " + "(" * 100_000, 0),
        (CASES, "print('\udcff')", 0),
    ],
)
def test_programs_accepted_and_refused(record, text, value):
    assert code({"id": "a", **record}, text, 1.0) == value


# Each prints "out" if it gets out.
ATTACKS = {
    "network": "import socket\ns = socket.create_connection(('127.0.0.1', {port}), 1)\nprint('out')",
    "files": "import os\nprint('out' if os.path.exists({home!r}) else '')",
    "system": "open('/usr/lib/a', 'w').write('a')\nprint('out')",
    "python": "import sys\nopen(sys.executable + '.txt', 'w').write('a')\nprint('out')",
    "environment": "import os\nprint('out' if 'STEPJAX_UPSTREAM_API_KEY' in os.environ else '')",
    "root": "import os\nos.chroot('/tmp')\nprint('out')",
    "mount": "import os\nprint('out' if os.system('mount -t tmpfs tmpfs /tmp') == 0 else '')",
    "signals": "import os\nos.kill(1, 9)\nos.kill({pid}, 9)\nprint('out')",
}


@confined
@pytest.mark.parametrize("name", ATTACKS)
def test_a_program_does_not_get_out(name, monkeypatch):
    monkeypatch.setenv("STEPJAX_UPSTREAM_API_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = {"port": server.getsockname()[1], "home": str(Path(__file__).parent), "pid": os.getpid()}
        outcome = sandbox.run(ATTACKS[name].format(**here), seconds=2, clock=20)
    assert b"out" not in outcome.output


@confined
def test_a_fork_bomb_is_bounded_and_ends():
    begin = time.monotonic()
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert sandbox.run(bomb, seconds=1, clock=2).exceeded in ("clock", "cpu")
    assert time.monotonic() - begin < 15
    counts = "import os, time\nn = 0\ntry:\n    while os.fork():\n        n += 1\n    time.sleep(1)\n"
    counts += "except OSError:\n    print(n)"
    assert 0 < int(sandbox.run(counts, seconds=1, clock=10).output) <= sandbox.PROCESSES


@confined
@pytest.mark.parametrize("ends, exceeded", [(True, None), (False, "clock")])
def test_what_a_program_starts_ends_with_it(ends, exceeded):
    """Even in a session of its own, with its output closed."""
    before = _num_confined()
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.close(1)\n    time.sleep(60)\nprint('parent')"
    )
    program += "" if ends else "\ntime.sleep(60)"
    assert sandbox.run(program, seconds=1, clock=10 if ends else 1).exceeded == exceeded
    deadline = time.monotonic() + 30
    while _num_confined() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _num_confined() <= before


def _num_confined() -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count += b"compile(os.fdopen(" in path.read_bytes()
    return count


@confined
def test_the_clock_is_missing_and_too_much_time_is_wrong():
    assert code({**CASES}, "import time\ntime.sleep(60)", 0.3) is None
    assert code({**TESTS}, "import time\ntime.sleep(60)", 0.3) is None

    async def main():
        async with Scorer(RewardConfig(deadline=0.5, max_missing=1)) as scorer:
            texts = (fenced(PRINTS), "import time\ntime.sleep(60)", "print(4)")
            record = {"verifier": "code", **CASES}
            return (await scorer.score([Group(record, [Rollout(content=text) for text in texts])]))[0]

    assert [each.value for each in asyncio.run(main())] == [1, None, 0]


@pytest.mark.parametrize(
    "answer",
    [None, {}, {"cases": []}, {"cases": [{"input": "a"}]}, {"cases": ["a"]}, {"tests": 5}, {"cases": [{}] * 101}],
)
def test_records_without_tests_are_named(answer):
    with pytest.raises(RecordError, match="record 'a' has answer=.*'cases'"):
        code({"id": "a", "answer": answer}, "print(1)")


def test_nothing_runs_where_nothing_confines(monkeypatch):
    sandbox._backend.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool in ("bwrap", "unshare") else tool)
    try:
        with pytest.raises(ConfigError, match="bwrap is not installed; unshare is not installed. Install bubblewrap"):
            code(CASES, PRINTS)
        monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "bwrap" else tool)
        monkeypatch.setattr(sandbox, "_SETUP", 'shift 2; while [ "$1" != -- ]; do shift; done; shift; "$@"')  # opens it
        with pytest.raises(ConfigError, match="unshare fails"):
            code(CASES, PRINTS)
    finally:
        sandbox._backend.cache_clear()
