"""Signals, and processes that keep the others waiting, by a clock of the tests' own.

Processes that really die are in tests/launch/test_processes.py.
"""

import dataclasses
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from jax._src import distributed
from jax.experimental import multihost_utils

from stepjax.config import HeartbeatConfig
from stepjax.errors import ConfigError, RecordError
from stepjax.training.interruption import Place, StopRequest, Stragglers, Watchdog

# Signals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls():
    """Signals that reach the handlers from before."""
    received = []
    previous = {s: signal.signal(s, lambda n, _: received.append(n)) for s in (signal.SIGTERM, signal.SIGINT)}
    yield received
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_the_second_acts_as_before(calls, number):
    with StopRequest(repeats=0) as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number and calls == []
        os.kill(os.getpid(), number)
        assert calls == [number]
        assert stop.received is number


def test_a_sigterm_that_comes_twice_at_once_is_one_request(calls):
    """As of a machine that shuts down: it tells every process, and parents hand it on to their children."""
    with StopRequest(repeats=60) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM and calls == []
        os.kill(os.getpid(), signal.SIGINT)
        assert calls == [signal.SIGINT]


def test_after_one_signal_the_other_acts_as_before_too(calls):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGTERM and calls == [signal.SIGINT]


def test_leaving_restores_the_handlers(calls):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_only_the_signals_asked_for_are_taken(calls):
    with StopRequest((signal.SIGTERM,)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None and calls == [signal.SIGINT]


def test_one_process_acts_after_any_step(calls):
    with StopRequest() as stop:
        assert stop.after(3, agree_every=10) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(3, agree_every=10) is signal.SIGTERM


def test_several_processes_act_on_the_signal_of_any_one_after_the_same_step(calls, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array([own, others]))
    with StopRequest() as stop:
        others = 0
        assert stop.after(10, agree_every=10) is None
        others = int(signal.SIGTERM)
        assert stop.after(11, agree_every=10) is None
        assert stop.after(20, agree_every=10) is signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        others = 0
        assert stop.after(21, agree_every=10) is None
        assert stop.after(30, agree_every=10) is signal.SIGINT


# Stragglers ----------------------------------------------------------------------------------------------------------

CONFIG = HeartbeatConfig(every=1, lost_after=10, warn_after=20, give_up_after=100)


class Run:
    """Processes whose places are read every second."""

    def __init__(self):
        self.stragglers, self.now = Stragglers(CONFIG), 0.0
        self.at = {0: ("step", 1), 1: ("step", 1)}

    def pass_seconds(self, seconds):
        for _ in range(seconds):
            self.now += 1
            self.stragglers.observe({p: Place(*place, f"host{p}") for p, place in self.at.items()}, self.now)

    def warnings(self):
        return self.stragglers.warnings(self.now)

    def given_up(self):
        return self.stragglers.given_up(self.now)


def test_processes_that_are_in_the_same_step_keep_nobody_waiting():
    run = Run()
    run.pass_seconds(1000)
    assert run.given_up() is None and run.warnings() == []


@pytest.mark.parametrize("phase, doing", [("data", "waiting for data"), ("saving", "saving")])
def test_a_late_process_is_warned_of_once_and_given_up_in_the_end(phase, doing):
    run = Run()
    run.at[1] = (phase, 1)
    run.pass_seconds(20)
    assert run.warnings() == []
    run.pass_seconds(1)
    late = f"process 1 on host1 has been {doing} for 20 s before step 1"
    assert run.warnings() == [late + "; the others wait for it"]
    run.pass_seconds(1)
    assert run.warnings() == []
    run.pass_seconds(78)
    assert run.given_up() is None
    run.pass_seconds(1)
    assert run.given_up() == late.replace("20 s", "100 s")


def test_a_late_process_that_moves_on_is_warned_of_anew():
    run = Run()
    for step in (1, 2):
        run.at = {0: ("step", step), 1: ("data", step)}
        run.pass_seconds(25)
        assert len(run.warnings()) == 1


def test_processes_that_all_wait_for_data_are_not_late():
    """Nobody waits in a collective: the run is as slow as its data, which the log line shows."""
    run = Run()
    run.at = {0: ("data", 3), 1: ("data", 3)}
    run.pass_seconds(500)
    assert run.given_up() is None and run.warnings() == []


class Store(dict):
    """JAX's key-value store."""

    def key_value_set(self, key, value, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, key):
        return list(self.items())


@pytest.fixture
def two_processes(monkeypatch):
    store = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.global_state, "client", store)
    return store


def test_a_process_that_keeps_this_one_waiting_is_named_and_ends_it(two_processes, caplog):
    config = HeartbeatConfig(every=0.01, lost_after=1, warn_after=0.02, give_up_after=0.2)
    two_processes["stepjax/place/1"] = json.dumps(["data", 3, "other"])
    ended = threading.Event()
    messages = []
    with Watchdog(config, end=lambda message: (messages.append(message), ended.set())) as watchdog:
        watchdog.at("step", 3)
        assert ended.wait(60)
    assert messages[0].startswith("process 1 on other has been waiting for data for 0 s before step 3")
    assert "the others wait for it" in caplog.text
    assert json.loads(two_processes["stepjax/place/0"])[:2] == ["step", 3]


def test_a_failed_step_waits_for_jax_to_end_the_process(two_processes):
    """JAX does so within `lost_after` if another process is lost. If none is, the run restarts too."""
    config = HeartbeatConfig(every=0.01, lost_after=0.2)
    messages = []
    began = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError), Watchdog(config, end=messages.append):
        raise jax.errors.JaxRuntimeError("Gloo: connection reset\nmore")
    assert time.monotonic() - began > 0.2
    assert messages == ["a step failed, but every process is still alive: Gloo: connection reset"]
    with pytest.raises(RecordError), Watchdog(dataclasses.replace(config, lost_after=1000), end=pytest.fail):
        raise RecordError("a user's mistake waits for nobody")


def test_alone_nothing_is_watched():
    with Watchdog(CONFIG, end=pytest.fail) as watchdog:
        watchdog.at("step", 1)
        assert watchdog._thread is None


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="heartbeat.lost_after=5.0: must exceed heartbeat.every"):
        dataclasses.replace(CONFIG, every=5.0, lost_after=5.0)
    with pytest.raises(ConfigError, match="heartbeat.every=0: must be positive"):
        dataclasses.replace(CONFIG, every=0)
