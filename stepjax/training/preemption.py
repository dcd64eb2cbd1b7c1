"""SIGTERM and SIGINT as a request to save and leave, as cloud machines announce that they will be taken away."""

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """A context in which the first signal is remembered, and a second one acts as it did before.

    The trainer looks at `received` between steps, saves, and returns: nothing is interrupted half-way.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)):
        self._signals = signals
        self._previous: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
