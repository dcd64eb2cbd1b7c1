"""--print says exactly what would run: the same words reach the tools, whatever is in them."""

import shlex

import pytest
from launch_tools import AWKWARD, commands, heredoc

TPU = ["--name", "vl", "--zone", "us-z", "--project", "p q"]
CLUSTER = ["--name", "vl", "--image", "i:1", "--slices", "2", "--accelerator", "v5p-128", "--cache-dir", "gs://b/c d"]


def remote(words: list[str]) -> str:
    """The shell code that a call of gcloud's ssh runs."""
    return next(word.removeprefix("--command=") for word in words if word.startswith("--command="))


def test_tpu_vm(launcher):
    arguments = [*TPU, "--accelerator", "v6e-8", "--create", "--spot", "--restarts", "3", "--", *AWKWARD]
    create, archive, scp, install, start, follow = commands(launcher.printed("tpu_vm.sh", *arguments))
    where = ["--zone=us-z", "--project=p q"]
    assert create == [
        *"gcloud compute tpus tpu-vm create vl".split(),
        *where,
        *"--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot".split(),
    ]
    assert archive[:1] == ["git"] and archive[3] == "archive" and archive[-1] == "HEAD"
    assert scp[4:] == ["scp", str(launcher.directory / "stepjax-vl.tar.gz"), "vl:stepjax.tar.gz", *where, "--worker=0"]
    assert start[:-1] == [*"gcloud compute tpus tpu-vm ssh vl".split(), *where, "--worker=0"]
    assert "uv pip install" in remote(install) and "--editable '.[tpu]'" in remote(install)
    words = shlex.split(remote(start))
    assert words[:5] == ["cd", "stepjax", "&&", "bash", "launch/on_host.sh"]
    assert words[5:] == [*"--action start --run vl --restarts 3 --chip v6e --".split(), *AWKWARD]
    assert shlex.split(remote(follow))[5:] == "--action follow --run vl".split()


def test_tpu_pod_reaches_every_host_and_follows_the_first(launcher):
    arguments = [*TPU, "--accelerator", "v5p-32", "--cache-dir", "gs://b/c d", "--internal-ip", "--", *AWKWARD]
    archive, *others = commands(launcher.printed("tpu_pod.sh", *arguments))
    assert [next(word for word in words if "--worker" in word) for words in others] == ["--worker=all"] * 3 + [
        "--worker=0"
    ]
    assert all("--internal-ip" in words for words in others)
    start = shlex.split(remote(others[2]))
    assert start[5 : start.index("--")] == [
        *"--action start --run vl --restarts 10 --chip v5p --cache-dir".split(),
        "gs://b/c d",
        "--distributed",
    ]
    assert start[start.index("--") + 1 :] == AWKWARD


@pytest.mark.parametrize("action", ["follow", "stop", "status", "delete"])
def test_the_other_actions_need_no_command(launcher, action):
    [words] = commands(launcher.printed("tpu_pod.sh", *TPU, "--accelerator", "v5p-32", "--action", action))
    if action == "delete":
        assert words[4:6] == ["delete", "vl"] and words[-1] == "--quiet"
    else:
        assert words[4:6] == ["ssh", "vl"] and f"--action {action} --run vl" in remote(words)


def test_queued_resource(launcher):
    arguments = [*TPU, "--accelerator", "v5p-32", "--spot", "--valid-until", "6h", "--", *AWKWARD]
    state, create, _, scp, _, start, _, status, delete = commands(launcher.printed("queued_resource.sh", *arguments))
    assert state[:5] == "gcloud compute tpus queued-resources list".split()
    assert state[-2:] == ['--filter=name ~ "/vl$"', "--format=value(state.state)"]
    assert create[4:6] == ["create", "vl"]
    assert create[8:] == [
        *"--node-id=vl --accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5 --spot".split(),
        "--valid-until-duration=6h",
    ]
    assert "--worker=all" in scp and "--distributed" in remote(start)
    assert shlex.split(remote(start))[-len(AWKWARD) :] == AWKWARD
    assert "--action status" in remote(status)
    assert delete[4:6] == ["delete", "vl"] and delete[-2:] == ["--force", "--quiet"]


def test_xpk(launcher):
    [words] = commands(launcher.printed("xpk.sh", *CLUSTER, "--cluster", "c", "--", *AWKWARD))
    assert words[:3] == ["xpk", "workload", "create"]
    command = words.pop().removeprefix("--command=")
    assert set(words[3:]) == {
        *"--workload=vl --cluster=c --tpu-type=v5p-128 --num-slices=2 --docker-image=i:1 --priority=medium".split(),
        *"--max-restarts=50 --restart-on-exit-codes=75 --termination-grace-period-seconds=300".split(),
        *"--env=STEPJAX_DISTRIBUTED=auto".split(),
        "--env=JAX_COMPILATION_CACHE_DIR=gs://b/c d",
    }
    setup, run = command.split(" && exec ")
    assert setup.startswith("flags=$(python -m stepjax.xla_flags v5p) && export LIBTPU_INIT_ARGS=")
    assert shlex.split(run) == AWKWARD


