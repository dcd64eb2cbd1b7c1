"""Rows of numbers from what the device returned, and the line that shows them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipe import config

from stepjax.data.mixture import Skipped
from stepjax.errors import TrainingDivergedError
from stepjax.training.metrics import fetch_rows, format_line, interval_means

SOURCES = ("transcribe", "arithmetic")


def metrics(**changes):
    """Of two sources; groups are (source 0 text, source 0 image, source 1 text, source 1 image)."""
    plain = {key: jnp.float32(0.5) for key in ("accuracy", "z", "param_norm", "update_norm", "learning_rate")}
    sums = {
        "loss_X": jnp.array([0.0, 6.0, 8.0, 1.0]),
        "correct_X": jnp.array([0.0, 2.0, 1.0, 1.0]),
        "weight_X": jnp.array([0.0, 3.0, 4.0, 1.0]),
    }
    return plain | sums | {"loss": jnp.float32(15 / 8), "grad_norm": jnp.float32(1.5)} | changes


def test_losses_are_means_over_the_tokens_of_a_source_and_of_a_modality():
    assert tuple(source.name for source in config.data.sources) == SOURCES
    ((step, row),) = fetch_rows(config, [(7, metrics(), ())])
    assert step == 7
    assert row["loss"] == 15 / 8
    assert row["loss/text"] == 8 / 4
    assert row["loss/image"] == 7 / 4
    assert row["loss/source/transcribe"] == 6 / 3
    np.testing.assert_allclose(row["loss/source/arithmetic"], 9 / 5)
    np.testing.assert_allclose(row["accuracy/source/transcribe"], 2 / 3)
    np.testing.assert_allclose(row["accuracy/source/arithmetic"], 2 / 5)
    assert all(type(value) is float for value in row.values())


def test_a_source_or_modality_without_tokens_has_no_number():
    ((_, row),) = fetch_rows(config, [(1, metrics(weight_X=jnp.array([0.0, 0.0, 4.0, 0.0])), ())])
    assert "loss/image" not in row and "loss/source/transcribe" not in row and "accuracy/source/transcribe" not in row
    assert "loss/text" in row and "loss/source/arithmetic" in row


def test_skipped_records_are_counted():
    bad = Skipped("a", "torn")
    rows = dict(fetch_rows(config, [(1, metrics(), ()), (2, metrics(), (bad, bad))]))
    assert "skipped" not in rows[1] and rows[2]["skipped"] == 2


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_names_the_first_bad_step_and_the_range(key, value):
    pending = [(step, metrics(**({key: jnp.float32(value)} if step >= 13 else {})), ()) for step in range(11, 16)]
    with pytest.raises(TrainingDivergedError, match=r"at step 13 \(checked steps 11 to 15\)") as error:
        fetch_rows(config, pending)
    assert "\n" not in str(error.value) and "learning rates" in str(error.value)


def test_interval_means_leave_out_steps_that_lack_a_number():
    rows = [(1, {"loss": 1.0, "loss/text": 1.0}), (2, {"loss": 3.0, "loss/image": 4.0, "grad_norm": 9.0})]
    assert interval_means(rows) == {"loss": 2.0, "loss/text": 1.0, "loss/image": 4.0}


def test_names_come_from_the_configuration():
    sources = tuple(dataclasses.replace(s, name=s.name.upper()) for s in config.data.sources)
    renamed = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    ((_, row),) = fetch_rows(renamed, [(1, metrics(), ())])
    assert {"loss/source/TRANSCRIBE", "loss/source/ARITHMETIC"} <= row.keys()


# The line -------------------------------------------------------------------------------------------------------------

METRICS = {
    "loss": 2.3412,
    "loss/image": 2.5119,
    "loss/text": 2.1043,
    "grad_norm": 0.8311,
    "learning_rate": 4.98e-5,
    "tokens_per_second": 12_345.6,
    "images_per_second": 85.12,
    "mfu": 0.4312,
    "step_seconds": 0.5334,
    "data_wait": 0.0042,
    "packing/tokens": 0.981,
    "packing/vision": 0.842,
    "seconds_since_checkpoint": 62.4,
}
LINE = (
    "step 1200/50000  533ms  loss 2.341 (img 2.51 txt 2.10)  grad 0.831  lr 4.98e-5  12.3k tok/s  85.1 img/s  "
    "mfu 43.1%  wait 0.4%  pack 98/84%  ckpt 62s  eta 7h14m"
)


def test_a_line_shows_everything_within_160_columns():
    assert format_line(1200, 50_000, METRICS | {"unknown": 3.0}) == LINE
    assert len(LINE) <= 160


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, "step 3/9"),
        ({"loss/text": 1.5}, "step 3/9  loss (txt 1.50)"),
        ({"packing/tokens": 0.5}, "step 3/9  pack 50/-%"),
        ({"loss": float("nan"), "grad_norm": float("inf")}, "step 3/9  loss nan  grad inf"),
        ({"tokens_per_second": float("nan"), "mfu": float("nan")}, "step 3/9  nan tok/s  mfu nan%"),
        ({"step_seconds": float("nan")}, "step 3/9  nan  eta nan"),
        ({"step_seconds": np.float32(2.0)}, "step 3/9  2.00s  eta 12s"),
    ],
)
def test_only_what_is_present_is_shown_and_nan_is_shown_as_nan(metrics, expected):
    assert format_line(3, 9, metrics) == expected
