"""Merging compiles for TPUs, at the sizes of STEP3-VL."""

import jax
import jax.numpy as jnp
import pytest

from stepjax.tofc.merge import merge
from tests.pallas_kernels.aot import compile_for, needs_libtpu


@needs_libtpu
@pytest.mark.parametrize(
    "chip, tokens, count",
    [("v5e", 169, 32), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("v6e", 169, 16), ("v5e", 81, 16)))],
)
def test_merging_compiles_for_tpus(chip, tokens, count):
    """Within a larger function, with its gradient."""

    def f(x_MNC, kernel_CD):
        def loss(x_MNC):
            return jnp.mean(jnp.square(merge(x_MNC, count).means_KC @ kernel_CD), dtype=jnp.float32)

        return jax.value_and_grad(loss)(x_MNC)

    shapes = jax.ShapeDtypeStruct((4, tokens, 6144), jnp.bfloat16), jax.ShapeDtypeStruct((6144, 128), jnp.bfloat16)
    compiled = compile_for(chip, f, *shapes)
    views = 4 * tokens * 6144 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * views
