"""The kernel compiles for every TPU at the model's vocabulary, reads the logits where they lie, and sorts nothing."""

import pytest

from pallas_kernels.checks import ArgumentError
from tests.pallas_kernels.aot import benchmark_module, compile_for, every_chip, needs_libtpu

pytestmark = needs_libtpu
VOCAB = 151_936
targets = benchmark_module("kernel_targets")


@every_chip
@pytest.mark.parametrize("rows", (64, pytest.param(256, marks=pytest.mark.slow)))
def test_compiles(chip, rows):
    draw, (logits_BV, arguments) = targets.draw(rows)
    compiled = compile_for(chip, draw, logits_BV, arguments)
    assert "sort" not in compiled.as_text()
    # Not enough for a second copy of the logits, in whatever type.
    assert compiled.memory_analysis().temp_size_in_bytes < logits_BV.size * logits_BV.dtype.itemsize // 2


@pytest.mark.parametrize("rows, vocab_size", ((1, VOCAB), (3, 50_257), (20, 262_144), (8, 1)))
def test_compiles_any_number_of_rows_and_tokens(rows, vocab_size):
    draw, arguments = targets.draw(rows, vocab_size)
    compile_for("v5e", draw, *arguments)


def test_refuses_a_vocabulary_beyond_vector_memory():
    draw, arguments = targets.draw(8, 500_000)
    with pytest.raises(ArgumentError, match="vocabulary of 500000: 8 rows take .* MiB .* tpu7x has 64"):
        compile_for("tpu7x", draw, *arguments)
