"""The program's text where JAX 0.10 cannot print it, and the bytes that it is taken from."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.planning import hlo, program_text
from stepjax.planning.topologies import find

NAME = b"\n\x05jit_f"  # field 1, in front of all others


def module(*instructions):
    """A HloModuleProto with one computation; an instruction is its opcode and operands."""
    made = program_text._module_class()()
    computation = made.computations.add()
    for opcode, operands in instructions:
        # A field that our schema leaves out: the instruction's name.
        one = type(computation.instructions.add()).FromString(b"\n\x03abc")
        one.opcode = opcode
        one.operand_ids.extend(operands)
        computation.instructions[-1].CopyFrom(one)
    return NAME + made.SerializeToString() + b"\x12\xc8\x01" + b"m" * 200  # field 2, the entry computation's name


def in_executable(module):
    """A module behind its length, among other bytes."""
    noise = NAME + b" and more"
    return b"\x00\x01" + noise + bytes([len(module) & 127 | 128, len(module) >> 7]) + module + noise


def test_operands_that_come_later_are_left_out_and_nothing_else():
    data = module((b"async-update", [129, 2, 3]), (b"add", [1, 2]))
    [found] = program_text._modules(in_executable(data), b"jit_f")
    expected = type(found).FromString(module((b"async-update", [129]), (b"add", [1, 2])))
    changed = type(found).FromString(program_text._with_one_operand(found))
    assert changed == expected and changed != type(found).FromString(data)
    for kept in (NAME, b"abc", b"m" * 200):
        assert kept in changed.SerializeToString()


def test_modules_are_found_among_other_bytes():
    data = in_executable(module((b"add", [1, 2])))
    [found] = program_text._modules(data, b"jit_f")
    assert found.computations[0].instructions[0].operand_ids == [1, 2]
    assert not list(program_text._modules(data, b"jit_g"))


def test_block_headers_are_taken_out():
    blocks = [bytes([i]) * (65536 - 24) for i in range(3)]
    header = program_text._RIEGELI + b"h" * 16
    data = b"in front" + b"".join(header + block for block in blocks)
    assert program_text._without_block_headers(data) == b"".join(blocks)


def test_a_gather_on_the_sparsecore_is_printed():
    pytest.importorskip("libtpu")
    mesh = jax.sharding.Mesh(np.array(find("v5p-8").devices()[:1]), ("x",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    table = jax.ShapeDtypeStruct((151936, 64), jnp.bfloat16, sharding=layout)
    ids = jax.ShapeDtypeStruct((2**20,), jnp.int32, sharding=layout)

    def look_up(table, ids):
        return table[ids].sum()

    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(look_up).lower(table, ids).compile()
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
    program = hlo.read(program_text.program_text(compiled, "jit_look_up"))
    operations = program.computations[program.entry]
    assert any(op.thread == "sparsecore" for op in operations)
    assert any(op.cycles for op in operations)
    update = next(op for op in operations if op.opcode == "custom-call-update")
    assert update.operands[0] in {op.name for op in operations if op.opcode == "custom-call-start"}
