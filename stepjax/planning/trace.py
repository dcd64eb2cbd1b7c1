"""What a walk through a program finds: the cost of every operation, and the traffic on the wires."""

import dataclasses
from collections import Counter

from stepjax.planning.core_time import Kind
from stepjax.planning.hlo import Operation
from stepjax.planning.parts import Direction


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one operation keeps the core from going on, in one step."""

    operation: Operation
    kind: Kind
    part: str
    direction: Direction
    scope: str  # JAX's name of it, or of what is around it
    seconds: float  # all its executions together
    times: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A collective of a step."""

    operation: Operation
    kind: str  # "all-gather", ...
    scope: str
    group: int
    wire_bytes: float  # out of a device, all executions together
    seconds: float  # on the wires
    exposed: float  # that the core waits
    times: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    seconds: float
    costs: tuple[Cost, ...]
    traffic: tuple[Traffic, ...]
    unknown: Counter[str]  # what could not be read, by name: loops without trip count, collectives, custom calls

    def seconds_by(self, *keys: str) -> dict[tuple[str, ...], float]:
        """Seconds of all costs, by some of their attributes."""
        total: dict[tuple[str, ...], float] = {}
        for cost in self.costs:
            key = tuple(getattr(cost, key) for key in keys)
            total[key] = total.get(key, 0.0) + cost.seconds
        return total


@dataclasses.dataclass
class Trace:
    """A computation, executed once."""

    seconds: float = 0.0
    costs: list[Cost] = dataclasses.field(default_factory=list)
    traffic: list[Traffic] = dataclasses.field(default_factory=list)

    def add(self, other: "Trace", times: int) -> None:
        self.seconds += times * other.seconds
        self.costs += [dataclasses.replace(c, seconds=c.seconds * times, times=c.times * times) for c in other.costs]
        self.traffic += [
            dataclasses.replace(
                t,
                seconds=t.seconds * times,
                exposed=t.exposed * times,
                wire_bytes=t.wire_bytes * times,
                times=t.times * times,
            )
            for t in other.traffic
        ]
