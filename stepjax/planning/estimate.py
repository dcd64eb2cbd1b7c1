"""The time of a step from its scheduled program: the compiler's own estimate of every operation, played in order.

The walk starts at the entry computation. A core does one operation after the other, `estimated_cycles` each; a loop's
body is played once and counted as often as it runs. What runs beside the core sits in a queue of its own:

    collectives     from start to done on the wires (links.py), one behind the other. The core waits at the done for
                    what is not over by then, and for the whole of a collective that has no start of its own
    copies          between HBM and vector memory, at the bandwidth of HBM; to and from the host's memory at the same
    SparseCore      gathers and scatters that the compiler moved there, by their bytes

The compiler gives no cycles to Mosaic kernels, and to few other operations. Attention kernels take their useful FLOPs
over the rate of their static schedule (kernel_rates.py), other kernels what their author stated; the rest take the time
to move their operands through HBM. How much of a plan rests on that is reported, and so is every collective that is
written in a way unknown here.
"""

import dataclasses
import re
from collections import Counter

from stepjax.chips import DeviceFacts
from stepjax.planning.core_time import AttentionRate, CoreTime, Kind
from stepjax.planning.hlo import Operation, Program, arrays
from stepjax.planning.kernel_rates import flop_per_bundle
from stepjax.planning.links import COLLECTIVES, Network
from stepjax.planning.parts import COLLECTIVES as COLLECTIVES_PART
from stepjax.planning.parts import COPIES, OTHER, direction_of, part_of
from stepjax.planning.trace import Cost, Estimate, Trace, Traffic

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "domain", "get-dimension-size"}
_LIKE_COLLECTIVES = re.compile(r"^(all-|reduce-scatter|collective|ragged-all|send|recv)")


def estimate(program: Program, network: Network, *, attention_rate: AttentionRate = flop_per_bundle) -> Estimate:
    """Play the program of one device. `attention_rate`: of attention kernels, where it is known better."""
    walk = _Walk(program, network, attention_rate)
    trace = walk.play(program.entry, "")
    return Estimate(trace.seconds, tuple(trace.costs), tuple(trace.traffic), walk.unknown)


@dataclasses.dataclass
class _Pending:
    """Something that runs beside the core."""

    queue: str
    seconds: float
    collective: tuple[Operation, str, int, float] | None = None  # operation, kind, group, wire bytes
    finish: float | None = None  # None until it starts


