"""How long a collective keeps the wires busy: bytes by the ring formulas, over the links that its group can use.

With a group of n devices and b bytes (the larger of what goes in and what comes out, of one device),

    all-gather, reduce-scatter    b (n - 1) / n pass into and out of every device
    all-reduce                    twice that: a reduce-scatter, then an all-gather
    all-to-all                    b s / 8 over each link of a closed axis of s chips, b s / 4 over the middle one of an
                                  open axis; the axes work at the same time
    collective-permute            b over one link: the partitioner permutes between neighbours of the mesh

A group uses the torus axes along which its members differ: two links of an axis that it covers and that is closed, else
one. libtpu's own plans agree ("UniDirectionNDRingStrategy{colors:6 ...}" for a cube of 4 x 4 x 4). The two devices of a
tpu7x chip share the chip's links. Groups over several slices reduce within the slice first, and send their part over
the data-centre network.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepjax.planning.hlo import Operation
from stepjax.planning.topologies import Topology

HOP_SECONDS = 1e-6  # to the next chip; a transfer starts no sooner than its first byte has gone around

COLLECTIVES = {
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 1.0,
    "ragged-all-to-all": 1.0,
    "collective-permute": 1.0,
    "collective-broadcast": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Of one device, once."""

    ici_seconds: float
    dcn_seconds: float
    wire_bytes: float  # out of the device, over both networks
    group: int  # devices that take part

    @property
    def seconds(self) -> float:
        return self.ici_seconds + self.dcn_seconds


class Network:
    """The devices of a mesh and the wires between them."""

    def __init__(self, topology: Topology, devices: Sequence[Any]):
        """`devices`: those of the mesh in its order, which is the order that replica groups count in."""
        self.topology = topology
        self._places = np.array([_place(device, len(topology.shape)) for device in devices])  # (slice, x, y[, z])

    def transfer(self, operation: Operation, num_bytes: float) -> Transfer:
        """
        Args:
            num_bytes: the larger of the operation's operands and results, on one device.

        Raises:
            ValueError: its replica groups are written in an unknown way.
        """
        kind = operation.opcode.removesuffix("-start")
        members = self.group(operation)
        n = len(members)
        if n == 1:
            return Transfer(0.0, 0.0, 0.0, 1)
        facts = self.topology.facts
        places = self._places[members]
        slices = len(np.unique(places[:, 0]))
        within = n // slices
        extents = [len(np.unique(places[:, 1 + axis])) for axis in range(len(self.topology.shape))]
        link = facts.link_bandwidth / facts.devices_per_chip
        links = [self._links(axis, extent) for axis, extent in enumerate(extents)]
        hops = sum((size // 2 if k == 2 else size - 1) for size, k in zip(extents, links, strict=True))
        latency = HOP_SECONDS * hops
        dcn_bytes = COLLECTIVES[kind] * num_bytes / within * (slices - 1) / slices
        if kind == "collective-permute":
            # One pair that crosses slices holds up the others.
            crosses = slices > 1
            ici, dcn = (0.0, num_bytes / facts.dcn_bandwidth) if crosses else (num_bytes / link + HOP_SECONDS, 0.0)
            return Transfer(ici, dcn, num_bytes, n)
        if kind in ("all-to-all", "ragged-all-to-all"):
            ici_bytes = num_bytes * (within - 1) / n
            dcn_bytes = num_bytes * (slices - 1) / slices
            ici = max(
                (ici_bytes * size / (4 * k * link) for size, k in zip(extents, links, strict=True) if k), default=0
            )
        else:
            ici_bytes = COLLECTIVES[kind] * num_bytes * (within - 1) / within
            # The cores of a chip exchange within it, where no figure is published: taken as free.
            ici = ici_bytes / (link * sum(links)) if sum(links) else 0.0
        dcn = dcn_bytes / facts.dcn_bandwidth if slices > 1 else 0.0
        return Transfer(ici + latency, dcn, ici_bytes + (dcn_bytes if slices > 1 else 0.0), n)

    def _links(self, axis: int, extent: int) -> int:
        if extent == 1:
            return 0
        return 2 if self.topology.wrap[axis] and extent == self.topology.shape[axis] else 1

    def group(self, operation: Operation) -> list[int]:
        """The first group that takes part; all have the same form."""
        pairs = operation.attribute("source_target_pairs")
        if pairs is not None:
            source, target = max(self._pairs(pairs), key=lambda pair: self._crosses(*pair))
            return [source, target] if source != target else [source]
        text = operation.attribute("replica_groups")
        if text is None:
            raise ValueError(f"{operation.name}: a collective without replica_groups: {operation.attributes[:200]}")
        return read_group(text, len(self._places))

    def _crosses(self, source: int, target: int) -> bool:
        return bool(self._places[source, 0] != self._places[target, 0])

    @staticmethod
    def _pairs(text: str) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]


def read_group(text: str, num_devices: int) -> list[int]:
    """The first group of replica_groups, in any of the forms in which XLA writes them.

        {{0,1},{2,3}}                       listed; {} is all devices
        [2,4]<=[4,2]T(1,0)                  2 groups of 4: the numbers from 0 as a [4, 2] array, transposed, in rows
        mesh['a'=2,'b'=4] {'b'}             the axes of a mesh along which members differ

    Raises:
        ValueError: none of these.
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
        names = re.findall(r"'([^']+)'=(\d+)", named[1])
        wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])
        if names and wanted and not named[2].strip():
            return _mesh_group(names, wanted)
    raise ValueError(f"replica groups written in an unknown way: {text[:200]}")


def _mesh_group(names: list[tuple[str, str]], wanted: list[tuple[str, str, str]]) -> list[int]:
    """Members along some axes of a mesh, the others at 0; 'a':(m)k is the part of k that has m parts in front of it."""
    shape: list[int] = []
    taken: list[bool] = []
    for name, size in names:
        parts = [(int(pre), int(part)) for axis, pre, part in wanted if axis == name and pre]
        whole = any(axis == name and not pre for axis, pre, _ in wanted)
        if not parts:
            shape.append(int(size))
            taken.append(whole)
            continue
        pre, part = parts[0]
        shape += [pre, part, int(size) // (pre * part)]
        taken += [False, True, False]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers[tuple(slice(None) if take else 0 for take in taken)].reshape(-1).tolist()


def _place(device: Any, axes: int) -> tuple[int, ...]:
    return (getattr(device, "slice_index", 0) or 0, *device.coords[:axes])
