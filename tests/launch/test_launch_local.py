"""local.sh, run for real with a stand-in for stepjax: variables, logs, signals, a process that dies, restarts."""

import signal
import time

import pytest
from launch_tools import Launcher


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def starts(launcher):
    return [event for event in launcher.events() if event["event"] == "start"]


def saved(launcher):
    return {event["process"]: event["event"] for event in launcher.events() if event["event"].startswith("saved")}


def test_processes_find_each_other_and_their_lines_are_told_apart(launcher, worker):
    arguments = ["--processes", "2", "--gpu-each", "--cache-dir", "/a b", "--log-dir", "logs"]
    done = launcher.run("local.sh", *arguments, "--", *worker, "0")
    assert done.returncode == 0, done.stderr
    environments = {event["process"]: event["env"] for event in starts(launcher)}
    [address] = {each["JAX_COORDINATOR_ADDRESS"] for each in environments.values()}
    assert address.startswith("127.0.0.1:") and 20000 <= int(address.rpartition(":")[2]) < 60000
    for number, each in environments.items():
        assert each == {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
            "JAX_LOCAL_DEVICE_IDS": str(number),
            "JAX_COMPILATION_CACHE_DIR": "/a b",
        }
    assert sorted(environments) == [0, 1]
    expected = {f"[{n}] process {n} {what}" for n in (0, 1) for what in ("is here", "complains")}
    assert set(done.stdout.splitlines()) == expected
    for n in (0, 1):
        log = (launcher.directory / f"logs/process-{n}.log").read_text().splitlines()
        assert sorted(log) == [f"process {n} complains", f"process {n} is here"]


def test_one_process_is_left_alone(launcher, worker):
    done = launcher.run("local.sh", "--", *worker, "0")
    assert done.returncode == 0
    assert [event["env"] for event in starts(launcher)] == [{}]


def test_the_chips_flags_come_before_the_users_own(launcher, worker):
    launcher.stand_in("python", '#!/bin/bash\n[ "$*" = "-m stepjax.xla_flags v6e" ] && echo --of-the-chip\n')
    launcher.environment["LIBTPU_INIT_ARGS"] = "--my-own"
    assert launcher.run("local.sh", "--chip", "v6e", "--", *worker, "0").returncode == 0
    assert starts(launcher)[0]["env"] == {"LIBTPU_INIT_ARGS": "--of-the-chip --my-own"}
    done = launcher.run("local.sh", "--chip", "v99", "--", *worker, "0")
    assert done.returncode == 2 and "flags for the chip 'v99' could not be found" in done.stderr
    assert len(starts(launcher)) == 1


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process_once_and_ends_the_run(launcher, worker, number, status):
    process = launcher.start("local.sh", "--processes", "2", "--restarts", "5", "--", *worker, "wait")
    wait_for(lambda: len(starts(launcher)) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status, errors
    assert saved(launcher) == {n: f"saved after [{int(number)}]" for n in (0, 1)}
    assert len(starts(launcher)) == 2  # nothing was started again


def test_a_process_that_does_not_leave_is_killed_after_the_grace_time(launcher, worker):
    process = launcher.start("local.sh", "--processes", "2", "--grace", "1", "--", *worker, "wait", "deaf")
    wait_for(lambda: len(starts(launcher)) == 2)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 137 and "process 1 exited with status 137" in errors
    assert list(saved(launcher)) == [0]


def test_after_a_failure_all_stop_and_start_again_only_where_that_mends_something(tmp_path, worker):
    # What each process does, and: the run's status, how often the processes started, which were told to save.
    cases = {
        ("wait", "1"): (1, 1, {0}),
        ("1", "75"): (1, 1, set()),
        ("0", "2"): (2, 1, set()),
        ("wait", "75"): (75, 2, {0}),
        ("once:75",): (0, 2, set()),
        ("once:143",): (0, 2, set()),
    }
    arguments = ["--processes", "2", "--restarts", "1", "--delay", "0"]
    launchers, processes = {}, {}
    for orders in cases:  # all at once, for each waits more than it works
        directory = tmp_path / "-".join(orders)
        directory.mkdir()
        launchers[orders] = Launcher(directory)
        processes[orders] = launchers[orders].start("local.sh", *arguments, "--", *worker, *orders)
    for orders, (status, times, told) in cases.items():
        _, errors = processes[orders].communicate(timeout=60)
        assert processes[orders].returncode == status, errors
        assert sorted(each["process"] for each in starts(launchers[orders])) == sorted([0, 1] * times), errors
        assert set(saved(launchers[orders])) == told
        assert len({each["env"]["JAX_COORDINATOR_ADDRESS"] for each in starts(launchers[orders])}) == times
        assert errors.count("restart 1 of 1") == times - 1
