"""The text of a compiled program, also where JAX 0.10 refuses to print it.

What libtpu runs on the SparseCore it calls asynchronously, with operands that arrive after the call's start. JAX 0.10's
reader of programs takes no such operand ("async-update instruction should have 1 operands but sees 3"). The program is
whole in the serialised executable, so it is taken from there, without those operands: a plan does not need them.

The executable is a Riegeli file (github.com/google/riegeli, records file format): blocks of 64 KiB, each of which
begins with a header of 24 bytes, wherever in a record that falls. Its records are not compressed.
"""

import importlib
import re
from typing import Any

import jax

_RIEGELI = bytes.fromhex("83af70d10d884a3f")
_COMPUTATIONS, _INSTRUCTIONS, _OPCODE, _OPERANDS = 3, 2, 2, 36  # fields of HloModuleProto and what is in it


def program_text(compiled: jax.stages.Compiled, name: str) -> str:
    """The scheduled program of a `jax.stages.Compiled`, whose module has this name ("jit_train_step").

    Raises:
        jax.errors.JaxRuntimeError: it cannot be printed.
    """
    if jax.__version_info__ < (0, 11):
        # Asked first: a refusal to print leaves a page on stderr.
        executable: Any = compiled._executable  # the public interface has no way to the bytes
        data = _without_block_headers(executable.xla_executable.serialize())
        texts = [_print(module) for module in _modules(data, name.encode())]
        # An executable holds several stages of its program; the last has the estimates.
        text = max(texts, key=lambda text: text.count("estimated_cycles"), default="")
        if "estimated_cycles" in text:
            return text
    return compiled.as_text() or ""


def _print(module: bytes) -> str:
    hlo: Any = importlib.import_module("jaxlib._hlo")
    return hlo.HloModule.from_serialized_hlo_module_proto(_with_one_operand(module)).to_string()


def _without_block_headers(data: bytes) -> bytes:
    start = max(data.find(_RIEGELI), 0)
    return b"".join(data[i + 24 : i + 65536] for i in range(start, len(data), 65536))


def _modules(data: bytes, name: bytes) -> list[bytes]:
    """The HloModuleProtos of this name in the records of an executable, whose other contents are not public."""
    found = []
    start_of_module = re.compile(re.escape(b"\n" + bytes([len(name)]) + name))  # field 1, the name, comes first
    for match in start_of_module.finditer(data):
        start = match.start()
        for digits in range(2, 6):
            try:
                length, end = _varint(data, start - digits)
            except IndexError:
                continue
            if end == start and start + length <= len(data):
                module = data[start : start + length]
                fields = _fields(module)
                if fields is not None and any(number == _COMPUTATIONS for number, *_ in fields):
                    found.append(module)
    return found


def _with_one_operand(module: bytes) -> bytes:
    def computation(data: bytes) -> bytes:
        return _replace(data, _INSTRUCTIONS, instruction)

    def instruction(data: bytes) -> bytes:
        fields = _fields(data)
        assert fields is not None
        opcodes = [data[start:end] for number, _, start, end, _ in fields if number == _OPCODE]
        return _replace(data, _OPERANDS, _first) if opcodes == [b"async-update"] else data

    def _first(operands: bytes) -> bytes:
        return operands[: _varint(operands, 0)[1]]

    return _replace(module, _COMPUTATIONS, computation)


# Protocol buffers on the wire ----------------------------------------------------------------------------------------

# number, wire type, start and end of the payload, start of the field
_Field = tuple[int, int, int, int, int]


def _fields(data: bytes) -> list[_Field] | None:
    """The fields of a message; None if the bytes are none."""
    fields, i = [], 0
    try:
        while i < len(data):
            begin = i
            key, i = _varint(data, i)
            number, kind = key >> 3, key & 7
            start = i
            if kind == 0:
                _, i = _varint(data, i)
            elif kind == 2:
                length, start = _varint(data, i)
                i = start + length
            elif kind in (1, 5):
                i += 8 if kind == 1 else 4
            else:
                return None
            if number == 0 or i > len(data):
                return None
            fields.append((number, kind, start, i, begin))
    except IndexError:
        return None
    return fields


def _replace(data: bytes, wanted: int, change: Any) -> bytes:
    """A message with the payload of every field of a number changed."""
    fields = _fields(data)
    assert fields is not None
    parts = []
    for number, kind, start, end, begin in fields:
        if number == wanted and kind == 2:
            payload = change(data[start:end])
            parts += [_encoded(number << 3 | kind), _encoded(len(payload)), payload]
        else:
            parts.append(data[begin:end])
    return b"".join(parts)


def _varint(data: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[i]
        value |= (byte & 127) << shift
        i, shift = i + 1, shift + 7
        if byte < 128:
            return value, i


def _encoded(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)
