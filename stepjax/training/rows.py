"""Metric rows: what the device returned for each step, as plain numbers under the names that trackers record."""

from typing import Any

import jax
import numpy as np

from stepjax.config import PretrainConfig
from stepjax.errors import TrainingDivergedError

Row = dict[str, float]

_PLAIN = ("loss", "accuracy", "z", "grad_norm", "param_norm", "update_norm", "learning_rate")


def fetch_rows(config: PretrainConfig, pending: list[tuple[int, Any, tuple]]) -> list[tuple[int, Row]]:
    """One row a step, from (step, device metrics, skipped records) of the steps since the last fetch.

    Raises:
        TrainingDivergedError: a loss or gradient norm is not finite; the range of steps and the first bad one are
        named.
    """
    names = [source.name for source in config.data.sources]
    rows = []
    for step, metrics, skipped in jax.device_get(pending):
        row = {key: float(metrics[key]) for key in _PLAIN}
        # Groups are numbered 2 * source + has_images.
        loss, correct, weight = (metrics[key].reshape(len(names), 2) for key in ("loss_X", "correct_X", "weight_X"))
        for column, modality in enumerate(("text", "image")):
            if total := weight[:, column].sum():
                row[f"loss/{modality}"] = float(loss[:, column].sum() / total)
        for i, name in enumerate(names):
            if total := weight[i].sum():
                row[f"loss/source/{name}"] = float(loss[i].sum() / total)
                row[f"accuracy/source/{name}"] = float(correct[i].sum() / total)
        if skipped:
            row["skipped"] = len(skipped)
        rows.append((step, row))

    bad = [step for step, row in rows if not np.isfinite([row["loss"], row["grad_norm"]]).all()]
    if bad:
        raise TrainingDivergedError(
            f"loss or gradient norm is not finite at step {bad[0]} (checked steps {rows[0][0]} to {rows[-1][0]}); "
            f"nothing was saved since. Give a new run of another --name lower learning rates (schedule.phases) or a "
            f"lower optimizer.clip_norm, or look at the records of these steps"
        )
    return rows


def interval_means(rows: list[tuple[int, Row]]) -> Row:
    """Mean losses over some steps, for the progress line: single steps are noisy."""
    values = {key: [row[key] for _, row in rows if key in row] for key in ("loss", "loss/image", "loss/text")}
    return {key: float(np.mean(numbers)) for key, numbers in values.items() if numbers}
