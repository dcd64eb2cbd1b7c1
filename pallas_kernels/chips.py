"""Supported TPU generations, and the one that a program is being compiled for.

A kernel's block sizes depend on the chip that will run it, which this machine need not have. So the chip comes from the
mesh under which the program is lowered (`jax.set_mesh`), real or from a topology description, never from
`jax.devices()`.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.checks import check_choice


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel's schedule needs to know about a TPU core."""

    name: str
    topology: str  # smallest topology that libtpu compiles for
    device_kinds: tuple[str, ...]  # values of jax.Device.device_kind
    matrix_width: int  # rows and columns of one matrix unit
    clock_ghz: float  # tpu7x: inferred as the peak divided by the FLOPs per cycle of two 256-wide units
    bf16_tflops: float  # peak of one core, from Google (pltpu.get_tpu_info says 920 for v6e)
    vmem_mib: int  # physical, per core


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", ("TPU v5 lite", "TPU v5e"), 128, 1.5, 197.0, 128),
        Chip("v5p", "v5p:2x2x1", ("TPU v5", "TPU v5p"), 128, 1.75, 229.5, 64),
        Chip("v6e", "v6e:2x2", ("TPU v6 lite", "TPU v6e"), 256, 1.75, 918.0, 128),
        Chip("tpu7x", "tpu7x:2x2x1", ("TPU7x", "TPU v7x", "TPU7"), 256, 2.2, 1155.0, 64),
    )
}


def current_chip(default: str = "v5e") -> Chip:
    """The chip of the current mesh; `default` without a TPU mesh, as in interpret mode on a CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    kind = getattr(device, "device_kind", "")
    for chip in CHIPS.values():
        if kind in chip.device_kinds:
            return chip
    return CHIPS[default]


def compile_only_environment() -> None:
    """Let libtpu start quietly on a machine without a TPU. Call it before JAX first uses libtpu."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling uses no device, so several processes may do it at once
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def compile_only_mesh(name: str, num_devices: int = 1, axis: str = "x") -> jax.sharding.Mesh:
    """A one-axis mesh of compile-only TPU devices to use with `jax.set_mesh(mesh)`; no TPU needed.

    Raises:
      ArgumentError: `name` is not in CHIPS.
    """
    check_choice("name", name, tuple(CHIPS))
    compile_only_environment()
    topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name].topology)
    return jax.sharding.Mesh(np.array(topology.devices[:num_devices]), (axis,))
