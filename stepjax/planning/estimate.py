"""The time of a step from its scheduled program: replays the compiler's estimate of every operation in order.

The walk starts at the entry computation. The core runs one operation after another, for `estimated_cycles` each. A loop
body is replayed once and multiplied by its trip count. Asynchronous work has its own queues:

    collectives     occupy the links (network.py) from start to done, one after another. At the done the core waits for
                    the remaining time, or for all of it if a collective has no separate start
    copies          between HBM and vector memory, and to and from host memory, at HBM bandwidth
    SparseCore      gathers and scatters that the compiler moved there, by their bytes

core_time.py covers operations without cycles. A plan reports each source's share of the estimate, and every collective
in a form we do not understand.
"""

import dataclasses
import re
from collections import Counter
from typing import Literal

from stepjax.planning.core_time import AttentionRate, CoreTime, CostKind, flop_per_bundle
from stepjax.planning.hlo import Operation, Program, arrays
from stepjax.planning.network import COLLECTIVES, Network

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "domain", "get-dimension-size"}
_LIKE_COLLECTIVES = re.compile(r"^(all-|reduce-scatter|collective|ragged-all|send|recv)")


# Parts of the model ---------------------------------------------------------------------------------------------------

Direction = Literal["forward", "recomputed", "backward"]

OTHER = "other"
EXPOSED_COLLECTIVES = "collectives, exposed"
EXPOSED_COPIES = "copies to and from vector memory, exposed"
_BLOCKS = {"attention": " attention", "mlp": " MLP"}
_SINGLE_PARTS = {"projector": "projector", "embed": "embedding", "loss": "loss", "optimizer": "optimizer"}
# In display order.
PARTS = (
    "encoder attention",
    "encoder MLP",
    "encoder, rest",
    "projector",
    "embedding",
    "decoder attention",
    "decoder MLP",
    "decoder, rest",
    "loss",
    "optimizer",
    OTHER,
    EXPOSED_COPIES,
    EXPOSED_COLLECTIVES,
)


def part_of(op_name: str) -> str:
    """The part of the model, from the `jax.named_scope`s and transformations in JAX's name of an operation.

    `jit(train_step)/transpose(jvp(decoder))/while/body/checkpoint/rematted_computation/attention/dot_general` is the
    decoder's attention, recomputed for the backward pass.
    """
    scopes = [re.sub(r"^.*\(|\)+$", "", level) for level in op_name.split("/")]
    for i, scope in enumerate(scopes):
        if scope in ("encoder", "decoder"):
            return scope + next((_BLOCKS[inner] for inner in scopes[i + 1 :] if inner in _BLOCKS), ", rest")
        if scope in _SINGLE_PARTS:
            return _SINGLE_PARTS[scope]
    return OTHER


def direction_of(op_name: str) -> Direction:
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


