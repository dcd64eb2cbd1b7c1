"""Instruments around the training loop: rates and slot use, and the profiler."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepjax.config import PretrainConfig
from stepjax.data.loader import HostBatch
from stepjax.models.flops import training_flops


class Meter:
    """Wall time, time spent waiting for data, and slots in use, since the last summary.

    `share` is the part of the global batch's rows that this process sees.
    """

    def __init__(self, config: PretrainConfig, peak_flops: float | None, num_devices: int, *, share: float = 1.0):
        self._config, self._peak_flops, self._num_devices, self._share = config, peak_flops, num_devices, share
        self.reset()

    def reset(self) -> None:
        self._since, self._waited, self._used, self._steps = time.monotonic(), 0.0, np.zeros(4), 0

    def wait_for(self, batches: Iterator[HostBatch]) -> HostBatch:
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        self._used += batch.used
        self._steps += 1
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def summary(self) -> dict[str, float]:
        """Rates over all devices since the last summary, under the names of `progress`; starts the next interval.

        Empty where no step was taken since: after a first step, whose time is that of its compilation.
        """
        if not self._steps:
            return {}
        config, batch, seconds, steps = self._config, self._config.batch, time.monotonic() - self._since, self._steps
        # Other rows hold as much, to a good approximation.
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


class Profile:
    """Traces the steps of `logging.profile`, first to last, for xprof or Perfetto."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory, self._running = steps, directory, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
