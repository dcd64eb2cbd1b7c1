"""A run that is killed at any instant and started again leaves what an unbroken run leaves, bit for bit."""

import random
import signal
from pathlib import Path

import jax
import numpy as np
from run_files import PRETRAIN_ONLY, read_metrics, steps_saved, without_speed
from tiny_recipe import config as tiny

from stepjax.models.step_vl import init_model
from stepjax.training.checkpoint import Checkpointer
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.step import new_state

SAVING = "orbax-checkpoint-tmp"  # the directory that a checkpoint is written to is made


def final_state(directory: Path):
    schedule = learning_rate(tiny.schedule, tiny.tokens_per_step)

    def state():
        model = init_model(tiny.model, tiny.numerics)
        return new_state(model, make_optimizer(tiny.optimizer, schedule, model))

    with Checkpointer(directory / "checkpoints", keep=tiny.checkpoint.keep) as checkpointer:
        assert checkpointer.latest_step() == tiny.num_steps
        return checkpointer.restore(jax.eval_shape(state))


def test_killed_at_any_instant_and_started_again_the_result_is_the_same(forked, tmp_path):
    def run(out, press=None):
        """Status, output and steps saved of `stepjax pretrain`, in a process of its own."""
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        status = forked.start(["pretrain", str(PRETRAIN_ONLY), "--out", str(out)], log, press=press).wait()
        said = log.read_text()
        assert "Traceback" not in said, said
        return status, said, steps_saved(out / "tiny")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, said, _ = run(whole)
    assert status == 0, said

    # Moments in the run, and the seconds after them over which the signal is spread. KILL during saves among them.
    rng = random.Random(0)
    plan = [
        (signal.SIGKILL, "first step done", 0.02),
        (signal.SIGKILL, SAVING, 0.03),
        (signal.SIGTERM, "step 6/", 0.02),
    ]
    delivered, saved = [], []
    for number, moment, spread in plan:
        status, said, saved = run(broken, dict(moment=moment, delay=rng.uniform(0, spread), number=number))
        if status == 0:
            break
        assert status == (-number if number == signal.SIGKILL else 128 + number), said
        delivered.append(number)
        if number == signal.SIGTERM:
            assert f"SIGTERM: saved step {saved[-1]} in " in said and "same command" in said
    else:
        before = saved
        status, said, saved = run(broken)
        assert status == 0, said
        assert before == [] or f"resumed at step {before[-1]} from" in said
    assert delivered.count(signal.SIGKILL) >= 2

    directory = broken / "tiny"
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
