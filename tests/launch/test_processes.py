"""Runs of several processes on this machine: the losses of one, and what happens when a process is killed.

Every run trains the tiny recipe on four simulated devices, spread over one, two or four processes.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_files import RECIPE, read_metrics, steps_saved

DEVICES, STEPS, TIMEOUT = 4, 12, 300


class Job:
    """`stepjax pretrain` in several processes, one output file each."""

    def __init__(self, out: Path, cache: Path, processes: int, *arguments: str):
        self.out, self.directory = out, out / "tiny"
        out.mkdir(exist_ok=True)
        recipe = out / "recipe.py"
        recipe.write_text(
            f"import dataclasses, sys\nsys.path.insert(0, {str(RECIPE.parent)!r})\nfrom tiny_recipe import config\n"
            "from stepjax.config import BatchConfig, EvaluationConfig, HeartbeatConfig, Phase, ScheduleConfig\n"
            "config = dataclasses.replace(config, evaluation=EvaluationConfig(),\n"
            "    batch=BatchConfig(rows=4, tokens=128, global_views=3, crops=24),\n"
            f"    schedule=ScheduleConfig(phases=(Phase(tokens={STEPS} * 512, start=3e-3, end=3e-4),),\n"
            "                            warmup_tokens=512),\n"
            "    heartbeat=HeartbeatConfig(every=0.5, lost_after=8))\n"
        )
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        shared = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache / str(processes)),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self.logs = [open(out / f"log{index}", "w+") for index in range(processes)]
        self.processes = []
        for index, log in enumerate(self.logs):
            place = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            command = [sys.executable, "-m", "stepjax.cli", "pretrain", str(recipe), "--out", str(out), *arguments]
            environment = shared | (place if processes > 1 else {})
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

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
            for log in self.logs:
                log.close()


def losses(directory: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(directory)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The losses of one process with all four devices."""
    job = Job(tmp_path_factory.mktemp("whole"), cache, 1)
    assert job.end() == [0], job.output(0)
    assert sorted(losses(job.directory)) == list(range(1, STEPS + 1))
    return losses(job.directory)


def assert_same(actual: dict[int, float], expected: dict[int, float]) -> None:
    """Up to the order of sums between devices, which the libraries that exchange them choose."""
    assert sorted(actual) == sorted(expected)
    np.testing.assert_allclose([actual[s] for s in expected], list(expected.values()), rtol=2e-5)


@pytest.mark.parametrize(
    "processes, arguments",
    [
        # Those two are in the tests of killed processes too, up to the step of the kill and from there on.
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(4, (), marks=pytest.mark.slow),
        (2, ("--mesh.fsdp", "1", "--mesh.context", "4")),
    ],
)
def test_losses_are_those_of_one_process(tmp_path, cache, whole, processes, arguments):
    """The last mesh spreads every row over both processes: each must feed the rows of both."""
    job = Job(tmp_path / "job", cache, processes, *arguments)
    assert job.end() == [0] * processes, job.output(0)
    assert_same(losses(job.directory), whole)


def test_one_killed_the_others_say_so_and_another_number_of_processes_goes_on(tmp_path, cache, whole):
    job = Job(tmp_path / "job", cache, 2)
    job.wait_for(f"step 6/{STEPS}")
    job.processes[1].kill()
    statuses = job.end()
    assert statuses == [75, -signal.SIGKILL], job.output(0)
    message = job.output(0).strip().splitlines()[-1]
    assert re.search(r"process 1 on \S+ has been silent for .*run the same command again", message) or (
        "another process ended" in message and "run the same command again" in message
    ), job.output(0)
    assert "Traceback" not in job.output(0)

    resumed_from = max(steps_saved(job.directory))
    assert 4 <= resumed_from < STEPS
    again = Job(tmp_path / "job", cache, 4)
    assert again.end() == [0] * 4, again.output(0)
    assert f"resumed at step {resumed_from}" in again.output(0)
    assert_same(losses(job.directory), whole)


@pytest.mark.slow
def test_coordinator_killed_the_others_end_with_the_status_that_asks_for_a_restart(tmp_path, cache):
    job = Job(tmp_path / "job", cache, 2)
    job.wait_for(f"step 4/{STEPS}")
    job.processes[0].kill()
    assert job.end() == [-signal.SIGKILL, 75], job.output(1)
    assert "run the same command again" in job.output(1).strip().splitlines()[-1]


@pytest.mark.slow
def test_a_signal_to_one_process_is_a_request_to_all(tmp_path, cache, whole):
    job = Job(tmp_path / "job", cache, 2)
    job.wait_for(f"step 4/{STEPS}")
    job.processes[1].send_signal(signal.SIGTERM)
    statuses = job.end()
    assert statuses == [143, 143], job.output(0)
    assert 4 < max(steps_saved(job.directory)) < STEPS
    again = Job(tmp_path / "job", cache, 1)
    assert again.end() == [0], again.output(0)
    assert_same(losses(job.directory), whole)


def test_environment_that_contradicts_itself_is_refused(tmp_path):
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "stepjax.cli", "pretrain", str(RECIPE), "--out", str(tmp_path)]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert refused.returncode == 1
    assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES set without JAX_PROCESS_ID" in refused.stderr
    assert "Traceback" not in refused.stderr
