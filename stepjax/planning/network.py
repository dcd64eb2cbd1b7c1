"""How long a collective occupies the network: bytes by the ring formulas, over the links that its group can use.

For a group of n devices and b bytes (the larger of a device's operands and results),

    all-gather, reduce-scatter    b (n - 1) / n into and out of every device
    all-reduce                    twice that: a reduce-scatter, then an all-gather
    all-to-all                    b s / 8 over each link of a closed axis of s chips, b s / 4 over the middle link of an
                                  open one; all axes work in parallel
    collective-permute            b over one link: the partitioner permutes between mesh neighbours

A group uses the torus axes along which its members differ: two links of an axis if it is closed and the group covers
it, else one. libtpu's own plans agree ("UniDirectionNDRingStrategy{colors:6 ...}" for a cube of 4 x 4 x 4). The two
devices of a tpu7x chip share the chip's links. Groups that span slices first reduce within the slice, then send their
part over the data-centre network.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stepjax.planning.hlo import Operation
from stepjax.planning.topologies import Topology

HOP_SECONDS = 1e-6  # latency to the next chip

# How often the bytes go around the ring.
COLLECTIVES = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "all-to-all": 1.0, "ragged-all-to-all": 1.0}
COLLECTIVES |= {"collective-permute": 1.0, "collective-broadcast": 1.0}


class Transfer(NamedTuple):
    """One collective, as one device sees it."""

    ici_seconds: float  # between chips of a slice
    dcn_seconds: float  # between slices
    wire_bytes: float  # sent by the device over both networks
    group: int  # participating devices

    @property
    def seconds(self) -> float:
        return self.ici_seconds + self.dcn_seconds


class Network:
    """The devices of a mesh and the links between them."""

    def __init__(self, topology: Topology, devices: Sequence[Any]):
        """`devices`: in mesh order, which replica groups index."""
        self.topology = topology
        axes = len(topology.shape)
        places = [(getattr(device, "slice_index", 0) or 0, *device.coords[:axes]) for device in devices]
        self._places = np.array(places)  # slice, x, y[, z] of each device

    def transfer(self, operation: Operation, num_bytes: float) -> Transfer:
        """
        Args:
            num_bytes: the larger of the operation's operands and results, on one device.

        Raises:
            ValueError: its replica groups have an unknown form.
        """
        kind, facts = operation.opcode.removesuffix("-start"), self.topology.facts
        members = self.group(operation)
        n = len(members)
        if n == 1:
            return Transfer(0.0, 0.0, 0.0, 1)
        slices, *extents = (len(np.unique(column)) for column in self._places[members].T)
        link = facts.link_bandwidth / facts.devices_per_chip
        if kind == "collective-permute":
            if slices > 1:  # one pair that crosses slices delays the others
                return Transfer(0.0, num_bytes / facts.dcn_bandwidth, num_bytes, n)
            return Transfer(num_bytes / link + HOP_SECONDS, 0.0, num_bytes, n)
        links = [self._links(axis, extent) for axis, extent in enumerate(extents)]
        axes = list(zip(extents, links, strict=True))
        latency = HOP_SECONDS * sum(size // 2 if k == 2 else size - 1 for size, k in axes)
        within = n // slices
        if kind in ("all-to-all", "ragged-all-to-all"):
            ici_bytes = num_bytes * (within - 1) / n
            dcn_bytes = num_bytes * (slices - 1) / slices
            ici = max((ici_bytes * size / (4 * k * link) for size, k in axes if k), default=0)
        else:
            ici_bytes = COLLECTIVES[kind] * num_bytes * (within - 1) / within
            dcn_bytes = COLLECTIVES[kind] * num_bytes / within * (slices - 1) / slices
            # Cores of one chip communicate inside it. No bandwidth is published; we assume it is free.
            ici = ici_bytes / (link * sum(links)) if sum(links) else 0.0
        return Transfer(ici + latency, dcn_bytes / facts.dcn_bandwidth, ici_bytes + dcn_bytes, n)

    def _links(self, axis: int, extent: int) -> int:
        if extent == 1:
            return 0
        return 2 if self.topology.wrap[axis] and extent == self.topology.shape[axis] else 1

    def group(self, operation: Operation) -> list[int]:
        """The first group; the others have the same form. Of pairs, one that crosses slices if any does."""
        pairs = operation.attribute("source_target_pairs")
        if pairs is not None:
            slices = self._places[:, 0]
            found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
            return list(dict.fromkeys(max(found, key=lambda pair: slices[pair[0]] != slices[pair[1]])))
        groups = operation.attribute("replica_groups")
        if groups is None:
            raise ValueError(f"{operation.name}: collective without replica_groups: {operation.attributes[:200]}")
        return first_group(groups, len(self._places))


def first_group(text: str, num_devices: int) -> list[int]:
    """The first group of replica_groups, in any of XLA's forms.

        {{0,1},{2,3}}                       a list; {} means all devices
        [2,4]<=[4,2]T(1,0)                  2 groups of 4: 0, 1, ... as a [4, 2] array, transposed, read row by row
        mesh['a'=2,'b'=4] {'b'}             the mesh axes along which members differ

    Raises:
        ValueError: the text has another form.
    """
    text = text.strip()
    if listed := re.match(r"\{\{([\d,]*)\}", text):
        return [int(number) for number in listed[1].split(",")]
    if text == "{}":
        return list(range(num_devices))
    if tiled := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = (tuple(map(int, part.split(","))) for part in tiled.groups()[:2])
        numbers = np.arange(math.prod(source)).reshape(source)
        if tiled[3]:
            numbers = numbers.transpose(tuple(map(int, tiled[3].split(","))))
        return numbers.reshape(shape[0], -1)[0].tolist()
    if named := re.match(r"@?mesh\S*?\[([^\]]*)\](.*?)\{([^}]*)\}\s*$", text):
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])
        if axes and wanted and not named[2].strip():
            return _mesh_group(axes, wanted)
    raise ValueError(f"replica groups of unknown form: {text[:200]}")


def _mesh_group(axes: list[tuple[str, str]], wanted: list[tuple[str, str, str]]) -> list[int]:
    """Members along some mesh axes, at 0 on the others; 'a':(m)k is a sub-axis of size k after a factor of m."""
    shape: list[int] = []
    taken: list[bool] = []
    for name, size in axes:
        parts = [(int(before), int(part)) for axis, before, part in wanted if axis == name and before]
        if parts:
            before, part = parts[0]
            shape += [before, part, int(size) // (before * part)]
            taken += [False, True, False]
        else:
            shape.append(int(size))
            taken.append(any(axis == name for axis, *_ in wanted))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers[tuple(slice(None) if take else 0 for take in taken)].reshape(-1).tolist()
