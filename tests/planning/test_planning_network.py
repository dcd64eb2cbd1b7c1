"""Ring arithmetic and replica groups, against figures worked out by hand."""

import itertools
from types import SimpleNamespace

import pytest

from stepjax.planning.hlo import Operation
from stepjax.planning.network import HOP_SECONDS, Network, first_group
from stepjax.planning.topologies import find


def make_network(name, slices=1):
    topology = find(name, slices)
    places = itertools.product(range(slices), *map(range, topology.shape), range(topology.facts.devices_per_chip))
    return Network(topology, [SimpleNamespace(slice_index=place[0], coords=place[1:-1]) for place in places])


def collective(opcode, groups="{}"):
    key = "source_target_pairs" if opcode.startswith("collective-permute") else "replica_groups"
    return Operation("c", opcode, "f32[4]", (), f", channel_id=1, {key}={groups}")


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("{}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("mesh['axis_0'=8] {'axis_0'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("mesh['slice'=1,'a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("mesh['a'=8] {'a':(2)2}", [0, 2]),
    ],
)
def test_the_first_group(text, members):
    assert first_group(text, 8) == members


@pytest.mark.parametrize("text", ["groups of two", "[2,4]", "mesh['a'=8] {}"])
def test_unknown_groups_are_refused(text):
    with pytest.raises(ValueError, match="unknown"):
        first_group(text, 8)


def test_an_all_gather_of_a_cube_uses_six_links():
    network = make_network("v5p-128")
    transfer = network.transfer(collective("all-gather"), 540e9 * 64 / 63)
    assert transfer.group == 64
    assert transfer.wire_bytes == pytest.approx(540e9)
    assert transfer.seconds == pytest.approx(1 + 6 * HOP_SECONDS)  # 6 links of 90 GB/s; 2 hops on each of 3 axes


def test_an_all_reduce_takes_twice_a_reduce_scatter():
    network = make_network("v5p-128")
    twice = network.transfer(collective("all-reduce"), 1e9)
    once = network.transfer(collective("reduce-scatter"), 1e9)
    latency = 6 * HOP_SECONDS
    assert twice.seconds - latency == pytest.approx(2 * (once.seconds - latency))


def test_a_group_along_one_axis_has_that_axis_only():
    network = make_network("v5p-128")
    transfer = network.transfer(collective("all-gather", "[16,4]<=[64]"), 4e9)
    assert transfer.seconds == pytest.approx(3e9 / (2 * 90e9) + 2 * HOP_SECONDS)


def test_part_of_an_axis_is_not_closed():
    network = make_network("v5p-128")
    transfer = network.transfer(collective("all-gather", "[32,2]<=[64]"), 2e9)
    assert transfer.seconds == pytest.approx(1e9 / 90e9 + HOP_SECONDS)


def test_an_open_slice_has_half_the_links():
    network = make_network("v5e-16")  # 4 x 4, not closed
    transfer = network.transfer(collective("all-gather"), 16e9)
    assert transfer.seconds == pytest.approx(15e9 / (2 * 45e9) + 6 * HOP_SECONDS)


def test_a_group_of_one_costs_nothing():
    assert make_network("v5e-4").transfer(collective("all-reduce", "[4,1]<=[4]"), 1e9).seconds == 0


def test_the_two_devices_of_a_chip_share_its_links():
    network = make_network("tpu7x-128")
    transfer = network.transfer(collective("all-gather"), 128e9)
    assert transfer.group == 128
    assert transfer.seconds == pytest.approx(127e9 / (6 * 45e9) + 6 * HOP_SECONDS)


def test_all_to_all_on_a_closed_cube():
    network = make_network("v5p-128")
    transfer = network.transfer(collective("all-to-all"), 64e9)
    # Of 64 GB 63 leave; on each axis the average distance is 4 / 4, over two links.
    assert transfer.seconds == pytest.approx(63e9 * 4 / 8 / 90e9 + 6 * HOP_SECONDS)


def test_a_permutation_takes_one_link():
    network = make_network("v5e-4")
    transfer = network.transfer(collective("collective-permute", "{{0,1},{1,3},{3,2},{2,0}}"), 45e9)
    assert transfer.seconds == pytest.approx(1 + HOP_SECONDS)


def test_a_permutation_across_slices_takes_the_slow_network():
    network = make_network("v5e-4", slices=2)
    transfer = network.transfer(collective("collective-permute-start", "{{0,1},{0,4}}"), 1.56e9)
    assert (transfer.ici_seconds, transfer.dcn_seconds) == (0, pytest.approx(1))


def test_an_all_reduce_over_slices_sends_its_part_over_the_slow_network():
    network = make_network("v5e-4", slices=2)
    transfer = network.transfer(collective("all-reduce"), 8e9)
    assert transfer.group == 8
    # Within the slice 2 x 8 GB x 3 / 4 over two open axes; across, 2 x 2 GB x 1 / 2.
    assert transfer.ici_seconds == pytest.approx(12e9 / (2 * 45e9) + 2 * HOP_SECONDS)
    assert transfer.dcn_seconds == pytest.approx(2e9 / 1.56e9)


def test_an_all_reduce_between_slices_only():
    network = make_network("v5e-4", slices=2)
    transfer = network.transfer(collective("all-reduce", "[4,2]<=[2,4]T(1,0)"), 1e9)
    assert transfer.ici_seconds == 0
    assert transfer.dcn_seconds == pytest.approx(1e9 / 1.56e9)


def test_a_collective_without_groups_is_refused():
    with pytest.raises(ValueError, match="replica_groups"):
        make_network("v5e-4").transfer(Operation("c", "all-gather", "f32[4]", (), ""), 1.0)
