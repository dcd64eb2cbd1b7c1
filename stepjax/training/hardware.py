"""Peak matrix throughput of a device, the denominator of MFU."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one jax device, as the makers state them. A TPU v7x chip is two devices.
_PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1155e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """FLOP/s of a device by its kind; measured on CPUs, which have no figure of their own; None where unknown."""
    if device.platform == "cpu":
        # Simulated devices share the one processor.
        return _measured_cpu_peak() / jax.local_device_count()
    kinds = sorted((kind for kind in _PEAK_BF16 if device.device_kind.startswith(kind)), key=len)
    return _PEAK_BF16[kinds[-1]] if kinds else None


def _measured_cpu_peak(size: int = 1024) -> float:
    """The best matrix product we can get out of it, float32; about a tenth of a second."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
