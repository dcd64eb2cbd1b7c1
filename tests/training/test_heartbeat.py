"""Conclusions from beats, by a clock of the test's own; and processes that really die are in test_processes.py."""

import dataclasses

import pytest

from stepjax.config import HeartbeatConfig
from stepjax.errors import ConfigError
from stepjax.training.heartbeat import Beat, Heartbeat, Watch

CONFIG = HeartbeatConfig(every=1, lost_after=10, warn_after=20, give_up_after=100)


class Run:
    """Processes whose beats reach the watch every second."""

    def __init__(self, processes=2):
        self.watch, self.now, self.count = Watch(CONFIG), 0.0, 0
        self.at = {process: ("step", 1) for process in range(processes)}
        self.silent = {}

    def pass_seconds(self, seconds):
        for _ in range(seconds):
            self.now += 1
            self.count += 1
            beats = {p: Beat(self.count, step, phase, f"host{p}") for p, (phase, step) in self.at.items()}
            self.watch.observe(beats | self.silent, self.now)

    def falls_silent(self, process):
        phase, step = self.at.pop(process)
        self.silent[process] = Beat(self.count, step, phase, f"host{process}")


def test_nobody_is_lost_while_all_beat():
    run = Run()
    run.pass_seconds(1000)
    assert run.watch.lost(run.now) is None and run.watch.warnings(run.now) == []


def test_a_silent_process_is_lost_and_named_with_where_it_was():
    run = Run(3)
    run.at[2] = ("data", 7)
    run.pass_seconds(5)
    run.falls_silent(2)
    run.pass_seconds(9)
    assert run.watch.lost(run.now) is None
    run.pass_seconds(2)
    assert run.watch.lost(run.now) == "process 2 on host2 has been silent for 11 s (last in data, step 7)"


def test_a_process_that_is_done_may_be_silent():
    run = Run()
    run.at[1] = ("done", 9)
    run.pass_seconds(1)
    run.falls_silent(1)
    run.pass_seconds(500)
    assert run.watch.lost(run.now) is None


@pytest.mark.parametrize("phase, doing", [("data", "waiting for data"), ("saving", "saving")])
def test_a_late_process_is_warned_of_once_and_given_up_in_the_end(phase, doing):
    run = Run()
    run.at[1] = (phase, 1)
    run.pass_seconds(15)
    assert run.watch.warnings(run.now) == []
    run.pass_seconds(6)
    late = f"process 1 on host1 has been {doing} for 20 s before step 1"
    assert run.watch.warnings(run.now) == [late + "; the others wait for it"]
    run.pass_seconds(1)
    assert run.watch.warnings(run.now) == []
    run.pass_seconds(77)
    assert run.watch.lost(run.now) is None
    run.pass_seconds(2)
    assert run.watch.lost(run.now) == late.replace("20 s", "100 s")


def test_a_late_process_that_moves_on_is_warned_of_anew():
    run = Run()
    for step in (1, 2):
        run.at = {0: ("step", step), 1: ("data", step)}
        run.pass_seconds(25)
        assert len(run.watch.warnings(run.now)) == 1


def test_all_waiting_for_data_are_not_late():
    """Nobody waits in a collective: the run is as slow as its data, and says so by other means."""
    run = Run()
    run.at = {0: ("data", 3), 1: ("data", 3)}
    run.pass_seconds(500)
    assert run.watch.lost(run.now) is None and run.watch.warnings(run.now) == []


def test_alone_nothing_beats():
    with Heartbeat(CONFIG, warn=pytest.fail, end=pytest.fail) as heart:
        heart.at("step", 1)
        assert heart._thread is None


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="heartbeat.lost_after=5.0: must exceed heartbeat.every"):
        dataclasses.replace(CONFIG, every=5.0, lost_after=5.0)
    with pytest.raises(ConfigError, match="heartbeat.every=0: must be positive"):
        dataclasses.replace(CONFIG, every=0)
