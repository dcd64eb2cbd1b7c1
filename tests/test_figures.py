"""What others wrote, on a terminal."""

import logging
import subprocess
import sys

import pytest

from stepjax.cli import main
from stepjax.errors import RecordError
from stepjax.evaluation.command import Eval
from stepjax.figures import logging_to_stderr, printable


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
