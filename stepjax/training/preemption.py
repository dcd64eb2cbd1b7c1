"""SIGTERM and SIGINT as a request to save and leave, as cloud machines announce that they will be taken away."""

import signal
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """A context in which the first signal is remembered, and a second one acts as it did before.

    Machines that shut down tell every process of a group, and parents tell their children once more: a SIGTERM within
    `repeats` seconds of the first is the same one.

    The trainer looks at `received` between steps, saves, and returns: nothing is interrupted half-way.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT), *, repeats: float = 2.0):
        self._signals, self._repeats, self._received_at = signals, repeats, 0.0
        self._previous: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def after(self, step: int, *, agree_every: int) -> signal.Signals | None:
        """The signal to act on now that `step` is done.

        A signal reaches several processes between different steps, or one of them only, and yet all must leave after
        the same step: they agree at the multiples of `agree_every`.
        """
        if jax.process_count() == 1:
            return self.received
        if step % agree_every:
            return None
        with jax.transfer_guard("allow"):
            number = int(np.max(multihost_utils.process_allgather(np.array(self.received or 0))))
        return signal.Signals(number) if number else None

    def _remember(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif number != signal.SIGTERM or now - self._received_at >= self._repeats:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