class _Walk:
    def __init__(self, program: Program, network: Network, attention_rate: AttentionRate):
        self.program, self.network, self.attention_rate = program, network, attention_rate
        self.facts: DeviceFacts = network.topology.facts
        self.unknown: Counter[str] = Counter()

    def play(self, computation: str, around: str) -> Trace:
        trace = Trace()
        queues: dict[str, float] = {}  # when each is free again
        pending: dict[str, _Pending] = {}
        meetings: dict[str | None, _Pending] = {}  # of slices, by rendezvous
        operations = self.program.computations[computation]
        core = CoreTime(self.program, self.facts, self.unknown, self.attention_rate)
        results = {op.operands[0]: op for op in operations if op.opcode.endswith(("-done", "-update")) and op.operands}
        for operation in operations:
            opcode, scope = operation.opcode, self._scope(operation, around)
            if opcode in _FREE:
                continue
            if opcode == "while":
                self._loop(trace, operation, scope)
            elif opcode == "call":
                trace.add(self.play(operation.called[0], scope), 1)
            elif opcode == "conditional":
                trace.add(max((self.play(name, scope) for name in operation.called), key=lambda t: t.seconds), 1)
            elif opcode in ("send", "recv"):
                self._between_slices(trace, operation, queues, meetings)
            elif opcode in ("send-done", "recv-done"):
                other = self.program.operation(computation, operation.operands[0])
                meeting = None if other is None else _rendezvous(other)
                if opcode == "recv-done" and meeting in meetings:
                    _wait(trace, meetings.pop(meeting), operation, scope)
            elif opcode.endswith("-start"):
                handle = self._begin(computation, operation, results)
                pending[operation.name] = handle
                late = results.get(operation.name)
                if late is None or not late.opcode.endswith("-update"):
                    _start(handle, trace.seconds, queues)
            elif opcode.endswith("-update"):
                handle = pending.pop(operation.operands[0])
                pending[operation.name] = handle
                if handle.finish is None:
                    _start(handle, trace.seconds, queues)
            elif opcode.endswith("-done"):
                if operation.operands and operation.operands[0] in pending:
                    _wait(trace, pending.pop(operation.operands[0]), operation, scope)
            elif opcode == "fusion" and (inner := self._collective_within(operation)) is not None:
                self._fused_collective(trace, computation, operation, inner, scope, queues, pending)
            elif opcode in COLLECTIVES:
                handle = self._transfer(operation, self._bytes(computation, operation))
                _start(handle, trace.seconds, queues)
                _wait(trace, handle, operation, scope)
            else:
                if _LIKE_COLLECTIVES.match(opcode):
                    self.unknown[f"collective {opcode}"] += 1
                kind, seconds = core.occupied(computation, operation)
                _occupy(trace, operation, kind, scope, seconds)
        # What is started here and awaited nowhere, the next step would wait for.
        for handle in [*pending.values(), *meetings.values()]:
            self.unknown[f"never awaited: {handle.queue}"] += 1
        return trace

    def _loop(self, trace: Trace, operation: Operation, scope: str) -> None:
        trips = self.program.trips(operation)
        if trips is None:
            self.unknown[f"loop of unknown length at {scope}"] += 1
        trace.add(self.play(self.program.loop(operation)[1], scope), 1 if trips is None else trips)

    # What runs beside the core

    def _begin(self, computation: str, operation: Operation, results: dict[str, Operation]) -> _Pending:
        base = operation.opcode.removesuffix("-start")
        done = results.get(operation.name)
        operands = operation
        while done is not None and done.opcode.endswith("-update"):
            operands, done = done, results.get(done.name)
        moved = sum(array.bytes for array in arrays(done.shape)) if done is not None else 0
        if base in COLLECTIVES:
            larger = max(moved, sum(a.bytes for a in self.program.operand_arrays(computation, operation)))
            return self._transfer(operation, larger)
        for called in operation.called:
            inner = self.program.contains(called, lambda op: op.opcode in COLLECTIVES)
            if inner is not None:
                return self._transfer(inner, self._bytes(self._home(operation, inner), inner))
        if base in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            read = self.program.operand_arrays(computation, operation)
            if base == "dynamic-update-slice":  # what it returns is the whole, of which it writes a part
                moved = min((array.bytes for array in read if array.dims), default=moved)
            in_host = any("S(5)" in array.layout for array in [*read, *arrays(done.shape if done else "")])
            # No figure is published for the way to the host's memory; it is taken to be as fast as HBM.
            return _Pending("host" if in_host else "hbm", moved / self.facts.hbm_bandwidth)
        if _LIKE_COLLECTIVES.match(base):
            self.unknown[f"collective {operation.opcode}"] += 1
        read_bytes = sum(a.bytes for a in self.program.operand_arrays(computation, operands))
        queue = operation.thread or "asynchronous"
        return _Pending(queue, (moved + min(read_bytes, moved)) / self.facts.hbm_bandwidth)

    def _transfer(self, operation: Operation, num_bytes: float, kind: str | None = None) -> _Pending:
        kind = kind or operation.opcode.removesuffix("-start")
        try:
            transfer = self.network.transfer(dataclasses.replace(operation, opcode=kind), num_bytes)
        except ValueError as error:
            self.unknown[f"collective: {error}"] += 1
            return _Pending("ici", 0.0, (operation, kind, 0, 0.0))
        queue = "dcn" if transfer.dcn_seconds > transfer.ici_seconds else "ici"
        if kind == "collective-permute" and transfer.group > 1:
            source, target = self.network.group(operation)
            queue += f" by {target - source}"  # one way round a ring does not wait for the other
        return _Pending(queue, transfer.seconds, (operation, kind, transfer.group, transfer.wire_bytes))

    def _home(self, caller: Operation, inner: Operation) -> str:
        """The computation, of those that `caller` leads to, in which `inner` stands."""
        waiting = list(caller.called)
        while waiting:
            name = waiting.pop()
            if self.program.operation(name, inner.name) is inner:
                return name
            waiting += [called for op in self.program.computations[name] for called in op.called]
        raise AssertionError(f"{inner.name} is not in {caller.name}")

    def _between_slices(
        self, trace: Trace, operation: Operation, queues: dict[str, float], meetings: dict[str | None, _Pending]
    ) -> None:
        """libtpu hands what crosses slices to the host, which meets the other slices' hosts under a name."""
        meeting, kind = _rendezvous(operation), _frontend(operation, "_xla_megascale_transfer_type")
        if meeting is None or kind is None:
            self.unknown[f"collective {operation.opcode}"] += 1
        elif operation.opcode == "send":
            slices, sent = self.network.topology.slices, arrays(operation.shape)[0].bytes
            kind = kind.lower().replace("_", "-")
            share = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}.get(kind, (slices - 1) / slices)
            wire = share * sent
            seconds = wire / self.facts.dcn_bandwidth
            meetings[meeting] = _Pending("dcn", seconds, (operation, f"{kind} of slices", slices, wire))
            _start(meetings[meeting], trace.seconds, queues)

    def _collective_within(self, fusion: Operation) -> Operation | None:
        if not fusion.called:
            return None
        return self.program.contains(fusion.called[0], lambda op: op.opcode in COLLECTIVES)

    def _fused_collective(
        self,
        trace: Trace,
        computation: str,
        fusion: Operation,
        inner: Operation,
        scope: str,
        queues: dict[str, float],
        pending: dict[str, _Pending],
    ) -> None:
        """A collective that libtpu fused with computation: in pieces over several fusions, or whole in one."""
        channel = f"channel {inner.attribute('channel_id')}"

        def calls(target: str) -> bool:
            return self.program.contains(fusion.called[0], lambda op: op.custom_call_target == target) is not None

        starts, ends = calls("AsyncCollectiveStart"), calls("AsyncCollectiveDone")
        if fusion.cycles:
            _occupy(trace, fusion, "cycles", scope, fusion.cycles / self.facts.clock_hz)
        if starts or not (ends or channel in pending):
            # The fusion of an all-reduce with the slice that each device keeps is a reduce-scatter.
            kind = "reduce-scatter" if "scatter" in fusion.name and inner.opcode == "all-reduce" else None
            # The inner operation's own arrays: the fusion has others besides.
            handle = self._transfer(inner, self._bytes(self._home(fusion, inner), inner), kind)
            _start(handle, trace.seconds, queues)
            pending[channel] = handle
            ends = ends or not starts
        if ends and channel in pending:
            _wait(trace, pending.pop(channel), fusion, scope)

    def _bytes(self, computation: str, operation: Operation) -> int:
        read = sum(array.bytes for array in self.program.operand_arrays(computation, operation))
        return max(read, sum(array.bytes for array in arrays(operation.shape)))

    def _scope(self, operation: Operation, around: str) -> str:
        """Its own name, that of something fused into it, or that of the loop around it: the first that tells a part."""
        names = [operation.op_name]
        for called in operation.called if operation.opcode == "fusion" else ():
            named = self.program.contains(called, lambda op: part_of(op.op_name) != OTHER)
            names += [named.op_name] if named else []
        return next((name for name in (*names, around) if part_of(name) != OTHER), names[0] or around)


