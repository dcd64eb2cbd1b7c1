"""Signals as a request to save and leave."""

import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from stepjax.training.preemption import StopRequest


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
