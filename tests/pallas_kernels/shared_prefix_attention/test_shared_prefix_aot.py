"""The kernel compiles for every TPU generation, at the sizes it is made for and across what it accepts."""

import jax
import jax.numpy as jnp
import pytest

from tests.pallas_kernels.aot import benchmark_module, compile_for, every_chip, needs_libtpu

pytestmark = needs_libtpu
targets = benchmark_module("kernel_targets")
SMALL = dict(batch=8, groups=2, prefix=1024, suffix=512, num_pages=512)


def compile_decode(chip, dtype=jnp.bfloat16, **sizes):
    f, arguments = targets.decode(**sizes)
    cast = [jax.ShapeDtypeStruct(x.shape, dtype if x.dtype == jnp.bfloat16 else x.dtype) for x in arguments]
    return compile_for(chip, f, *cast), arguments


@pytest.mark.slow
@every_chip
def test_compiles_for_qwen3_8b_with_long_contexts(chip):
    """8 prefixes of up to 32k, 128 suffixes of up to 8k; no copy of the pool is made."""
    compiled, (_, pool, *_) = compile_decode(chip)
    assert compiled.as_text().count("shared_prefix_attention_prefix") > 0
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * pool.dtype.itemsize / 8


@pytest.mark.parametrize(
    "chip, sizes",
    [
        ("v5e", dict(num_heads=6, num_kv_heads=2, width=96, page_size=16)),
        ("v6e", dict(num_heads=2, num_kv_heads=2, width=64, page_size=256)),
        ("v5p", dict(num_heads=8, num_kv_heads=1, width=128, page_size=32)),
        ("v6e", dict(num_heads=5, num_kv_heads=1, width=256, page_size=64)),
        ("tpu7x", dict(num_heads=1, num_kv_heads=1, width=128, page_size=16, dtype=jnp.float32)),
    ],
    ids=str,
)
def test_compiles_for_other_sizes(chip, sizes):
    compiled, (_, pool, *_) = compile_decode(chip, **SMALL, **sizes)
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * 2
