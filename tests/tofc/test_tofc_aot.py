"""Merging, and a device's whole programs, compile for TPUs at the sizes of STEP3-VL."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import pytest
from tiny_tofc import config as tiny

from stepjax.chips import TPUS
from stepjax.config import ImageConfig, ModelConfig, NumericsConfig, TofcConfig
from stepjax.interop.codec_files import device_programs
from stepjax.tofc.device import _MOST_VIEWS
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


STEP3_VL_10B = dataclasses.replace(
    tiny,
    model=ModelConfig(tofc=TofcConfig(bottleneck=1024)),
    images=ImageConfig(),
    numerics=NumericsConfig(param_dtype="bfloat16"),
)


@needs_libtpu
@pytest.mark.parametrize("config", [tiny, pytest.param(STEP3_VL_10B, marks=pytest.mark.slow)], ids=["tiny", "10B"])
def test_a_devices_programs_compile_for_tpus_and_fit(config):
    """As in its file: encoder, convolutions, bottleneck and merging, for the most views of a call."""
    for kind, program in device_programs(config).items():
        exported = jax.export.deserialize(bytearray(program))
        (parameters, views), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        count = {"crop": _MOST_VIEWS, "global": 1}[kind]
        pixels = jax.ShapeDtypeStruct((count, *views.shape[1:]), views.dtype)
        memory = compile_for("v5e", exported.call, parameters, pixels).memory_analysis()
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        assert size < TPUS["v5e"].hbm_limit_gib * 2**30
