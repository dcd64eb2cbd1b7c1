"""A training process on a CPU sets its devices and its allocator, and leaves alone what the environment sets."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepjax.config import BatchConfig, MeshConfig
from stepjax.config_file import load_recipe
from stepjax.training.host import devices_for, num_cores

DEMO = load_recipe(Path(__file__).parents[2] / "configs" / "digits" / "pretrain.py")
REPORT = """
import ctypes, json, sys
calls = []
real = ctypes.CDLL
class Recording:
    def mallopt(self, *arguments): calls.append(arguments)
ctypes.CDLL = lambda name, *more, **options: Recording() if name is None else real(name, *more, **options)
from stepjax.config_file import load_recipe
from stepjax.config import MeshConfig
import dataclasses
from stepjax.training.host import prepare
config = load_recipe(sys.argv[1])
if sys.argv[2:] == ["fsdp"]:
    config = dataclasses.replace(config, mesh=MeshConfig())
prepare(config, config.batch.micro_rows)
ctypes.CDLL = real
import jax
print(json.dumps({"devices": len(jax.devices()), "mallopt": dict(calls)}))
"""


def prepared(*arguments, **environment):
    """What `prepare` leaves behind in a process with this environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_", "MALLOC_"))}
    clean.pop("GLIBC_TUNABLES", None)
    recipe = str(Path(__file__).parents[2] / "configs" / "digits" / "pretrain.py")
    command = [sys.executable, "-c", REPORT, recipe, *arguments]
    done = subprocess.run(command, env=clean | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("rows", "accumulation", "cores", "devices"),
    [(16, 1, 2, 2), (16, 1, 1, 1), (16, 1, 8, 8), (16, 1, 10, 8), (16, 2, 10, 8), (6, 2, 2, 1), (3, 1, 8, 3)],
)
def test_devices_divide_the_rows_of_a_micro_batch(rows, accumulation, cores, devices):
    batch = dataclasses.replace(DEMO.batch, rows=rows, accumulation=accumulation)
    assert devices_for(batch.micro_rows, cores) == devices


def test_the_demo_has_a_device_for_each_core_and_keeps_its_memory():
    found = prepared()
    assert found["devices"] == devices_for(DEMO.batch.micro_rows, num_cores())
    if sys.platform == "linux":
        assert {int(key) for key in found["mallopt"]} == {-1, -2, -4, -8}


@pytest.mark.parametrize(
    "environment", [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}]
)
def test_the_environments_devices_win(environment):
    assert prepared(**environment)["devices"] == 3


@pytest.mark.parametrize("environment", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}])
def test_the_environments_allocator_wins(environment):
    assert prepared(**environment)["mallopt"] == {}


def test_another_mesh_keeps_its_devices():
    assert prepared("fsdp")["devices"] == 1


def test_the_recipes_mesh_is_of_copies():
    assert DEMO.mesh == MeshConfig(data=-1, fsdp=1) and isinstance(DEMO.batch, BatchConfig)
