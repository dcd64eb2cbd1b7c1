"""A run that is killed at any instant and started again leaves what an unbroken run leaves, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from run_files import RECIPE, read_metrics, steps_saved, without_speed
from tiny_recipe import config as tiny

from stepjax.models.step_vl import init_model
from stepjax.training.checkpoint import Checkpointer
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.step import new_state

TIMEOUT = 300  # seconds; a start takes a few on a quiet machine


class Process:
    """`stepjax pretrain` on the tiny recipe, without evaluation, in a process of its own."""

    def __init__(self, out: Path, cache: Path):
        self.directory = out / "tiny"
        self._log = open(out / "log", "a+")
        self._began = self._log.seek(0, os.SEEK_END)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        recipe = out / "recipe.py"
        recipe.write_text(
            f"import dataclasses, sys\nsys.path.insert(0, {str(RECIPE.parent)!r})\nfrom tiny_recipe import config\n"
            "from stepjax.config import EvaluationConfig\n"
            "config = dataclasses.replace(config, evaluation=EvaluationConfig())\n"
        )
        command = [sys.executable, "-m", "stepjax.cli", "pretrain", str(recipe), "--out", str(out)]
        self._process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)

    @property
    def output(self) -> str:
        self._log.seek(self._began)
        return self._log.read()

    def wait_until(self, happened) -> bool:
        """Whether `happened()` came true before the process ended."""
        deadline = time.monotonic() + TIMEOUT
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.output
            if happened():
                return True
            time.sleep(0.001)
        return False

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        try:
            status = self._process.wait(TIMEOUT)
        finally:
            self._process.kill()  # where it hangs, or the test is interrupted
        self.output_at_end = self.output
        self._log.close()
        return status


def is_saving(directory: Path) -> bool:
    return any("tmp" in path.name for path in (directory / "checkpoints").glob("*"))


def final_state(directory: Path):
    schedule = learning_rate(tiny.schedule, tiny.tokens_per_step)

    def state():
        model = init_model(tiny.model, tiny.numerics)
        return new_state(model, make_optimizer(tiny.optimizer, schedule, model))

    with Checkpointer(directory / "checkpoints", keep=tiny.checkpoint.keep) as checkpointer:
        assert checkpointer.latest_step() == tiny.num_steps
        return checkpointer.restore(jax.eval_shape(state))


def test_killed_at_any_instant_and_started_again_the_result_is_the_same(tmp_path):
    whole, broken, cache = tmp_path / "whole", tmp_path / "broken", tmp_path / "cache"
    whole.mkdir()
    broken.mkdir()
    process = Process(whole, cache)
    assert process.end() == 0, process.output_at_end

    # Where in the run the next signal falls, spread over a random time after that. KILL during saves among them.
    rng = random.Random(0)
    directory = broken / "tiny"
    plan = [
        (signal.SIGKILL, lambda: "first step done" in process.output, 0.05),
        (signal.SIGKILL, lambda: is_saving(directory), 0.01),
        (signal.SIGTERM, lambda: "first step done" in process.output, 0.2),
        (signal.SIGKILL, lambda: is_saving(directory), 0.1),
    ]
    delivered, saved_before = [], []
    for number, moment, spread in plan:
        process = Process(broken, cache)
        if process.wait_until(moment):
            time.sleep(rng.uniform(0, spread))
            process.send(number)
        status = process.end()
        log = process.output_at_end
        assert "Traceback" not in log, log
        if status == 0:
            break
        assert status == (-number if number == signal.SIGKILL else 128 + number), log
        delivered.append(number)
        saved_before.append(steps_saved(directory))
        if number == signal.SIGTERM:
            assert f"SIGTERM: saved step {saved_before[-1][-1]} in " in log and "same command" in log
    else:
        process = Process(broken, cache)
        assert process.end() == 0, process.output_at_end
        assert saved_before[-1] == [] or f"resumed at step {saved_before[-1][-1]} from" in process.output_at_end
    assert delivered.count(signal.SIGKILL) >= 2

    rows, unbroken = read_metrics(directory), read_metrics(whole / "tiny")
    assert [row["step"] for row in rows] == list(range(1, tiny.num_steps + 1))
    assert [without_speed(row) for row in rows] == [without_speed(row) for row in unbroken]

    (state, data_state, _), (unbroken_state, unbroken_data_state, _) = (
        final_state(directory),
        final_state(whole / "tiny"),
    )
    assert data_state == unbroken_data_state
    leaves, unbroken_leaves = jax.tree.leaves(state), jax.tree.leaves(unbroken_state)
    assert len(leaves) == len(unbroken_leaves) > 50
    for array, unbroken_array in zip(leaves, unbroken_leaves, strict=True):
        np.testing.assert_array_equal(array, unbroken_array)