# Results --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """How long one operation occupies or stalls the core in a step."""

    operation: Operation
    kind: CostKind
    part: str
    direction: Direction
    scope: str  # JAX's name of the operation or its surroundings
    seconds: float  # of all its executions
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A collective of a step. Bytes and seconds sum over all its executions."""

    operation: Operation
    kind: str  # "all-gather", ...
    group: int  # devices
    wire_bytes: float  # sent by a device
    seconds: float  # on the links
    exposed: float = 0.0  # seconds that the core waits
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    seconds: float
    costs: tuple[Cost, ...]
    traffic: tuple[Traffic, ...]
    unknown: Counter[str]  # what we do not understand: loops without trip count, collectives, custom calls

    def seconds_by(self, *keys: str) -> dict[tuple[str, ...], float]:
        """Seconds of all costs, grouped by these attributes."""
        total: dict[tuple[str, ...], float] = {}
        for cost in self.costs:
            key = tuple(getattr(cost, key) for key in keys)
            total[key] = total.get(key, 0.0) + cost.seconds
        return total


def estimate(program: Program, network: Network, *, attention_rate: AttentionRate = flop_per_bundle) -> Estimate:
    """Replay the program of one device. `attention_rate`: a better rate of attention kernels, if known."""
    unknown: Counter[str] = Counter()
    core = CoreTime(program, network.topology.facts, unknown, attention_rate)
    walk = _Walk(core, network, program.entry, "")
    return Estimate(walk.seconds, tuple(walk.costs), tuple(walk.traffic), unknown)


# The walk -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Pending:
    """Asynchronous work beside the core."""

    queue: str
    seconds: float
    traffic: Traffic | None = None  # for a collective
    finish: float | None = None  # None until it starts


class _Walk:
    """A computation, executed once."""

    def __init__(self, core: CoreTime, network: Network, computation: str, around: str):
        """`around`: the scope of the calling operation."""
        self.core, self.network, self.computation, self.around = core, network, computation, around
        self.program, self.facts, self.unknown = core.program, core.facts, core.unknown
        self.seconds = 0.0
        self.costs: list[Cost] = []
        self.traffic: list[Traffic] = []
        self.queues: dict[str, float] = {}  # when each is free again
        self.pending: dict[str, _Pending] = {}  # by the operation, channel or rendezvous that the done names
        operations = self.program.computations[computation]
        self.results = {  # the done or update of an asynchronous start
            op.operands[0]: op for op in operations if op.opcode.endswith(("-done", "-update")) and op.operands
        }
        for operation in operations:
            if operation.opcode not in _FREE:
                self._play(operation, self._scope(operation))
        for handle in self.pending.values():  # the next step would have to wait for these
            self.unknown[f"never awaited: {handle.queue}"] += 1

    def _play(self, operation: Operation, scope: str) -> None:
        opcode = operation.opcode
        if opcode == "while":
            trips = self.program.trips(operation)
            if trips is None:
                self.unknown[f"loop of unknown length at {scope}"] += 1
            self._include(self._called(self.program.loop(operation)[1], scope), 1 if trips is None else trips)
        elif opcode in ("call", "conditional"):  # take the longest branch
            self._include(max((self._called(n, scope) for n in operation.called), key=lambda walk: walk.seconds))
        elif opcode in ("send", "recv"):
            self._between_slices(operation)
        elif opcode == "send-done":
            pass
        elif opcode == "recv-done":
            received = self.program.operation(self.computation, operation.operands[0])
            self._wait(None if received is None else _rendezvous(received), operation, scope)
        elif opcode.endswith("-start"):
            late = self.results.get(operation.name)
            waits = late is not None and late.opcode.endswith("-update")  # some operands arrive later
            self._start(operation.name, self._begin(operation), waits=waits)
        elif opcode.endswith("-update"):
            self._start(operation.name, self.pending.pop(operation.operands[0]))
        elif opcode.endswith("-done"):
            self._wait(next(iter(operation.operands), None), operation, scope)
        elif opcode == "fusion" and (found := self.program.inside(operation, _is_collective)) is not None:
            self._fused_collective(operation, *found, scope)
        elif opcode in COLLECTIVES:
            self._start(operation.name, self._transfer(operation, self._bytes(self.computation, operation)))
            self._wait(operation.name, operation, scope)
        else:
            if _LIKE_COLLECTIVES.match(opcode):
                self.unknown[f"collective {opcode}"] += 1
            self._occupy(operation, scope, *self.core.occupied(self.computation, operation))

    def _called(self, computation: str, scope: str) -> "_Walk":
        return _Walk(self.core, self.network, computation, scope)

    def _include(self, walk: "_Walk", times: int = 1) -> None:
        def scaled(record, *fields: str):
            return dataclasses.replace(record, **{name: getattr(record, name) * times for name in fields})

        self.seconds += times * walk.seconds
        self.costs += [scaled(cost, "seconds", "times") for cost in walk.costs]
        self.traffic += [scaled(t, "seconds", "exposed", "wire_bytes", "times") for t in walk.traffic]

    def _scope(self, operation: Operation) -> str:
        """The first of these names that maps to a part: its own, a fused operation's, the surrounding loop's."""
        names = [operation.op_name]
        if operation.opcode == "fusion":
            named = self.program.inside(operation, lambda op: part_of(op.op_name) != OTHER)
            names += [named[1].op_name] if named else []
        return next((name for name in (*names, self.around) if part_of(name) != OTHER), names[0] or self.around)

    # The core

    def _occupy(self, operation: Operation, scope: str, kind: CostKind, seconds: float, part: str = "") -> None:
        self.seconds += seconds
        self.costs.append(Cost(operation, kind, part or part_of(scope), direction_of(scope), scope, seconds))

    def _wait(self, key: str | None, operation: Operation, scope: str) -> None:
        """Wait for the work pending under this key, if any."""
        if key is None or key not in self.pending:
            return
        handle = self.pending.pop(key)
        assert handle.finish is not None, operation.name
        exposed = max(0.0, handle.finish - self.seconds)
        if handle.traffic is not None:
            self.traffic.append(dataclasses.replace(handle.traffic, exposed=exposed))
            self._occupy(operation, scope, "collective", exposed, EXPOSED_COLLECTIVES)
        elif handle.queue in ("hbm", "host"):
            self._occupy(operation, scope, "copy", exposed, EXPOSED_COPIES)
        else:
            self._occupy(operation, scope, "sparsecore", exposed)

    # What runs beside the core

    def _start(self, key: str, handle: _Pending, *, waits: bool = False) -> None:
        self.pending[key] = handle
        if handle.finish is None and not waits:
            begin = max(self.seconds, self.queues.get(handle.queue, 0.0))
            handle.finish = self.queues[handle.queue] = begin + handle.seconds

    def _begin(self, operation: Operation) -> _Pending:
        base = operation.opcode.removesuffix("-start")
        fed, done = operation, self.results.get(operation.name)
        while done is not None and done.opcode.endswith("-update"):
            fed, done = done, self.results.get(done.name)
        read = self.program.operand_arrays(self.computation, operation)
        written = arrays(done.shape) if done is not None else []
        moved = sum(array.bytes for array in written)
        if base in COLLECTIVES:
            return self._transfer(operation, max(moved, sum(array.bytes for array in read)))
        if found := self.program.inside(operation, _is_collective):
            return self._transfer(found[1], self._bytes(*found))
        if base in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            if base == "dynamic-update-slice":  # returns the whole array but writes only a part
                moved = min((array.bytes for array in read if array.dims), default=moved)
            in_host = any("S(5)" in array.layout for array in [*read, *written])
            # No bandwidth to host memory is published; we assume that of HBM.
            return _Pending("host" if in_host else "hbm", moved / self.facts.hbm_bandwidth)
        if _LIKE_COLLECTIVES.match(base):
            self.unknown[f"collective {operation.opcode}"] += 1
        read_bytes = sum(array.bytes for array in self.program.operand_arrays(self.computation, fed))
        queue = operation.thread or "asynchronous"
        return _Pending(queue, (moved + min(read_bytes, moved)) / self.facts.hbm_bandwidth)

    def _bytes(self, computation: str, operation: Operation) -> int:
        read = sum(array.bytes for array in self.program.operand_arrays(computation, operation))
        return max(read, sum(array.bytes for array in arrays(operation.shape)))

    def _transfer(self, operation: Operation, num_bytes: float, kind: str | None = None) -> _Pending:
        kind = kind or operation.opcode.removesuffix("-start")
        try:
            transfer = self.network.transfer(dataclasses.replace(operation, opcode=kind), num_bytes)
        except ValueError as error:
            self.unknown[f"collective: {error}"] += 1
            return _Pending("ici", 0.0, Traffic(operation, kind, 0, 0.0, 0.0))
        queue = "dcn" if transfer.dcn_seconds > transfer.ici_seconds else "ici"
        if kind == "collective-permute" and transfer.group > 1:
            source, target = self.network.group(operation)
            queue += f" by {target - source}"  # the two directions of a ring are independent
        traffic = Traffic(operation, kind, transfer.group, transfer.wire_bytes, transfer.seconds)
        return _Pending(queue, transfer.seconds, traffic)

    def _between_slices(self, operation: Operation) -> None:
        """libtpu sends cross-slice transfers through the hosts, which meet under a rendezvous name."""
        meeting, kind = _rendezvous(operation), operation.frontend_attribute("_xla_megascale_transfer_type")
        if meeting is None or kind is None:
            self.unknown[f"collective {operation.opcode}"] += 1
        elif operation.opcode == "send":
            slices, sent = self.network.topology.slices, arrays(operation.shape)[0].bytes
            kind = kind.lower().replace("_", "-")
            share = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}.get(kind, (slices - 1) / slices)
            seconds = share * sent / self.facts.dcn_bandwidth
            traffic = Traffic(operation, f"{kind} of slices", slices, share * sent, seconds)
            self._start(meeting, _Pending("dcn", seconds, traffic))

    def _fused_collective(self, fusion: Operation, home: str, inner: Operation, scope: str) -> None:
        """A collective that libtpu fused with computation: spread over several fusions, or whole in one."""
        channel = f"channel {inner.attribute('channel_id')}"

        def calls(target: str) -> bool:
            return self.program.inside(fusion, lambda op: op.custom_call_target == target) is not None

        starts, ends = calls("AsyncCollectiveStart"), calls("AsyncCollectiveDone")
        if fusion.cycles:
            self._occupy(fusion, scope, "cycles", fusion.cycles / self.facts.clock_hz)
        if starts or not (ends or channel in self.pending):
            # An all-reduce fused with the slice that each device keeps is a reduce-scatter.
            kind = "reduce-scatter" if "scatter" in fusion.name and inner.opcode == "all-reduce" else None
            # The inner operation's bytes: the fusion has other arrays too.
            self._start(channel, self._transfer(inner, self._bytes(home, inner), kind))
            ends = ends or not starts
        if ends:
            self._wait(channel, fusion, scope)


def _is_collective(operation: Operation) -> bool:
    return operation.opcode in COLLECTIVES


def _rendezvous(operation: Operation) -> str | None:
    return operation.frontend_attribute("_xla_host_transfer_rendezvous")
