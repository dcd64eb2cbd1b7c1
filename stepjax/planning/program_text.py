"""The text of a compiled program, even if JAX 0.10 cannot print it.

libtpu calls SparseCore work asynchronously, with operands that arrive after the start of the call. JAX 0.10 rejects
them ("async-update instruction should have 1 operands but sees 3"). The serialised executable contains the whole
program, so we extract it from there and drop these operands, which a plan does not need.

The executable is a Riegeli file (github.com/google/riegeli, records file format): 64 KiB blocks, each starting with a
24-byte header, even in the middle of a record. Its records are not compressed.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

import jax

_RIEGELI = bytes.fromhex("83af70d10d884a3f")


def program_text(compiled: jax.stages.Compiled, name: str) -> str:
    """The scheduled program of a `jax.stages.Compiled` with this module name ("jit_train_step").

    Raises:
        jax.errors.JaxRuntimeError: the program cannot be printed.
    """
    if jax.__version_info__ < (0, 11):
        # Before `as_text`, because its failure prints a page to stderr.
        executable: Any = compiled._executable  # the public API does not expose the bytes
        data = _without_block_headers(executable.xla_executable.serialize())
        hlo: Any = importlib.import_module("jaxlib._hlo")
        modules = map(_with_one_operand, _modules(data, name.encode()))
        texts = [hlo.HloModule.from_serialized_hlo_module_proto(module).to_string() for module in modules]
        # An executable contains several stages of its program; only the last has the estimates.
        text = max(texts, key=lambda text: text.count("estimated_cycles"), default="")
        if "estimated_cycles" in text:
            return text
    return compiled.as_text() or ""


def _without_block_headers(data: bytes) -> bytes:
    start = max(data.find(_RIEGELI), 0)
    return b"".join(data[i + 24 : i + 65536] for i in range(start, len(data), 65536))


def _modules(data: bytes, name: bytes) -> Iterator[Any]:
    """The HloModuleProtos with this name in an executable; its other contents are undocumented."""
    from google.protobuf.message import DecodeError

    for match in re.finditer(re.escape(b"\n" + bytes([len(name)]) + name), data):  # field 1, the name, comes first
        start = match.start()
        for digits in range(2, min(6, start + 1)):  # bytes of the varint length before it, low bits first
            *low, high = data[start - digits : start]
            length = sum((digit & 127) << 7 * i for i, digit in enumerate((*low, high)))
            if high < 128 and all(digit >= 128 for digit in low) and start + length <= len(data):
                try:
                    module = _module_class().FromString(data[start : start + length])
                except DecodeError:
                    continue
                if module.computations:
                    yield module


def _with_one_operand(module: Any) -> bytes:
    for computation in module.computations:
        for instruction in computation.instructions:
            if instruction.opcode == b"async-update":
                del instruction.operand_ids[1:]
    return module.SerializeToString()


@functools.cache
def _module_class() -> Any:
    """HloModuleProto with the fields we need; protobuf preserves the others."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Module"))


_SCHEMA = """
name: "hlo"
message_type {
  name: "Module"
  field { name: "computations" number: 3 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Computation" }
}
message_type {
  name: "Computation"
  field { name: "instructions" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Instruction" }
}
message_type {
  name: "Instruction"
  field { name: "opcode" number: 2 label: LABEL_OPTIONAL type: TYPE_BYTES }
  field { name: "operand_ids" number: 36 label: LABEL_REPEATED type: TYPE_INT64 }
}
"""
