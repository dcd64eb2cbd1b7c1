"""A run of `stepjax rl` that is killed at any instant and started again leaves what an unbroken run leaves."""

import random
import re
import signal
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from run_files import read_metrics, steps_saved
from tiny_rl import config as tiny

from stepjax.models.step_vl import init_model
from stepjax.post_training.step import make_optimizers, new_state
from stepjax.training.checkpoint import Checkpointer

RECIPE = Path(__file__).parents[1] / "tiny_rl.py"
SAVING = "orbax-checkpoint-tmp"  # the directory that a checkpoint is written to is made


def final_state(directory: Path):
    make = partial(new_state, config=tiny, optimizers=make_optimizers(tiny))
    with Checkpointer(directory / "checkpoints", keep=tiny.checkpoint.keep) as checkpointer:
        assert checkpointer.latest_step() == tiny.iterations
        return checkpointer.restore(jax.eval_shape(lambda: make(init_model(tiny.model, tiny.numerics))))


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if not re.match("seconds|tokens_per_second", key)}


MOMENTS = [
    (signal.SIGKILL, "iteration 1/", 0.5),
    (signal.SIGKILL, SAVING, 0.05),
    (signal.SIGTERM, "iteration 3/", 0.02),
]


@pytest.mark.parametrize(
    "mode, moments",
    [
        ("strict", [(signal.SIGKILL, "iteration 2/", 0.3)]),
        pytest.param("strict", MOMENTS, marks=pytest.mark.slow),
        pytest.param("one step off", MOMENTS, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_instant_and_started_again_the_result_is_the_same(mode, moments, forked, tmp_path):
    """Complaint 12: the same prompts, answers, metrics and parameters. One step off, answers wait in a file."""
    options = ["--rollout.one-step-off"] if mode == "one step off" else []

    def run(out, press=None):
        """Status, output and iterations saved of `stepjax rl`, in a process of its own."""
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        arguments = ["rl", str(RECIPE), "--out", str(out), *options]
        status = forked.start(arguments, log, press=press).wait()
        said = log.read_text()
        assert "Traceback" not in said, said
        return status, said, steps_saved(out / "tiny_rl")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, said, _ = run(whole)
    assert status == 0, said

    rng = random.Random(0)
    delivered, saved = [], []
    for number, moment, spread in moments:
        status, said, saved = run(broken, dict(moment=moment, delay=rng.uniform(0, spread), number=number))
        if status == 0:
            break
        assert status == (-number if number == signal.SIGKILL else 128 + number), said
        delivered.append(number)
    else:
        before = saved
        status, said, saved = run(broken)
        assert status == 0, said
        assert f"resumed after iteration {before[-1]} from" in said
    assert delivered.count(signal.SIGKILL) >= 1

    rows, unbroken = read_metrics(broken / "tiny_rl"), read_metrics(whole / "tiny_rl")
    assert [row["step"] for row in rows] == list(range(1, tiny.iterations + 1))
    assert [without_times(row) for row in rows] == [without_times(row) for row in unbroken]
    (state, data_state, _), (unbroken_state, unbroken_data_state, _) = (
        final_state(directory / "tiny_rl") for directory in (broken, whole)
    )
    assert data_state == unbroken_data_state
    leaves, unbroken_leaves = jax.tree.leaves(state), jax.tree.leaves(unbroken_state)
    assert len(leaves) == len(unbroken_leaves) > 100
    for array, unbroken_array in zip(leaves, unbroken_leaves, strict=True):
        np.testing.assert_array_equal(array, unbroken_array)
    assert (whole / "tiny_rl" / "samples.html").stat().st_size > 1000
