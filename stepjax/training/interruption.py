"""What ends a run early: a signal, or a process that keeps the others waiting.

Signals ask a run to checkpoint and exit, for example when a cloud machine is about to be preempted.

JAX's coordination service ends every process when one falls silent (see `stepjax.distributed`). It does not notice a
process that is alive but stuck, for example reading data, while the others wait for it in a collective. So each process
publishes its own progress and reads that of the others.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from stepjax.config import HeartbeatConfig
from stepjax.distributed import leave
from stepjax.errors import StepjaxError

_log = logging.getLogger(__name__)


class StopRequest:
    """A context manager that remembers the first SIGTERM or SIGINT; a second one has its previous effect.

    A machine that shuts down signals every process of a group, and parents forward the signal to their children, so a
    SIGTERM within `repeats` seconds of the first counts as the same request. The trainer reads `received` between
    steps, so no step is interrupted half-way.
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

        Processes may receive a signal between different steps, or only one may receive it, but all must stop after the
        same step, so they agree at multiples of `agree_every`. (JAX's `reached_preemption_sync_point` supports neither
        SIGINT nor single-process runs.)
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


Phase = Literal["starting", "data", "step", "saving", "evaluating"]
_HELD_UP = {"data": "waiting for data", "saving": "saving", "evaluating": "evaluating"}


class Place(NamedTuple):
    """The progress of a process."""

    phase: Phase
    step: int  # the one being prepared or taken
    host: str


class Stragglers:
    """Finds processes that keep the others waiting, from where each one is and for how long. Has no clock."""

    def __init__(self, config: HeartbeatConfig):
        self._config = config
        self._since: dict[int, tuple[Place, float]] = {}
        self._warned: set[tuple[int, Place]] = set()

    def observe(self, places: dict[int, Place], now: float) -> None:
        for process, place in places.items():
            if process not in self._since or self._since[process][0] != place:
                self._since[process] = place, now

    def warnings(self, now: float) -> list[str]:
        """Warnings about processes that are `warn_after` late; one per process and place."""
        late = self._late(now, self._config.warn_after)
        new = [message for key, message in late.items() if key not in self._warned]
        self._warned |= late.keys()
        return [f"{message}; the others wait for it" for message in new]

    def given_up(self, now: float) -> str | None:
        """A message about processes that are `give_up_after` late, or None."""
        return " and ".join(self._late(now, self._config.give_up_after).values()) or None

    def _late(self, now: float, seconds: float) -> dict[tuple[int, Place], str]:
        """Processes that have not begun a step in whose collectives others wait for them."""
        furthest = max((place.step for place, _ in self._since.values() if place.phase == "step"), default=-1)
        return {
            (process, place): f"process {process} on {place.host} has been {_HELD_UP[place.phase]} for "
            f"{now - since:.0f} s before step {place.step}"
            for process, (place, since) in sorted(self._since.items())
            if place.phase in _HELD_UP and place.step <= furthest and now - since >= seconds
        }


class Watchdog:
    """A context manager that ends this process when another keeps it waiting too long. Single-process runs ignore it.

    The main thread reports its progress with `at`.
    """

    def __init__(self, config: HeartbeatConfig, *, end: Callable[[str], None] = leave):
        self._config, self._end = config, end
        self._place = Place("starting", 0, os.uname().nodename)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        # Collectives raise either of these when a process is lost. JAX then finds out which and ends this process.
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and not isinstance(error, StepjaxError):
            time.sleep(self._config.lost_after + self._config.every)
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._end(f"a step failed, but every process is still alive: {str(error).splitlines()[0]}")

    def at(self, phase: Phase, step: int) -> None:
        self._place = self._place._replace(phase=phase, step=step)

    def _watch(self) -> None:
        stragglers, published, key = Stragglers(self._config), None, "stepjax/place"
        # JAX's key-value store across processes has no public API; Orbax uses it the same way.
        from jax._src import distributed

        client: Any = distributed.global_state.client
        while not self._stopping.wait(self._config.every):
            try:
                if (place := self._place) != published:
                    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(place), allow_overwrite=True)
                    published = place
                values = client.key_value_dir_get(key)
            except jax.errors.JaxRuntimeError:
                return  # the coordinator is lost, and JAX will end this process
            now = time.monotonic()
            stragglers.observe({int(k.rpartition("/")[2]): Place(*json.loads(v)) for k, v in values}, now)
            for message in stragglers.warnings(now):
                _log.warning(message)
            if message := stragglers.given_up(now):
                self._end(message)
                return
