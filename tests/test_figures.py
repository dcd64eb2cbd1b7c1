"""Figures for people, and what others wrote, on a terminal."""

import logging
import math
import subprocess
import sys

import pytest

from stepjax.cli import main
from stepjax.errors import RecordError
from stepjax.evaluation.command import Eval
from stepjax.figures import human_number, human_time, logging_to_stderr, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc \u53c2\u8003 \U0001f600", "a\tb\nc \u53c2\u8003 \U0001f600"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\r\x08\x00\x7f\x9b31m", r"\r\x08\x00\x7f\x9b31m"),
        ("\u202eabc\u2066\u200f", r"\u202eabc\u2066\u200f"),
        ("half \ud83d", r"half \ud83d"),
        (ValueError("\x1b"), r"\x1b"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert printable(text) == shown


def test_an_error_that_names_what_others_wrote(monkeypatch, capsys):
    def run(self):
        raise RecordError("problem \x1b[31m")

    monkeypatch.setattr(Eval, "run", run)
    assert main(["eval", "runs/x"]) == 1
    assert capsys.readouterr().err == "stepjax eval: problem \\x1b[31m\n"


def test_what_is_logged(capsys):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with logging_to_stderr(logging.WARNING, "%(message)s"):
        logging.getLogger("x").warning("the upstream says %s", "\x1b[2J")
    assert capsys.readouterr().err == "the upstream says \\x1b[2J\n"
    assert (root.level, list(root.handlers)) == before


def test_only_warnings_of_jax_and_orbax_are_told():
    code = (
        "import logging; from stepjax.figures import log_to_stderr\n"
        "log_to_stderr(logging.INFO, '%(name)s %(message)s')\n"
        "for name in ('absl', 'jax._src', 'stepjax'):\n"
        "    logging.getLogger(name).info('a'); logging.getLogger(name).warning('b')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines() == ["absl b", "jax._src b", "stepjax a", "stepjax b"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0.00"), (0.5, "0.50"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (999.4, "999"), (999.6, "1.00k")]
    + [(12_345, "12.3k"), (999_600, "1.00M"), (1.2e12, "1.20T"), (4e15, "4000T"), (-1500, "-1.50k"), (math.inf, "inf")],
)
def test_numbers_have_three_digits_and_a_suffix(value, expected):
    assert human_number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0042, "4ms"), (0.9996, "1.00s"), (9.99, "9.99s"), (9.996, "10s"), (62.4, "62s"), (119.6, "2m00s")]
    + [(3599.6, "1h00m"), (26_031, "7h14m"), (48 * 3600, "2d00h"), (273_700, "3d04h"), (math.nan, "nan")],
)
def test_times_have_two_units(seconds, expected):
    assert human_time(seconds) == expected
