"""The peak of a device goes by its kind; the longest name that fits decides."""

import dataclasses
from typing import Any

import jax
import pytest

from pallas_kernels.chips import CHIPS
from stepjax import chips
from stepjax.chips import TPUS, peak_flops


@dataclasses.dataclass
class Device:
    platform: str
    device_kind: str


def peak(platform: str, kind: str) -> float | None:
    device: Any = Device(platform, kind)
    return peak_flops(device)


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1155e12),
    ],
)
def test_tpus_by_every_name_they_go_by(kind, flops):
    assert peak("tpu", kind) == flops


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_gpus_by_the_beginning_of_their_names(kind, flops):
    assert peak("gpu", kind) == flops


@pytest.mark.parametrize("platform, kind", [("tpu", "TPU v9"), ("gpu", "NVIDIA GeForce RTX 4090"), ("gpu", "")])
def test_unknown_devices_have_no_peak(platform, kind):
    assert peak(platform, kind) is None


def test_simulated_cpu_devices_share_one_measured_peak(monkeypatch):
    monkeypatch.setattr(chips, "_measured_cpu_peak", lambda: 8e11)
    assert peak_flops(jax.devices("cpu")[0]) == pytest.approx(8e11 / jax.local_device_count())


def test_measured_peak_of_a_cpu_is_of_a_plausible_size():
    assert 1e8 < chips._measured_cpu_peak(size=256) < 1e14


@pytest.mark.parametrize("chip", TPUS)
def test_planned_and_measured_mfu_have_the_same_denominator(chip):
    for kind in CHIPS[chip].device_kinds:
        assert peak("tpu", kind) == TPUS[chip].peak_flops
