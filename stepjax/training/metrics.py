"""Training metrics: losses from the device, rates and slot use, and the log line that shows them.

    step 1200/50000  533ms  loss 2.341 (img 2.51 txt 2.10)  grad 0.831  lr 4.98e-5  12.3k tok/s  85.1 img/s  mfu 43.1%
    wait 0.4%  pack 98/84%  ckpt 62s  eta 7h14m

(All on one line. The duration after the step is that of one step, "pack" the share of token and view slots in use,
"ckpt" the time since the last checkpoint.)
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepjax.config import PretrainConfig
from stepjax.data.loader import HostBatch
from stepjax.errors import TrainingDivergedError
from stepjax.figures import human_number, human_time
from stepjax.models.flops import training_flops

Row = dict[str, float]

_PLAIN = ("loss", "accuracy", "z", "grad_norm", "param_norm", "update_norm", "learning_rate")
_OF_CODEC = ("bits_per_value", "balance")  # only with model.tofc


def fetch_rows(config: PretrainConfig, pending: list[tuple[int, Any, tuple]]) -> list[tuple[int, Row]]:
    """One row of plain numbers per step, from (step, device metrics, skipped records) since the last fetch.

    Raises:
        TrainingDivergedError: a loss or gradient norm is not finite; names the first bad step and the range checked.
    """
    names = [source.name for source in config.data.sources]
    rows = []
    for step, metrics, skipped in jax.device_get(pending):
        row = {key: float(metrics[key]) for key in (*_PLAIN, *_OF_CODEC) if key in metrics}
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
            f"nothing was saved since. Start a run with another --name and lower learning rates (schedule.phases) or a "
            f"lower optimizer.clip_norm, or look at the records of these steps"
        )
    return rows


_MEANS = ("loss", "loss/image", "loss/text", "bits_per_value")


def interval_means(rows: list[tuple[int, Row]]) -> Row:
    """Mean losses over some steps, for the log line: single steps are noisy."""
    values = {key: [row[key] for _, row in rows if key in row] for key in _MEANS}
    return {key: float(np.mean(numbers)) for key, numbers in values.items() if numbers}


class Meter:
    """Wall time, time spent waiting for data, and slots in use since the last summary.

    `share` is this process's fraction of the global batch's rows.
    """

    def __init__(self, config: PretrainConfig, peak_flops: float | None, num_devices: int, *, share: float = 1.0):
        self._config, self._peak_flops, self._num_devices, self._share = config, peak_flops, num_devices, share
        self.reset()

    def reset(self) -> None:
        self._since, self._waited, self._used, self._steps = time.monotonic(), 0.0, np.zeros(4), 0

    def wait_for(self, batches: Iterator[HostBatch], running: Mapping[str, Any] | None = None) -> HostBatch:
        """The next batch. `running` is the result of the step dispatched last: while the devices compute it, no time is
        lost. If it is done by the time that the batch comes, the whole wait counts: at most that was lost."""
        start = time.monotonic()
        batch = next(batches)
        if running is None or all(value.is_ready() for value in running.values()):
            self._waited += time.monotonic() - start
        self._used += batch.used
        self._steps += 1
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def summary(self) -> Row:
        """Rates over all devices since the last summary; starts the next interval.

        Empty without a step since then, as after the first step, whose time is excluded because of compilation.
        """
        if not self._steps:
            return {}
        config, batch, seconds, steps = self._config, self._config.batch, time.monotonic() - self._since, self._steps
        # Assumes that other processes' rows are equally full, a good approximation.
        tokens, views, crops, pairs = (float(used) for used in self._used / self._share)
        rows = steps * batch.rows
        summary = {
            "step_seconds": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "images_per_second": views / seconds,
            "data_wait": self._waited / seconds,
            "packing/tokens": tokens / (rows * batch.tokens),
            "packing/vision": (views + crops) / max(rows * (batch.global_views + batch.crops), 1),
        }
        if self._peak_flops is not None:
            flops = training_flops(
                config.model,
                tokens=tokens,
                attention_pairs=pairs,
                global_views=views,
                crops=crops,
                global_grid=config.images.global_grid,
                crop_grid=config.images.crop_grid,
            )
            summary["mfu"] = flops / seconds / (self._peak_flops * self._num_devices)
        self.reset()
        return summary


def format_line(step: int, num_steps: int, metrics: Mapping[str, Any]) -> str:
    """The log line of a step, with only the fields present in `metrics`. NaN is shown as NaN."""
    parts = [f"step {step}/{num_steps}"]
    for keys, text in _FIELDS:
        values = [float(metrics[key]) if key in metrics else None for key in keys]
        if any(value is not None for value in values):
            parts.append(text(*values))
    if "step_seconds" in metrics and step < num_steps:
        parts.append(f"eta {human_time((num_steps - step) * float(metrics['step_seconds']))}")
    return "  ".join(parts)


def _losses(loss: float | None, image: float | None, text: float | None) -> str:
    parts = [f"{name} {value:.2f}" for name, value in (("img", image), ("txt", text)) if value is not None]
    whole = "" if loss is None else f" {loss:.3f}"
    return f"loss{whole}" + (f" ({' '.join(parts)})" if parts else "")


def _packing(tokens: float | None, vision: float | None) -> str:
    return "pack " + "/".join("-" if share is None else f"{100 * share:.0f}" for share in (tokens, vision)) + "%"


# Metrics and how to format their values; where a field takes several, None marks an absent one.
_FIELDS: tuple[tuple[tuple[str, ...], Callable[..., str]], ...] = (
    (("step_seconds",), human_time),
    (("loss", "loss/image", "loss/text"), _losses),
    (("bits_per_value",), lambda bits: f"{bits:.2f} bit"),
    (("grad_norm",), lambda norm: f"grad {norm:.3g}"),
    (("learning_rate",), lambda rate: "lr " + f"{rate:.2e}".replace("e-0", "e-")),
    (("tokens_per_second",), lambda rate: f"{human_number(rate)} tok/s"),
    (("images_per_second",), lambda rate: f"{human_number(rate)} img/s"),
    (("mfu",), lambda fraction: f"mfu {100 * fraction:.1f}%"),
    (("data_wait",), lambda fraction: f"wait {100 * fraction:.1f}%"),
    (("packing/tokens", "packing/vision"), _packing),
    (("seconds_since_checkpoint",), lambda seconds: f"ckpt {human_time(seconds)}"),
)


class Profile:
    """Traces the steps of `logging.profile`, from first to last, for xprof or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._first, self._last = steps or (0, 0)
        self._directory, self._running = directory, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and step == self._last:
            jax.block_until_ready(state)
            self.__exit__()
