"""What accelerators can do: one table of devices for plans and measurements.

Where the figures come from

    peak FLOP/s, clock      dense bfloat16, as the makers state them; those of TPU cores are in pallas_kernels.chips. A
                            CPU has no stated figure, so its peak is measured
    HBM limit               what the compiler offers a program: `available HBM (15.75G)` in its refusal of one that is
                            too large, libtpu 0.0.52 (tests/planning/test_planning_steps.py asks again)
    HBM bandwidth           cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x
    ICI bandwidth           one way of one link, as measured by jax-ml.github.io/scaling-book/tpus; tpu7x has v5p's
                            nominal figure (1,200 GB/s over six links, both ways), and is given v5p's measured one
    DCN bandwidth           network cards of a host over its chips, in the same documents; half of it is assumed lost to
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
    """One JAX device of a TPU generation that programs are planned for."""

    chip: str  # in pallas_kernels.chips.CHIPS
    cores: int  # TensorCores of the device: two on v5p ("megacore")
    devices_per_chip: int
    hbm_limit_gib: float  # what a program may use
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s, one way of one ICI link of the chip
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

# Dense bfloat16 FLOP/s by the beginning of `jax.Device.device_kind`; the longest match counts.
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
    """FLOP/s of a JAX device, the denominator of MFU: by its kind, measured on CPUs, None if unknown."""
    if device.platform == "cpu":  # simulated devices share the one processor
        return _measured_cpu_peak() / jax.local_device_count()
    kind = max((kind for kind in _PEAK_BF16 if device.device_kind.startswith(kind)), key=len, default=None)
    return None if kind is None else _PEAK_BF16[kind]


def _measured_cpu_peak(size: int = 1024) -> float:
    """The median of five matrix products, float32; about a tenth of a second."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
