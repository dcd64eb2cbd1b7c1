"""Ctrl-C and SIGTERM at many moments of every verb: one line, the status 130 or 143, and the same command goes on."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import RECIPE, steps_saved

PROGRAM = Path(__file__).parent / "forked.py"
INT, TERM = signal.SIGINT, signal.SIGTERM
OVERRIDES = ("--checkpoint.every", "4", "--evaluation.examples", "2")


@pytest.fixture(scope="module")
def press(forked, process_environment, tmp_path_factory):
    """A function that presses at a moment of a command; returns the exit status and what was printed."""
    directory = tmp_path_factory.mktemp("press")
    log = directory / "log"

    def press(arguments, moment, *, delay=0.0, number=INT, is_fresh=False):
        log.unlink(missing_ok=True)
        pressed = dict(moment=moment, delay=delay, number=number) if moment else None
        if is_fresh:
            request = dict(arguments=arguments, log=str(log), press=pressed)
            command = [sys.executable, "-P", str(PROGRAM), json.dumps(request)]
            status = subprocess.run(
                command, env=process_environment, cwd=directory, timeout=300, check=False
            ).returncode
        else:
            status = forked.start(arguments, log, press=pressed).wait()
        return status, log.read_text()

    return press


def assert_stopped(answer, verb, number):
    status, said = answer
    assert status == 128 + number, said[-3000:]
    assert "Traceback" not in said and "Exception ignored" not in said, said[-3000:]
    said_so = f"stepjax {verb}: stopped by {number.name}\n", f"{number.name}: saved step "
    assert sum(said.count(each) for each in said_so) == 1, said[-3000:]


# Before anything is loaded, and while it is; each in a fresh process.
@pytest.mark.parametrize(
    "arguments, moment, number",
    [
        (["pretrain", str(RECIPE)], "import stepjax.config_file", INT),
        (["pretrain", str(RECIPE)], "import jax", TERM),
        (["plan", str(RECIPE), "--topology", "v5e-8"], "import numpy", INT),
        (["eval", "none"], "import tyro", INT),
        (["generate", "none", "--prompt", "x"], "import jax._src.core", INT),
        (["convert", "none", "out"], "import stepjax.interop.convert", TERM),
        (["serve", "none"], "import tyro", INT),
        (
            ["pacore", "run", "none.jsonl", "--upstream.url", "http://127.0.0.1:9", "--out", "o"],
            "import stepjax.pacore.batch",
            INT,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value).replace(" ", "-"),
)
def test_while_imports_run(press, arguments, moment, number):
    verb = " ".join(arguments[: 2 if arguments[0] == "pacore" else 1])
    assert_stopped(press(arguments, moment, number=number, is_fresh=True), verb, number)


def assert_a_run_stops(press, out, moments):
    """Each start of the run goes on from what those before have saved."""
    train = ["pretrain", str(RECIPE), "--out", str(out), *OVERRIDES]
    saved = []
    for moment, delay, number in moments:
        answer = press(train, moment, delay=delay, number=number)
        assert_stopped(answer, "pretrain", number)
        saved.append(steps_saved(out / "tiny")[-1:])
        if "saved step" in answer[1]:
            assert f"saved step {saved[-1][0]} in " in answer[1]
    assert saved == sorted(saved)
    return saved[-1], train


def test_before_and_while_a_run_compiles(press, tmp_path):
    moments = [
        (f"mkdir {tmp_path}/tiny", 0, TERM),
        ("Compiling jit(", 0.05, INT),
        ("Compiling jit(initial_state)", 0.1, INT),
    ]
    assert assert_a_run_stops(press, tmp_path, moments)[0] == []


@pytest.mark.slow
def test_at_twenty_moments_of_a_run_and_of_what_is_done_with_it(press, tmp_path):
    moments = [
        (f"open {RECIPE}", 0, INT),
        (f"mkdir {tmp_path}/tiny", 0, TERM),
        ("Compiling ", 0.05, INT),
        ("Compiling jit(initial_state)", 0.1, TERM),
        ("Compiling jit(train_step)", 0, INT),
        ("Compiling jit(train_step)", 0.3, INT),
        ("Compiling jit(train_step)", 1.0, TERM),
        ("first step done", 0, INT),
        ("step 6/16", 0, TERM),
        ("resumed at", 0, INT),
        ("step 10/16", 0, INT),
        ("evaluated transcribe", 0, INT),
    ]
    saved, train = assert_a_run_stops(press, tmp_path, moments)
    assert saved == [16]
    status, said = press(train, None)
    assert status == 0 and "nothing to train" in said

    run, hf = str(tmp_path / "tiny"), str(tmp_path / "hf")
    for arguments, moment, delay, number in (
        (["eval", run, "--examples", "1"], f"open {run}", 0, INT),
        (["eval", run, "--examples", "1"], "Compiling ", 0.2, TERM),
        (["eval", run, "--examples", "1"], "evaluated transcribe", 0, INT),
        (["generate", run, "--prompt", "1 + 1"], "Compiling ", 0.2, INT),
        (["generate", run, "--prompt", "1 + 1"], f"open {run}", 0, TERM),
        (["convert", run, hf], f"open {run}", 0, INT),
        (["convert", run, hf], f"mkdir {hf}", 0, INT),
        (["plan", str(RECIPE), "--topology", "v5e-8"], "import stepjax.planning.plan", 0.5, INT),
        (["serve", run, "--port", "0"], "bind ", 0, INT),
        (["serve", run, "--port", "0"], "Compiling ", 0.2, TERM),
    ):
        assert_stopped(press(arguments, moment, delay=delay, number=number), arguments[0], number)
    assert press(["convert", run, hf, "--overwrite"], None)[0] == 0
