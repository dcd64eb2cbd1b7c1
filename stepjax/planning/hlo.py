"""A reader of the scheduled program that the TPU compiler prints (`compiled.as_text()`, `is_scheduled=true`).

Operations of a computation come in the order in which the core issues them, so a walk from the entry is a walk through
time. Read here are the names, shapes and operands, the computations that operations call, the trip counts of loops, the
compiler's `estimated_cycles`, and where in the Python source an operation comes from. XLA writes the last either into
the operation's metadata, or (as from JAX 0.11) as the number of a stack frame in tables at the top of the text.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property

# Bits of an element. What is not in the table takes no room: tokens and opaque handles.
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}
_BITS |= {f"f8e{kind}": 8 for kind in ("4m3fn", "5m2", "4m3b11fnuz", "4m3fnuz", "5m2fnuz", "4m3", "3m4", "8m0fnu")}

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) .*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_CALLED = re.compile(
    r"\b(?:calls|called_computations|to_apply|body|condition|true_computation|false_computation)=\{?%?([^\s,)}]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_FRAME_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclasses.dataclass(frozen=True)
class Array:
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
    """The arrays of a shape as HLO writes it, those of a tuple in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, layout))
    return found


@dataclasses.dataclass(frozen=True)
class Source:
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
    attributes: str  # all that follows the operands, as printed
    is_root: bool = False
    source: Source | None = None

    @property
    def op_name(self) -> str:
        """JAX's path to what it was made for: "jit(train_step)/jvp(decoder)/while/body/attention/dot_general"."""
        found = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it made none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found[1]) if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """Computations in its attributes: of fusions, calls, asynchronous wrappers, conditionals and reductions."""
        names = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return tuple(names)

    def attribute(self, name: str) -> str | None:
        """The value of `name=...`, up to the comma that ends it."""
        found = re.search(rf"\b{name}=", self.attributes)
        return None if found is None else _balanced_until(self.attributes, found.end(), ",")

    @property
    def custom_call_target(self) -> str | None:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else None

    @property
    def cost_estimate(self) -> dict[str, int]:
        """What a Mosaic kernel's author stated: flops, bytes_accessed, transcendentals."""
        found = re.search(r'"cost_estimate":\{([^}]*)\}', self.attributes)
        return {key: int(value) for key, value in re.findall(r'"(\w+)":"?(\d+)', found[1])} if found else {}

    @property
    def thread(self) -> str | None:
        """What runs it, if not the TensorCore: "sparsecore"."""
        found = re.search(r'async_execution_thread="([^"]*)"', self.attributes)
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
        """How often a `while` runs: as the compiler noted, or the constant that its condition compares with.

        None where neither is there, as of a loop whose end depends on data.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.attributes):
            return int(known[1])
        condition, _ = self.loop(operation)
        ops = self._by_name[condition]
        (root,) = [op for op in ops.values() if op.is_root]
        if root.opcode == "fusion":  # the comparison, and what it compares with, may have been fused
            inner = self._by_name[root.called[0]]
            limits = [op for op in inner.values() if op.opcode == "constant"]
            limits += [ops[name] for name in root.operands if name in ops and ops[name].opcode == "constant"]
        else:
            limits = [ops[name] for name in root.operands if name in ops and ops[name].opcode == "constant"]
        values = {int(m[1]) for op in limits if (m := re.match(r"\((\d+)\)", op.attributes))}
        return max(values) if values else None

    def contains(self, computation: str, wanted: Callable[[Operation], bool]) -> Operation | None:
        """The first operation of a computation, or of those it calls, that is wanted."""
        for operation in self.computations.get(computation, ()):
            if wanted(operation):
                return operation
            for called in operation.called:
                if found := self.contains(called, wanted):
                    return found
        return None


def read(text: str) -> Program:
    """Parse a module.

    Raises:
        ValueError: the text is not a scheduled module, or a line of it cannot be read.
    """
    lines = text.splitlines()
    if not lines or "is_scheduled=true" not in lines[0]:
        raise ValueError("not the text of a scheduled HLO module")
    sources = _read_frames(lines)
    computations: dict[str, tuple[Operation, ...]] = {}
    entry = name = ""
    inside: list[Operation] | None = None
    for line in _whole(lines):
        if inside is None:
            if head := _HEADER.match(line):
                name, inside = head[2], []
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name], inside = tuple(inside), None
        elif line.strip():
            inside.append(_read_operation(line, sources))
    if not entry:
        raise ValueError("the HLO module has no entry computation")
    return Program(entry, computations)


def _whole(lines: list[str]) -> Iterator[str]:
    """The lines, with operations that are printed over several (a kernel's metadata may have breaks) in one each."""
    waiting = ""
    for line in lines:
        if waiting and line.startswith(('"', "}}")):
            waiting += line
            continue
        if waiting:
            yield waiting
        waiting = line
    yield waiting


def _read_operation(line: str, sources: dict[int, Source]) -> Operation:
    head = _NAME.match(line)
    if head is None:
        raise ValueError(f"unknown line in an HLO computation: {line[:200]}")
    # The shape of a tuple has spaces in it, but only within its parentheses.
    shape = _balanced_until(line, head.end(), " ")
    opcode, _, _ = line[head.end() + len(shape) + 1 :].partition("(")
    start = head.end() + len(shape) + 1 + len(opcode)
    inner = _balanced_until(line, start + 1, ")")
    rest = line[start + 1 + len(inner) + 1 :]
    operands = tuple(re.findall(r"%([^\s,()]+)", inner))
    if opcode in ("constant", "parameter"):  # what stands in the parentheses is their value
        rest = f"({inner}){rest}"
    return Operation(head[2], opcode, shape, operands, rest, bool(head[1]), _source(rest, sources))


def _balanced_until(text: str, start: int, end: str) -> str:
    """From `start` up to the first `end` outside parentheses, braces, brackets and quotes."""
    depth = 0
    i = start
    while i < len(text):
        character = text[i]
        if depth == 0 and character == end:
            break
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == '"':
            i = _end_of_string(text, i)
        i += 1
    return text[start:i]


def _end_of_string(text: str, start: int) -> int:
    i = text.find('"', start + 1)
    while i > 0 and text[i - 1] == "\\":
        i = text.find('"', i + 1)
    return len(text) if i < 0 else i


def _source(attributes: str, sources: dict[int, Source]) -> Source | None:
    if found := re.search(r"\bstack_frame_id=(\d+)", attributes):
        return sources.get(int(found[1]))
    file, line = re.search(r'\bsource_file="([^"]*)"', attributes), re.search(r"\bsource_line=(\d+)", attributes)
    return Source(file[1], int(line[1])) if file and line else None


def _read_frames(lines: list[str]) -> dict[int, Source]:
    """The tables in front of the computations: a stack frame's number to its file and line."""
    tables: dict[str, dict[int, str]] = {}
    for title, row in _table_rows(lines):
        number, _, value = row.partition(" ")
        tables.setdefault(title, {})[int(number)] = value

    def field(text: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", text)
        return int(found[1]) if found else 0

    files, locations = tables.get("FileNames", {}), tables.get("FileLocations", {})
    sources = {}
    for number, frame in tables.get("StackFrames", {}).items():
        location = locations.get(field(frame, "file_location_id"), "")
        if file := files.get(field(location, "file_name_id")):
            sources[number] = Source(file.strip('"'), field(location, "line"))
    return sources


def _table_rows(lines: list[str]) -> Iterator[tuple[str, str]]:
    title = ""
    for line in lines:
        if line in _FRAME_TABLES:
            title = line
        elif not line:
            title = ""
        elif title and line[0].isdigit():
            yield title, line
        elif line.startswith(("%", "ENTRY")):
            return
