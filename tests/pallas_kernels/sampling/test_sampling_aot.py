"""The kernel compiles for every TPU at the model's vocabulary, reads the logits where they lie, and sorts nothing."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.checks import ArgumentError
from pallas_kernels.sampling import bitmask, sample
from tests.pallas_kernels.aot import compile_for, every_chip, needs_libtpu

pytestmark = needs_libtpu
VOCAB = 151_936


def draw(logits_BV, arguments):
    return sample(logits_BV, implementation="tpu", **arguments)


def specs(batch, vocab_size, dtype, masked):
    def rows(dtype):
        return jax.ShapeDtypeStruct((batch,), dtype)

    arguments = {"seeds_B": rows(jnp.uint32), "positions_B": rows(jnp.int32), "top_k_B": rows(jnp.int32)}
    arguments |= {name: rows(jnp.float32) for name in ("temperature_B", "top_p_B", "min_p_B")}
    if masked:
        arguments["allowed_BW"] = jax.ShapeDtypeStruct((batch, bitmask.words_for(vocab_size)), jnp.int32)
    return jax.ShapeDtypeStruct((batch, vocab_size), dtype), arguments


@every_chip
@pytest.mark.parametrize(
    "batch, dtype, masked",
    (
        (64, jnp.float32, False),
        pytest.param(8, jnp.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(256, jnp.float32, True, marks=pytest.mark.slow),
    ),
)
def test_compiles(chip, batch, dtype, masked):
    logits_BV, arguments = specs(batch, VOCAB, dtype, masked)
    compiled = compile_for(chip, draw, logits_BV, arguments)
    assert "sort" not in compiled.as_text()
    # Not enough for a second copy of the logits, in whatever type.
    assert compiled.memory_analysis().temp_size_in_bytes < logits_BV.size * logits_BV.dtype.itemsize // 2


@pytest.mark.parametrize("batch, vocab_size", ((1, VOCAB), (3, 50_257), (20, 262_144), (8, 1)))
def test_compiles_any_number_of_rows_and_tokens(batch, vocab_size):
    compile_for("v5e", draw, *specs(batch, vocab_size, jnp.bfloat16, True))


def test_refuses_a_vocabulary_beyond_vector_memory():
    with pytest.raises(ArgumentError, match="vocabulary of 500000 in float32: 8 rows take .* MiB .* tpu7x has 64"):
        compile_for("tpu7x", draw, *specs(8, 500_000, jnp.float32, False))
