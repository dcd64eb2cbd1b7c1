"""Who is alive, and who keeps the others waiting, in a run of several processes.

Without this a lost machine is a run that hangs: the others wait in a collective for ever. Every process writes a beat
into JAX's coordination service every few seconds, and reads those of the others. No clocks are compared: a process is
lost when its count has stood still for `lost_after` seconds on the reader's own clock.
"""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from stepjax.config import HeartbeatConfig
from stepjax.distributed import leave

Phase = Literal["starting", "data", "step", "saving", "evaluating", "done"]
_KEY = "stepjax/heartbeat"


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process says of itself."""

    count: int  # beats so far
    step: int
    phase: Phase
    host: str


@dataclasses.dataclass
class _Seen:
    beat: Beat
    beat_changed: float
    place_changed: float  # place: step and phase


class Watch:
    """Draws conclusions from beats; holds no clock and no connection."""

    def __init__(self, config: HeartbeatConfig):
        self._config = config
        self._seen: dict[int, _Seen] = {}
        self._warned: set[tuple[int, int, Phase]] = set()

    def observe(self, beats: dict[int, Beat], now: float) -> None:
        for process, beat in beats.items():
            before = self._seen.get(process)
            if before is None:
                self._seen[process] = _Seen(beat, now, now)
            elif beat != before.beat:
                moved = (beat.step, beat.phase) != (before.beat.step, before.beat.phase)
                self._seen[process] = _Seen(beat, now, now if moved else before.place_changed)

    def lost(self, now: float) -> str | None:
        """A message about processes that have fallen silent, or that nobody can go on waiting for."""
        silent = {
            process: seen
            for process, seen in self._seen.items()
            if seen.beat.phase != "done" and now - seen.beat_changed >= self._config.lost_after
        }
        if silent:
            return " and ".join(
                f"process {process} on {seen.beat.host} has been silent for {now - seen.beat_changed:.0f} s "
                f"(last in {seen.beat.phase}, step {seen.beat.step})"
                for process, seen in sorted(silent.items())
            )
        late = {p: seen for p, seen in self._late(now).items() if self._waits(seen, now) >= self._config.give_up_after}
        return " and ".join(self._describe(p, seen, now) for p, seen in sorted(late.items())) or None

    def warnings(self, now: float) -> list[str]:
        """About processes that the others have been waiting for; once for each place that one is late at."""
        messages = []
        for process, seen in sorted(self._late(now).items()):
            place = process, seen.beat.step, seen.beat.phase
            if self._waits(seen, now) >= self._config.warn_after and place not in self._warned:
                self._warned.add(place)
                messages.append(self._describe(process, seen, now) + "; the others wait for it")
        return messages

    def _late(self, now: float) -> dict[int, _Seen]:
        """Processes that have not begun a step that others are in: those wait in its collectives."""
        furthest = max((s.beat.step for s in self._seen.values() if s.beat.phase == "step"), default=-1)
        return {
            process: seen
            for process, seen in self._seen.items()
            if seen.beat.phase in ("data", "saving", "evaluating") and seen.beat.step <= furthest
        }

    def _waits(self, seen: _Seen, now: float) -> float:
        return now - seen.place_changed

    def _describe(self, process: int, seen: _Seen, now: float) -> str:
        doing = {"data": "waiting for data", "saving": "saving", "evaluating": "evaluating"}[seen.beat.phase]
        waited = self._waits(seen, now)
        return f"process {process} on {seen.beat.host} has been {doing} for {waited:.0f} s before step {seen.beat.step}"


class Heartbeat:
    """A context in which this process beats, and is ended with a message when another is lost. Alone, it does nothing.

    `at` tells where the main thread is.
    """

    def __init__(
        self,
        config: HeartbeatConfig,
        warn: Callable[[str], None],
        *,
        end: Callable[[str], None] = leave,
    ):
        self._config, self._warn, self._end = config, warn, end
        self._watch = Watch(config)
        self._lock = threading.Lock()
        self._count, self._step = 0, 0
        self._phase: Phase = "starting"
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        if jax.process_count() > 1:
            self._exchange()
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self._thread is None:
            return
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            self._blame(str(error))
        self.at("done", self._step)
        self._stopping.set()
        self._thread.join()

    def at(self, phase: Phase, step: int) -> None:
        """`step` counts as the progress line does: the step that is being prepared or taken, or was last taken."""
        self._phase, self._step = phase, step

    def _run(self) -> None:
        while not self._stopping.wait(self._config.every):
            try:
                self._exchange()
            except Exception as error:  # the service is in process 0, and gone with it
                self._end(f"the coordinator of the run does not answer ({str(error).splitlines()[0]})")
                return
            now = time.monotonic()
            for message in self._watch.warnings(now):
                self._warn(message)
            if message := self._watch.lost(now):
                self._end(message)
                return
        self._publish()

    def _exchange(self) -> None:
        self._publish()
        beats = {}
        for key, value in _client().key_value_dir_get(_KEY):
            beats[int(key.rpartition("/")[2])] = Beat(**json.loads(value))
        with self._lock:
            self._watch.observe(beats, time.monotonic())

    def _publish(self) -> None:
        self._count += 1
        beat = Beat(self._count, self._step, self._phase, os.uname().nodename)
        key = f"{_KEY}/{jax.process_index()}"
        _client().key_value_set(key, json.dumps(dataclasses.asdict(beat)), allow_overwrite=True)

    def _blame(self, error: str) -> None:
        """A collective failed: mostly because of another process, which the beats will tell."""
        deadline = time.monotonic() + self._config.lost_after + 2 * self._config.every
        while time.monotonic() < deadline:  # `_run` ends the process when it finds someone lost
            time.sleep(self._config.every)
        self._end(f"a step failed, and every process is still there: {error.splitlines()[0]}")


def _client() -> Any:
    """JAX's key-value store over all processes. It has no public name; Orbax uses it in the same way."""
    from jax._src import distributed

    return distributed.global_state.client
