"""What keeps a run going on other machines: on_host.sh for real; queued resources and Slurm with stand-ins for both."""

import subprocess
import time

import pytest
from launch_tools import AWKWARD, heredoc

RUN = ["--run", "vl", "--state-dir", "state", "--delay", "0", "--restarts", "2"]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_run_on_a_host_outlives_its_starter_and_is_stopped_by_name(launcher, worker):
    start = ["--action", "start", *RUN, "--distributed", "--cache-dir", "gs://b/c d", "--", *worker, "wait"]
    assert launcher.run("on_host.sh", *start).returncode == 0
    wait_for(lambda: len(launcher.events()) == 1)
    assert launcher.events()[0]["env"] == {"STEPJAX_DISTRIBUTED": "auto", "JAX_COMPILATION_CACHE_DIR": "gs://b/c d"}
    again = launcher.run("on_host.sh", *start)
    assert again.returncode == 0 and "is running already" in again.stderr
    assert launcher.run("on_host.sh", "--action", "status", *RUN).stdout == "running\n"
    assert launcher.run("on_host.sh", "--action", "stop", *RUN).returncode == 0
    assert [event["event"] for event in launcher.events()] == ["start", "saved after [15]"]
    assert launcher.run("on_host.sh", "--action", "status", *RUN).stdout == "ended 143\n"


@pytest.mark.parametrize("order, status, times", [("0", 0, 1), ("1", 1, 1), ("75", 75, 3), ("once:75", 0, 2)])
def test_follow_prints_the_log_and_ends_with_the_runs_status(launcher, worker, order, status, times):
    assert launcher.run("on_host.sh", "--action", "start", *RUN, "--", *worker, order).returncode == 0
    done = launcher.run("on_host.sh", "--action", "follow", *RUN)
    assert done.returncode == status
    assert done.stdout.count("process 0 is here") == done.stdout.count("process 0 complains") == times


# The state of the request, or the run's on the host, is the next line of a file; its last line stays.
GCLOUD = """#!/bin/bash
next() { head -n 1 "$1"; if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi; }
did() { echo "$*" >>did; }
case "$*" in
  *"queued-resources list"*) next states ;;
  *"--action status"*) status=$(next statuses); [ "$status" = unreachable ] && exit 255; echo "$status" ;;
  *"queued-resources "*) did "$4" ;;
  *" scp "*) did copy ;;
  *"--action start"*) did start ;;
  *"--action follow"*) did follow; exit 1 ;;
esac
"""


def queued(launcher, states, statuses, *arguments):
    """A run whose request and host are in these states at successive looks; what was done, and how it ended."""
    launcher.stand_in("gcloud", GCLOUD)
    launcher.stand_in("git")
    (launcher.directory / "states").write_text("".join(f"{state}\n" for state in states))
    (launcher.directory / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    base = ["--name", "vl", "--accelerator", "v5p-32", "--spot", "--poll", "0"]
    done = launcher.run("queued_resource.sh", *base, *arguments, "--", "stepjax")
    did = launcher.directory / "did"
    return done, did.read_text().split() if did.exists() else []


def test_a_preempted_queued_resource_is_asked_for_again(launcher):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]
    statuses = ["unknown", "unreachable", "unknown", "ended 0"]
    done, did = queued(launcher, states, statuses)
    assert done.returncode == 0, done.stderr
    once = ["create", "copy", "start", "follow", "delete"]
    assert did == once + once
    assert "the queued resource is SUSPENDED; asking for another one" in done.stderr


def test_a_lost_connection_is_taken_up_again_without_a_second_start(launcher):
    done, did = queued(launcher, ["ACTIVE"], ["running", "running", "running", "ended 0"], "--keep")
    assert (done.returncode, did) == (0, ["follow", "follow"])


def test_a_mistake_ends_it_with_its_status(launcher):
    done, did = queued(launcher, ["ACTIVE"], ["unknown", "ended 1"])
    assert (done.returncode, did) == (1, ["copy", "start", "follow", "delete"])


def test_a_run_that_can_go_on_is_started_again_on_the_same_tpu(launcher):
    done, did = queued(launcher, ["ACTIVE"], ["unknown", "ended 75", "running", "ended 0"], "--keep")
    assert (done.returncode, did) == (0, ["copy", "start", "follow", "start", "follow"])


def test_enough_is_enough(launcher):
    done, did = queued(launcher, ["FAILED"], [""], "--resubmits", "2")
    assert (done.returncode, did) == (75, ["delete", "delete"])
    assert "that was the last of --resubmits 2" in done.stderr


@pytest.mark.parametrize(
    "status, restarts_before, requeued",
    [(0, 0, False), (1, 0, False), (75, 0, True), (143, 49, True), (143, 50, False)],
)
def test_a_slurm_job_requeues_itself_where_that_mends_something(launcher, status, restarts_before, requeued):
    job = heredoc(launcher.printed("slurm_gpu.sh", "--name", "vl", "--", *AWKWARD), "END_OF_JOB")
    launcher.stand_in(
        "srun", f'#!/bin/bash\nprintf "%s\\n" "$@" "$XLA_FLAGS" "$STEPJAX_DISTRIBUTED" >srun\nexit {status}\n'
    )
    launcher.stand_in("scontrol")
    launcher.stand_in("sleep", "#!/bin/bash\n")
    launcher.stand_in("python", "#!/bin/bash\necho --of-the-chip\n")
    activate = launcher.directory / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts_before), "XLA_FLAGS": "--my-own"}
    done = subprocess.run(
        ["bash"], input=job, cwd=launcher.directory, env=launcher.environment | slurm, text=True, capture_output=True
    )
    assert done.returncode == status, done.stderr
    assert launcher.calls() == ([["scontrol", "requeue", "incomplete", "7"]] if requeued else [])
    ran = (launcher.directory / "srun").read_text().splitlines()
    assert ran[4:] == [*AWKWARD, "--of-the-chip --my-own", "auto"]
