"""The verifier of programs: Python that must pass tests, confined by `sandbox`."""

import json
import secrets
import time

from stepjax.rewards import sandbox
from stepjax.rewards.registry import Record, reward
from stepjax.tasks import extraction, gold

_MOST_CASES = 100
_CLOCK = 6  # all cases together, as a multiple of the deadline

# The program is imported, so that it does not run as a script; the token shows that the tests came to their end.
_TESTED = """
import json, os, sys
program, tests, token = json.loads({given!r})
names = {{"__name__": "program"}}
exec(compile(program, "program", "exec"), names)
exec(compile(tests, "tests", "exec"), names)
sys.stdout.flush()
os.write(1, token.encode())
os._exit(0)
"""


@reward("code", kind="sandbox")
def code(record: Record, text: str, seconds: float = 10.0) -> float | None:
    """1 if the program in the text, its last fenced block or all of it, passes. None if it is stopped by the clock.

    `answer` has `cases`, a list of {"input": stdin, "output": stdout}, or `tests`, statements that raise if the program
    is wrong, or both. A program can fool `tests`, beside which it runs, but not `cases`, which are compared outside.
    White space at the ends of lines is ignored. Too much time, memory or output counts as wrong.

    Args:
        seconds: CPU time of each case; six times that by the clock for all.

    Raises:
        ConfigError: this machine cannot confine a program.
        RecordError: the record has no tests.
    """
    cases, tests = _tests_of(record)
    program = extraction.program(text)
    if not program.strip():
        return 0.0
    deadline = time.monotonic() + _CLOCK * seconds
    token = secrets.token_hex(16)
    runs: list[tuple[str, bytes, str | None]] = [(program, given.encode(), wanted) for given, wanted in cases]
    if tests is not None:
        given = json.dumps([program, tests, token])
        runs.append((_TESTED.format(given=given), b"", None))
    for source, stdin, wanted in runs:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        outcome = sandbox.run(source, stdin, seconds=seconds, clock=left)
        if outcome.exceeded == "clock":
            return None
        output = outcome.output.decode("utf-8", "replace")
        is_right = output.endswith(token) if wanted is None else _lines(output) == _lines(wanted)
        if outcome.exceeded or outcome.status != 0 or not is_right:
            return 0.0
    return 1.0


def _tests_of(record: Record) -> tuple[list[tuple[str, str]], str | None]:
    answer = record.get("answer")
    answer = answer if isinstance(answer, dict) else {}
    cases, tests = answer.get("cases", []), answer.get("tests")
    is_good = isinstance(cases, list) and len(cases) <= _MOST_CASES and isinstance(tests, (str, type(None)))
    made = []
    for case in cases if is_good else ():
        given, wanted = (case.get("input", ""), case.get("output")) if isinstance(case, dict) else (None, None)
        if isinstance(given, str) and isinstance(wanted, str):
            made.append((given, wanted))
    if not is_good or len(made) < len(cases) or not (cases or tests):
        gold.refuse(
            record,
            f"give a dict with 'cases', at most {_MOST_CASES} of {{'input': text, 'output': text}}, or with 'tests', "
            "Python statements",
        )
    return made, tests


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
