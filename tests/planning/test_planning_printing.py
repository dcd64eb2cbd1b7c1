"""The program's text where JAX 0.10 refuses it, and the bytes it is taken from."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.planning import hlo, printing
from stepjax.planning.topologies import find


def field(number, payload):
    assert len(payload) < 128
    return printing._encoded(number << 3 | 2) + bytes([len(payload)]) + payload


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**40])
def test_numbers_on_the_wire(value):
    encoded = printing._encoded(value)
    assert printing._varint(encoded + b"\xff", 0) == (value, len(encoded))


def test_operands_that_come_later_are_left_out():
    def instruction(opcode, operands):
        return field(1, b"name") + field(2, opcode) + field(36, operands) + b"\x08\x07"

    before = [instruction(b"async-update", b"\x81\x01\x02\x03"), instruction(b"add", b"\x01\x02")]
    after = [instruction(b"async-update", b"\x81\x01"), instruction(b"add", b"\x01\x02")]
    modules = [field(1, b"jit_f") + field(3, b"".join(field(2, i) for i in ops)) for ops in (before, after)]
    assert printing._with_one_operand(modules[0]) == modules[1]


def test_block_headers_are_taken_out():
    blocks = [bytes([i]) * (65536 - 24) for i in range(3)]
    header = printing._RIEGELI + b"h" * 16
    data = b"in front" + b"".join(header + block for block in blocks)
    assert printing._without_block_headers(data) == b"".join(blocks)


def test_modules_are_found_among_other_bytes():
    module = field(1, b"jit_f") + field(3, b"\x0a\x01x" * 20) + field(2, b"main" * 20)
    length = printing._encoded(len(module))
    assert len(length) == 2
    noise = b"\x0a\x05jit_f and more"
    assert printing._modules(b"\x00\x01" + noise + length + module + noise, b"jit_f") == [module]


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
    program = hlo.read(printing.program_text(compiled, "jit_look_up"))
    operations = program.computations[program.entry]
    assert any(op.thread == "sparsecore" for op in operations)
    assert any(op.cycles for op in operations)
    update = next(op for op in operations if op.opcode == "custom-call-update")
    assert update.operands[0] in {op.name for op in operations if op.opcode == "custom-call-start"}
