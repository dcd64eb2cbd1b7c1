"""Names of TPU slices, and what libtpu makes of them."""

import pytest

from stepjax.chips import TPUS
from stepjax.errors import ConfigError
from stepjax.planning.topologies import SIZES, find


@pytest.mark.parametrize(
    ("name", "libtpu_name", "chips", "devices"),
    [
        ("v5p-128", "v5p:4x4x4", 64, 64),  # two TensorCores a chip, one device
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128),  # two devices a chip
        ("tpu7x-2", "tpu7x:1x1x1", 1, 2),
        ("V5P-256", "v5p:4x4x8", 128, 128),
        ("v5p:2x4x4", "v5p:2x4x4", 32, 32),
    ],
)
def test_names_count_what_their_users_count(name, libtpu_name, chips, devices):
    topology = find(name)
    assert (topology.libtpu_name, topology.chips, topology.num_devices) == (libtpu_name, chips, devices)


def test_slices_multiply_chips_and_devices():
    topology = find("v5e-16", slices=3)
    assert (topology.chips, topology.num_devices) == (48, 48)


@pytest.mark.parametrize(
    ("name", "helps"),
    [
        ("v5p-100", "v5p-128"),
        ("v5p-100", "TensorCores"),
        ("v5e-1024", "v5e-256"),
        ("h100-8", "v5p-128"),
        ("v6e:2x2x1", "v6e:4x8"),
        ("v5p:4x4", "v5p:4x4x8"),
        ("v5p", "v5p-"),
        ("", "v5e"),
        ("v5p-twelve", "v5p-"),
        ("v5p-\N{SUPERSCRIPT TWO}", "v5p-"),
        ("v5p:0x4x4", "v5p:4x4x8"),
        ("v5p:128", "v5p:4x4x8"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name, helps):
    with pytest.raises(ConfigError) as error:
        find(name)
    assert helps in str(error.value) and repr(name) in str(error.value)


def test_no_slices_is_refused():
    with pytest.raises(ConfigError, match="--slices 0"):
        find("v5e-4", slices=0)


def test_every_name_finds_a_slice_of_its_size():
    for generation, sizes in SIZES.items():
        for number in sizes:
            topology = find(f"{generation}-{number}")
            assert topology.chips * (2 if generation in ("v5p", "tpu7x") else 1) == number


def test_whole_cubes_and_rows_of_sixteen_are_closed():
    assert find("v5p-128").wrap == (True, True, True)
    assert find("v5p-64").wrap == (False, False, False)
    assert find("v5e-128").wrap == (False, True)
    assert find("v6e-256").wrap == (True, True)


def test_peaks_are_of_a_device():
    assert TPUS["v5p"].peak_flops == 459e12
    assert TPUS["tpu7x"].peak_flops == 1155e12


@pytest.mark.parametrize("name", ["v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_libtpu_makes_as_many_devices_as_are_counted(name):
    pytest.importorskip("libtpu")
    topology = find(name)
    devices = topology.devices()
    assert len(devices) == topology.num_devices
    assert {device.platform for device in devices} == {"tpu"}


def test_libtpu_makes_several_slices():
    pytest.importorskip("libtpu")
    devices = find("v5e-16", slices=2).devices()
    assert [sum(device.slice_index == i for device in devices) for i in (0, 1)] == [16, 16]


def test_a_shape_that_libtpu_refuses_is_named():
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match="v5e:3x3"):
        find("v5e:3x3").devices()
