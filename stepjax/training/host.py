"""What makes training fast on a CPU: devices and an allocator, set before JAX starts, and options for the compiler.

The environment's own settings win.

Devices. Within one device XLA's CPU backend runs much on one thread: elementwise work, layouts, small products. With a
device for each core every core does its share of all of that. `mesh.data=-1` asks for as many copies as there are
devices, so there stepjax decides how many: at most the cores, and a divisor of the rows of a micro-batch.

Allocator. The backend allocates its buffers anew in every step. By default glibc returns large ones to the system,
which then clears every page of the next step's. Here freed memory stays with the process.
"""

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepjax.config import RunConfig
from stepjax.distributed import is_distributed

_DEVICE_COUNT = "xla_force_host_platform_device_count"
# Elementwise operations join the reductions and products of YNNPACK, instead of passing arrays through memory.
_YNNPACK = tuple(f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("DOT", "ELTWISE", "REDUCE"))
_FOREVER = 2**31 - 1
# Parameters of mallopt(3). One arena, because those of threads return memory however large the threshold is.
_MALLOPT = {"M_TRIM_THRESHOLD": (-1, _FOREVER), "M_TOP_PAD": (-2, 2**26), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}


def prepare(config: RunConfig, rows: int) -> None:
    """Call it before anything asks JAX for devices. Does nothing where an accelerator will train.

    `rows` are those of a micro-batch: copies of the model share them.
    With several processes the mesh depends on all of them: each keeps the devices that its environment gives it.
    """
    if not _trains_on_cpu():
        return
    if _keeps_default_allocator(os.environ) and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in _MALLOPT.values():
            libc.mallopt(parameter, value)
    import jax

    is_set = jax.config.values["jax_num_cpu_devices"] >= 0 or _DEVICE_COUNT in os.environ.get("XLA_FLAGS", "")
    if config.mesh.data == -1 and not is_set and not is_distributed():
        jax.config.update("jax_num_cpu_devices", devices_for(rows, num_cores()))


def compiler_options() -> dict[str, Any]:
    """XLA's options for the train step on JAX's default platform, as `jax.jit` takes them."""
    import jax

    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ",".join(_YNNPACK)}
    if 2 * jax.local_device_count() > num_cores():
        # Every device has a thread already; more would only wait for each other.
        options["xla_cpu_multi_thread_eigen"] = False
    return options


def devices_for(rows: int, cores: int) -> int:
    """The largest number of devices up to `cores` that divides the rows of a micro-batch."""
    return max(count for count in range(1, max(cores, 1) + 1) if rows % count == 0)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trains_on_cpu() -> bool:
    import jax

    platforms = jax.config.values["jax_platforms"]
    if platforms:
        return platforms.split(",")[0] == "cpu"
    has_tpu = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return not has_tpu and not importlib.metadata.entry_points(group="jax_plugins")


def _keeps_default_allocator(environment: Mapping[str, str]) -> bool:
    """Whether the environment leaves malloc alone."""
    tuned = any(name.startswith("MALLOC_") for name in environment)
    return not (tuned or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") or "LD_PRELOAD" in environment)