def test_one_process_joins_nobody(launcher):
    arguments = ["--name", "vl", "--image", "i", "--accelerator", "v6e-4", "--", "stepjax"]
    assert "STEPJAX_DISTRIBUTED" not in launcher.printed("xpk.sh", "--cluster", "c", *arguments)
    assert "STEPJAX_DISTRIBUTED" not in launcher.printed("gke_jobset.sh", *arguments)


def test_slurm(launcher):
    arguments = (
        "--name vl --nodes 4 --gpus-per-node 8 --partition p --exclusive --cache-dir /shared/c --restarts 7".split()
    )
    printed = launcher.printed("slurm_gpu.sh", *arguments, "--", *AWKWARD)
    assert commands(printed) == [["mkdir", "-p", "runs/logs"], ["sbatch"]]
    job = heredoc(printed, "END_OF_JOB").splitlines()
    settings = {line.removeprefix("#SBATCH --") for line in job if line.startswith("#SBATCH")}
    assert settings == {
        *"job-name=vl nodes=4 ntasks-per-node=8 gpus-per-node=8 cpus-per-task=8 time=24:00:00 signal=TERM@300".split(),
        *"requeue open-mode=append output=runs/logs/%x-%j.log partition=p exclusive".split(),
    }
    srun = next(shlex.split(line) for line in job if line.startswith("srun"))
    assert srun == [*"srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=120 --label".split(), *AWKWARD]


def test_local(launcher):
    arguments = ["--processes", "2", "--gpu-each", "--cache-dir", "/c d", "--chip", "h100", "--", *AWKWARD]
    printed = launcher.printed("local.sh", *arguments)
    assert 'flags=$(python -m stepjax.xla_flags h100) && export XLA_FLAGS="$flags ${XLA_FLAGS-}"' in printed
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("env ")]
    port = lines[0][1].rpartition(":")[2]
    for number, words in enumerate(lines):
        assert words == [
            "env",
            f"JAX_COORDINATOR_ADDRESS=127.0.0.1:{port}",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={number}",
            f"JAX_LOCAL_DEVICE_IDS={number}",
            "JAX_COMPILATION_CACHE_DIR=/c d",
            *AWKWARD,
            *f"2>&1 | tee -a runs/logs/process-{number}.log &".split(),
        ]
    assert len(lines) == 2 and printed.endswith("\nwait\n")
    assert not (launcher.directory / "runs").exists()


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("tpu_vm.sh", [*TPU, "--accelerator", "v6e-8", "--create"]),
        ("tpu_pod.sh", [*TPU, "--accelerator", "v5p-32"]),
        ("gke_jobset.sh", CLUSTER),
        ("xpk.sh", [*CLUSTER, "--cluster", "c"]),
        ("slurm_gpu.sh", ["--name", "vl"]),
    ],
)
def test_what_runs_is_what_was_printed(launcher, script, arguments):
    for tool in ("gcloud", "git", "kubectl", "xpk", "sbatch"):
        launcher.stand_in(tool)
    arguments = [*arguments, "--", *AWKWARD]
    printed = launcher.printed(script, *arguments)
    assert not launcher.calls()  # --print runs nothing
    done = launcher.run(script, *arguments)
    assert done.returncode == 0, done.stderr
    called = [words for words in launcher.calls() if "status" not in words]  # of git: is all committed?
    assert called == [words for words in commands(printed) if words[0] != "mkdir"]
    if "<<'" in printed:
        end = printed.splitlines()[-1]
        assert (launcher.directory / "calls.stdin").read_text() == heredoc(printed, end)


def test_pasting_what_was_printed_runs_it_too(launcher):
    for tool in ("gcloud", "git", "kubectl"):
        launcher.stand_in(tool)
    for script, arguments in (("tpu_vm.sh", [*TPU, "--accelerator", "v6e-8"]), ("gke_jobset.sh", CLUSTER)):
        printed = launcher.printed(script, *arguments, "--", *AWKWARD)
        pasted = launcher.directory / "pasted.sh"
        pasted.write_text(printed)
        (launcher.directory / "calls").unlink(missing_ok=True)
        done = launcher.run(str(pasted))
        assert done.returncode == 0, done.stderr
        assert launcher.calls() == commands(printed)
