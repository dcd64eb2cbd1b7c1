"""Parses the scheduled program that the TPU compiler prints (`compiled.as_text()`, `is_scheduled=true`).

A computation lists its operations in issue order, so a walk from the entry follows time. We read names, shapes and
operands, called computations, trip counts of loops, the compiler's `estimated_cycles`, and the Python line of each
operation. XLA writes that line into the operation's metadata or (from JAX 0.11) as the number of a stack frame in
tables at the top of the text.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

# Bits per element. Other types (tokens, opaque handles) take no memory.
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}
_BITS |= {f"f8e{kind}": 8 for kind in ("4m3fn", "5m2", "4m3b11fnuz", "4m3fnuz", "5m2fnuz", "4m3", "3m4", "8m0fnu")}

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) .*\{\s*$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_CALLED = re.compile(
    r"\b(?:calls|called_computations|to_apply|body|condition|true_computation|false_computation)=\{?%?([^\s,)}]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BREAKS = re.compile(r'"(?:[^"\\]|\\.)*"|[][(){}, ]')  # a quoted string is one match


class Array(NamedTuple):
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # "{1,0:T(8,128)S(1)}"; S(n) names a memory other than HBM

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * _BITS.get(self.dtype, 0) // 8

    @property
    def in_hbm(self) -> bool:
        return "S(" not in self.layout


def arrays(shape: str) -> list[Array]:
    """The arrays of an HLO shape; a tuple's in order."""
    return [
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


class Source(NamedTuple):
    """A line of Python."""

    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str  # of the result
    operands: tuple[str, ...]  # names
    attributes: str  # everything after the operands, as printed
    is_root: bool = False
    source: Source | None = None

    @property
    def op_name(self) -> str:
        """JAX's name of its origin: "jit(train_step)/jvp(decoder)/while/body/attention/dot_general"."""
        return self._find(r'\bop_name="((?:[^"\\]|\\.)*)"') or ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, if any."""
        found = self._find(r'"estimated_cycles":"?(\d+)')
        return None if found is None else int(found)

    @property
    def called(self) -> tuple[str, ...]:
        """Called computations: of fusions, calls, asynchronous wrappers, conditionals and reductions."""
        names = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return tuple(names)

    @property
    def custom_call_target(self) -> str | None:
        return self._find(r'custom_call_target="([^"]*)"')

    @property
    def cost_estimate(self) -> dict[str, int]:
        """A Mosaic kernel author's cost estimate: flops, bytes_accessed, transcendentals."""
        stated = self._find(r'"cost_estimate":\{([^}]*)\}') or ""
        return {key: int(value) for key, value in re.findall(r'"(\w+)":"?(\d+)', stated)}

    @property
    def thread(self) -> str | None:
        """The unit that runs it if not the TensorCore, such as "sparsecore"."""
        return self._find(r'async_execution_thread="([^"]*)"')

    def attribute(self, name: str) -> str | None:
        """The value of `name=...`, up to the next top-level comma."""
        found = re.search(rf"\b{name}=", self.attributes)
        return None if found is None else _balanced_until(self.attributes, found.end(), ",")

    def frontend_attribute(self, name: str) -> str | None:
        return self._find(rf'\b{name}="([^"]*)"')

    def _find(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module."""

    entry: str
    computations: dict[str, tuple[Operation, ...]]

    @cached_property
    def _by_name(self) -> dict[str, dict[str, Operation]]:
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def operation(self, computation: str, name: str) -> Operation | None:
        return self._by_name[computation].get(name)

    def operand_arrays(self, computation: str, operation: Operation) -> list[Array]:
        """The arrays that an operation reads."""
        known = self._by_name[computation]
        return [array for name in operation.operands if name in known for array in arrays(known[name].shape)]

    def loop(self, operation: Operation) -> tuple[str, str]:
        """The condition and the body of a `while`."""
        condition, body = operation.attribute("condition"), operation.attribute("body")
        assert condition is not None and body is not None, operation.name
        return condition.lstrip("%"), body.lstrip("%")

    def trips(self, operation: Operation) -> int | None:
        """Trip count of a `while`: the compiler's annotation, else the constant in its condition.

        None without either, as in a loop whose end depends on data.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.attributes):
            return int(known[1])
        operations = self._by_name[self.loop(operation)[0]]
        (root,) = [op for op in operations.values() if op.is_root]
        limits = [operations[name] for name in root.operands if name in operations]
        if root.opcode == "fusion":  # the comparison may be fused with its constant
            limits += self._by_name[root.called[0]].values()
        values = [re.match(r"\((\d+)\)", op.attributes) for op in limits if op.opcode == "constant"]
        return max((int(value[1]) for value in values if value), default=None)

    def inside(self, operation: Operation, wanted: Callable[[Operation], bool]) -> tuple[str, Operation] | None:
        """The first wanted operation called by `operation` at any depth, with its computation in front."""
        for computation in operation.called:
            for inner in self.computations.get(computation, ()):
                if wanted(inner):
                    return computation, inner
                if found := self.inside(inner, wanted):
                    return found
        return None


def read(text: str) -> Program:
    """Parse a module.

    Raises:
        ValueError: the text is not a scheduled module, or a line cannot be parsed.
    """
    lines = text.splitlines()
    if not lines or "is_scheduled=true" not in lines[0]:
        raise ValueError("not the text of a scheduled HLO module")
    frames = _read_frames(lines)
    computations: dict[str, tuple[Operation, ...]] = {}
    entry = name = ""
    operations: list[Operation] | None = None  # of the computation being read
    for line in _whole(lines):
        if operations is None:
            if head := _COMPUTATION.match(line):
                name, operations = head[2], []
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name], operations = tuple(operations), None
        elif line.strip():
            operations.append(_read_operation(line, frames))
    if not entry:
        raise ValueError("the HLO module has no entry computation")
    return Program(entry, computations)


