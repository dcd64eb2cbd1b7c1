"""Accelerator specifications: one table of devices for plans and measurements.

Sources

    peak FLOP/s, clock      dense bfloat16, from the vendors; TPU cores are in pallas_kernels.chips. CPUs have no stated
                            figure, so their peak is measured
    HBM limit               what the compiler grants a program: `available HBM (15.75G)` in its out-of-memory error,
                            libtpu 0.0.52 (tests/planning/test_planning_steps.py checks it)
    HBM bandwidth           cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x
    ICI bandwidth           one link, one way, measured by jax-ml.github.io/scaling-book/tpus; tpu7x has v5p's nominal
                            figure (1,200 GB/s over six links, both ways), so we use v5p's measured one
    DCN bandwidth           a host's network cards divided by its chips, same documents; half is assumed lost to
                            protocol and contention
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """One JAX device of a TPU generation."""

    chip: str  # key of pallas_kernels.chips.CHIPS
    cores: int  # TensorCores per device: two on v5p ("megacore")
    devices_per_chip: int
    hbm_limit_gib: float  # available to a program
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s, one ICI link, one way
    dcn_bandwidth: float  # bytes/s

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return CHIPS[self.chip].bf16_tflops * 1e12 * self.cores

    @property
    def clock_hz(self) -> float:
        return CHIPS[self.chip].clock_ghz * 1e9


TPUS = {
    facts.chip: facts
    for facts in (
        DeviceFacts("v5e", 1, 1, 15.75, 819e9, 45e9, 1.56e9),
        DeviceFacts("v5p", 2, 1, 95.73, 2765e9, 90e9, 3.1e9),
        DeviceFacts("v6e", 1, 1, 31.24, 1640e9, 90e9, 6.25e9),
        DeviceFacts("tpu7x", 1, 2, 94.74, 3690e9, 90e9, 3.1e9),
    )
}

# Dense bfloat16 FLOP/s by prefix of `jax.Device.device_kind`; the longest match wins.
_PEAK_BF16 = {
    "TPU v4": 275e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
} | {kind: facts.peak_flops for facts in TPUS.values() for kind in CHIPS[facts.chip].device_kinds}


def peak_flops(device: Any) -> float | None:
    """Peak FLOP/s of a JAX device, the denominator of MFU: from the table, measured on CPUs, None if unknown."""
    if device.platform == "cpu":  # simulated devices share one processor
        return _measured_cpu_peak() / jax.local_device_count()
    kind = max((kind for kind in _PEAK_BF16 if device.device_kind.startswith(kind)), key=len, default=None)
    return None if kind is None else _PEAK_BF16[kind]


def _measured_cpu_peak(size: int = 1024) -> float:
    """Median of five float32 matrix products; takes about a tenth of a second."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