def _frontend(operation: Operation, name: str) -> str | None:
    found = re.search(rf'\b{name}="([^"]*)"', operation.attributes)
    return found[1] if found else None


def _rendezvous(operation: Operation) -> str | None:
    return _frontend(operation, "_xla_host_transfer_rendezvous")


def _start(handle: _Pending, now: float, queues: dict[str, float]) -> None:
    begin = max(now, queues.get(handle.queue, 0.0))
    handle.finish = queues[handle.queue] = begin + handle.seconds


def _occupy(trace: Trace, operation: Operation, kind: Kind, scope: str, seconds: float) -> None:
    trace.seconds += seconds
    trace.costs.append(Cost(operation, kind, part_of(scope), direction_of(scope), scope, seconds, 1))


def _wait(trace: Trace, handle: _Pending, operation: Operation, scope: str) -> None:
    assert handle.finish is not None, operation.name
    exposed = max(0.0, handle.finish - trace.seconds)
    trace.seconds += exposed
    direction = direction_of(scope)
    if handle.collective is not None:
        source, kind, group, wire = handle.collective
        cost = Cost(operation, "collective", COLLECTIVES_PART, direction, scope, exposed, 1)
        trace.traffic.append(Traffic(source, kind, scope, group, wire, handle.seconds, exposed, 1))
    elif handle.queue in ("hbm", "host"):
        cost = Cost(operation, "copy", COPIES, direction, scope, exposed, 1)
    else:
        cost = Cost(operation, "sparsecore", part_of(scope), direction, scope, exposed, 1)
    trace.costs.append(cost)