def _whole(lines: list[str]) -> Iterator[str]:
    """The lines, with operations that span several joined (kernel metadata may contain line breaks)."""
    waiting = ""
    for line in lines:
        if waiting and line.startswith(('"', "}}")):
            waiting += line
            continue
        if waiting:
            yield waiting
        waiting = line
    yield waiting


def _read_operation(line: str, frames: dict[int, Source]) -> Operation:
    head = _OPERATION.match(line)
    if head is None:
        raise ValueError(f"unknown line in an HLO computation: {line[:200]}")
    shape = _balanced_until(line, head.end(), " ")  # a tuple has spaces only inside its parentheses
    opcode, _, rest = line[head.end() + len(shape) + 1 :].partition("(")
    inner = _balanced_until(rest, 0, ")")
    attributes = rest[len(inner) + 1 :]
    if opcode in ("constant", "parameter"):  # the value is in place of operands
        attributes = f"({inner}){attributes}"
    operands = tuple(re.findall(r"%([^\s,()]+)", inner))
    return Operation(head[2], opcode, shape, operands, attributes, bool(head[1]), _source(attributes, frames))


def _balanced_until(text: str, start: int, end: str) -> str:
    """The text from `start` to the first `end` outside parentheses, braces, brackets and quotes."""
    depth = 0
    for found in _BREAKS.finditer(text, start):
        if depth == 0 and found[0] == end:
            return text[start : found.start()]
        depth += (found[0] in "([{") - (found[0] in ")]}")
    return text[start:]


def _source(attributes: str, frames: dict[int, Source]) -> Source | None:
    if found := re.search(r"\bstack_frame_id=(\d+)", attributes):
        return frames.get(int(found[1]))
    file, line = re.search(r'\bsource_file="([^"]*)"', attributes), re.search(r"\bsource_line=(\d+)", attributes)
    return Source(file[1], int(line[1])) if file and line else None


def _read_frames(lines: list[str]) -> dict[int, Source]:
    """File and line of every stack frame, from the tables before the computations."""
    tables: dict[str, dict[int, str]] = {name: {} for name in ("FileNames", "FileLocations", "StackFrames")}
    table: dict[int, str] | None = None
    for line in lines:
        if line.startswith(("%", "ENTRY")):
            break
        if row := re.match(r"(\d+) (.*)", line):
            if table is not None:
                table[int(row[1])] = row[2]
        else:
            table = tables.get(line)

    def number(row: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", row)
        return int(found[1]) if found else 0

    frames = {}
    for frame, row in tables["StackFrames"].items():
        location = tables["FileLocations"].get(number(row, "file_location_id"), "")
        if file := tables["FileNames"].get(number(location, "file_name_id")):
            frames[frame] = Source(file.strip('"'), number(location, "line"))
    return frames
