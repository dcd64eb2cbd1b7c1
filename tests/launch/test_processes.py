"""Runs of several processes on this machine: the losses of one, and what happens when a process is killed.

Every run trains the tiny recipe on four simulated devices, spread over one, two or four processes.
"""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_files import PRETRAIN_ONLY, read_metrics, steps_saved

from stepjax.cli import main

DEVICES, STEPS, TIMEOUT = 4, 12, 300
OPTIONS = ("--batch.rows", "4", "--heartbeat.every", "0.5", "--heartbeat.lost-after", "8")
ROWS_OVER_BOTH = ("--mesh.fsdp", "1", "--mesh.context", "4")  # each of two processes feeds the rows of both
OPTIONS += ("--schedule.phases.0.tokens", f"{STEPS * 512}", "--schedule.warmup-tokens", "512")


class Job:
    """`stepjax pretrain` in several processes, one output file each; or another verb with its recipe."""

    def __init__(self, start, out: Path, processes: int, *arguments: str, verb="pretrain", recipe=PRETRAIN_ONLY):
        """`start` starts one of them; it takes arguments, a log, an environment and a number of devices."""
        self.out, self.directory = out, out / ("tiny" if verb == "pretrain" else "tiny_rl")
        out.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for index in range(processes):
            (out / f"log{index}").write_text("")
            place = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            options = OPTIONS if verb == "pretrain" else OPTIONS[:6]
            command = [verb, str(recipe), "--out", str(out), *options, *arguments]
            environment = place if processes > 1 else {}
            self.processes.append(start(command, out / f"log{index}", environment, DEVICES // processes))

    def output(self, index: int) -> str:
        return (self.out / f"log{index}").read_text()

    def wait_for(self, pattern: str, index: int = 0) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not re.search(pattern, self.output(index)):
            assert time.monotonic() < deadline and self.processes[index].poll() is None, self.output(index)
            time.sleep(0.02)

    def end(self) -> list[int]:
        deadline = time.monotonic() + TIMEOUT
        try:
            return [process.wait(max(deadline - time.monotonic(), 1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()  # where it hangs, or the test is interrupted


def losses(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(directory)}


@pytest.fixture(scope="module")
def quickly(forked):
    """Starts a process that imports nothing and has no parent of its own that turns its status into another."""

    def start(command, log, environment, devices):
        return forked.start(command, log, environment=environment | {"STEPJAX_SUPERVISED": "1"}, devices=devices)

    return start


@pytest.fixture(scope="module")
def really(process_environment):
    """Starts a process as users do."""

    def start(command, log, environment, devices):
        environment = process_environment | environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
        with open(log, "w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "stepjax.cli", *command], env=environment, stdout=output, stderr=output
            )

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quickly):
    """The losses of one process with all four devices."""
    job = Job(quickly, tmp_path_factory.mktemp("whole"), 1)
    assert job.end() == [0], job.output(0)
    assert sorted(losses(job.directory)) == list(range(1, STEPS + 1))
    return losses(job.directory)


def assert_same(actual: dict[int, float], expected: dict[int, float]) -> None:
    """Up to the order of sums between devices, which the libraries that exchange them choose."""
    assert sorted(actual) == sorted(expected)
    np.testing.assert_allclose([actual[s] for s in expected], list(expected.values()), rtol=2e-5)


@pytest.mark.slow  # the tests of killed processes compare these up to the step of the kill, and from there on
@pytest.mark.parametrize("processes, arguments", [(2, ()), (4, ()), (2, ROWS_OVER_BOTH)])
def test_losses_are_those_of_one_process(quickly, tmp_path, whole, processes, arguments):
    job = Job(quickly, tmp_path / "job", processes, *arguments)
    assert job.end() == [0] * processes, job.output(0)
    assert_same(losses(job.directory), whole)


@pytest.mark.slow  # minutes of compilation
def test_reinforcement_learning_is_that_of_one_process(quickly, tmp_path):
    """The same prompts, answers and rewards, and up to rounding the same updates."""
    options = ("--iterations", "2", "--policy.minibatches", "1", "--critic.update.minibatches", "1")
    options += ("--critic.warmup-iterations", "0", "--loss.kl", "0")
    recipe = PRETRAIN_ONLY.with_name("tiny_rl.py")
    rows = []
    for processes in (1, 2):
        job = Job(quickly, tmp_path / f"{processes}", processes, *options, verb="rl", recipe=recipe)
        assert job.end() == [0] * processes, job.output(processes - 1)
        rows.append(read_metrics(job.directory))
    for one, two in zip(*rows, strict=True):
        compared = [name for name in one if not re.match("seconds|tokens_per_second|sampler/p95", name)]
        assert compared and set(one) == set(two)
        np.testing.assert_allclose([two[name] for name in compared], [one[name] for name in compared], atol=2e-4)


def test_a_context_axis_across_processes_is_refused(quickly, tmp_path):
    recipe = PRETRAIN_ONLY.with_name("tiny_rl.py")
    job = Job(quickly, tmp_path / "rl", 2, *ROWS_OVER_BOTH, verb="rl", recipe=recipe)
    assert job.end() == [1, 1] and "would share a row" in job.output(0)


@pytest.mark.parametrize("arguments", [(), pytest.param(ROWS_OVER_BOTH, marks=pytest.mark.slow)])
def test_one_killed_the_others_say_so_and_another_number_of_processes_resumes(
    really, quickly, tmp_path, whole, arguments
):
    job = Job(really, tmp_path / "job", 2, *arguments)
    job.wait_for(f"step 6/{STEPS}")
    job.processes[1].kill()
    assert job.end() == [75, -signal.SIGKILL], job.output(0)
    message = job.output(0).strip().splitlines()[-1]
    assert "another process ended" in message and "Rerun the same command on every machine" in message
    assert "Traceback" not in job.output(0)

    resumed_from = max(steps_saved(job.directory))
    assert 4 <= resumed_from < STEPS
    again = Job(quickly, tmp_path / "job", 1)  # it has compiled already
    assert again.end() == [0], again.output(0)
    assert f"resumed at step {resumed_from}" in again.output(0)
    assert_same(losses(job.directory), whole)


@pytest.mark.slow
def test_coordinator_killed_the_others_end_with_the_status_that_asks_for_a_restart(really, tmp_path):
    job = Job(really, tmp_path / "job", 2)
    job.wait_for(f"step 4/{STEPS}")
    job.processes[0].kill()
    assert job.end() == [-signal.SIGKILL, 75], job.output(1)
    assert "Rerun the same command" in job.output(1).strip().splitlines()[-1]


@pytest.mark.slow
def test_a_signal_to_one_process_is_a_request_to_all(really, quickly, tmp_path, whole):
    job = Job(really, tmp_path / "job", 2)
    job.wait_for(f"step 4/{STEPS}")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.end() == [143, 143], job.output(0)
    assert 4 < max(steps_saved(job.directory)) < STEPS
    again = Job(quickly, tmp_path / "job", 1)
    assert again.end() == [0], again.output(0)
    assert_same(losses(job.directory), whole)


def test_an_environment_that_contradicts_itself_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert main(["pretrain", str(PRETRAIN_ONLY), "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES set without JAX_PROCESS_ID" in errors
    assert "Traceback" not in errors
