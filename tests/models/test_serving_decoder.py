"""The engine's form of the decoder: the same numbers, no copies of kernels, no second copy of the model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import ConfigError
from stepjax.inference import programs
from stepjax.inference.batch import Batch
from stepjax.inference.config import EngineConfig
from stepjax.models.paged_cache import Chunks, PagedCache, make_pool
from stepjax.models.serving_decoder import ServingDecoder, product, quantise, serving_decoder

PAGE, PAGES = 16, 4


@pytest.fixture(scope="module")
def decoder(small_model):
    return small_model.decoder


def cached(decoder, length=20):
    """Hidden states of a prompt's only chunk."""
    tokens_1T = np.arange(length)[None] % decoder.config.vocab_size
    pool = make_pool(decoder.config, PAGES, PAGE, jnp.dtype("float32"), "cpu")
    cache = PagedCache(pool, Chunks(jnp.arange(PAGES)[None], jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)))
    return jax.jit(lambda d: d(d.embed(tokens_1T), np.arange(length)[None], None, cache)[0])(decoder)


def kernels_of(decoder):
    return [leaf for leaf in jax.tree.leaves((decoder.qkv, decoder.out, decoder.gate_up, decoder.down))]


def test_hidden_states_and_logits_are_the_decoders(decoder):
    serving = serving_decoder(decoder, None)
    assert isinstance(serving, ServingDecoder) and serving_decoder(serving, None) is serving
    expected, found = cached(decoder), cached(serving)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(serving.logits(found), decoder.logits(found), rtol=0, atol=1e-5)


def test_unknown_weights_are_refused():
    with pytest.raises(ConfigError, match="engine.weights='int4'"):
        EngineConfig(weights="int4")  # pyright: ignore[reportArgumentType]


def test_int8_values_are_the_nearest_multiples_of_a_scale_per_output():
    kernel_OI = jnp.array([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.02]])
    values_OI, scale_O = quantise(kernel_OI)
    np.testing.assert_array_equal(values_OI, [[127, -63, 0], [0, 0, 0], [-127, 64, 1]])
    np.testing.assert_allclose(scale_O, [1, 0, 0.02], rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_products_on_cpu_are_those_of_floats(rows):
    x_BTI, kernel_OI = (
        jax.random.normal(jax.random.key(0), (rows, 1, 96)),
        jax.random.normal(jax.random.key(1), (40, 96)),
    )
    np.testing.assert_allclose(product(x_BTI, kernel_OI, None), x_BTI @ kernel_OI.T, rtol=0, atol=1e-5)
    values_OI, scale_O = quantise(kernel_OI)
    expected = x_BTI @ (values_OI * scale_O[:, None]).T
    np.testing.assert_allclose(product(x_BTI, values_OI, scale_O), expected, rtol=0, atol=3e-3)
    assert np.isnan(product(x_BTI.at[0, 0, 5].set(jnp.nan), values_OI, scale_O)[0]).all()


def test_int8_differs_from_float32_by_the_rounding_of_weights(decoder):
    serving = serving_decoder(decoder, "int8")
    assert {leaf.dtype for leaf in kernels_of(serving)} == {jnp.dtype("int8"), jnp.dtype("float32")}
    exact, rounded = cached(decoder), cached(serving)
    difference = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.05


def test_donated_kernels_are_deleted_and_others_are_not(decoder):
    copy = jax.tree.map(jnp.copy, decoder)
    kept = serving_decoder(copy, None)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(copy))
    serving = serving_decoder(copy, None, donate=True)
    attention, mlp = copy.blocks.attention, copy.blocks.mlp
    gone = [attention.q_kernel, attention.k_kernel, attention.v_kernel, attention.out_kernel]
    gone += [mlp.gate_kernel, mlp.up_kernel, mlp.down_kernel]
    arrays = [array for param in gone for array in jax.tree.leaves(param)]
    assert all(array.is_deleted() for array in arrays)
    assert sum(x.nbytes for x in kernels_of(serving)) == sum(array.nbytes for array in arrays)
    np.testing.assert_array_equal(cached(serving), cached(kept))


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_decoding_step_does_not_copy_kernels(decoder, rows, weights):
    serving = serving_decoder(decoder, weights)
    tables = Batch.empty(rows, 1, PAGES, 0).tables
    pool = make_pool(decoder.config, PAGES, PAGE, jnp.dtype("float32"), "cpu")
    tokens_B1 = np.zeros((rows, 1), np.int32)

    @jax.jit
    def step(decoder, pool):
        hidden_B1D, cache = decoder(decoder.embed(tokens_B1), tokens_B1, None, PagedCache(pool, tables))
        return decoder.logits(hidden_B1D), cache.pool_S2KTW

    text = step.lower(serving, pool).compile().as_text()
    shapes = {leaf.shape for leaf in kernels_of(serving) if leaf.ndim == 2}
    for shape in shapes | {shape[::-1] for shape in shapes}:
        pattern = rf"= \w+\[{shape[0]},{shape[1]}\]\S* ([\w-]+)\("
        assert set(re.findall(pattern, text)) <= {"parameter", "get-tuple-element", "bitcast"}, shape


def test_packed_models_of_the_same_structure_share_a_program(decoder):
    packed, other = programs.Packed.of(decoder), programs.Packed.of(jax.tree.map(lambda x: 2 * x, decoder))
    assert jax.tree.structure(packed) == jax.tree.structure(other)
    assert jax.tree.structure(packed) != jax.tree.structure(programs.Packed.of(serving_decoder(decoder, None)))
    assert jax.tree.structure(programs.unpacked(packed)) == jax.tree.structure(decoder)
