"""On CPU few layers are unrolled and products are of two matrices; elsewhere layers are scanned. Values are equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepjax.models.layers as layers
import stepjax.models.remat as remat
from stepjax.models.layers import project


@pytest.fixture
def elsewhere(monkeypatch):
    """Models are traced as for an accelerator."""
    for module in (layers, remat):
        monkeypatch.setattr(module, "target_platform", lambda: "tpu")


def decoder_program(model, numerics):
    """The jaxpr of a decoder under these numerics, and its hidden states."""
    decoder = jax.tree.map(lambda leaf: leaf, model.decoder)
    decoder.numerics = dataclasses.replace(decoder.numerics, **numerics)
    x_BTD = np.random.default_rng(0).standard_normal((2, 6, decoder.config.width)).astype(np.float32)
    positions_BT = np.tile(np.arange(6, dtype=np.int32), (2, 1))

    def run(decoder, x_BTD):
        return decoder(x_BTD, positions_BT)[0]

    gradient = jax.grad(lambda decoder, x_BTD: jnp.sum(run(decoder, x_BTD) ** 2), argnums=(0, 1))
    program = jax.jit(gradient).lower(decoder, x_BTD)
    return program.as_text(), jax.jit(gradient)(decoder, x_BTD)


def test_few_layers_that_save_everything_have_no_loop(small_model):
    assert "stablehlo.while" not in decoder_program(small_model, {"remat": "none"})[0]


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_rematerialised_layers_are_scanned(small_model, policy):
    assert "stablehlo.while" in decoder_program(small_model, {"remat": policy})[0]


def test_many_layers_are_scanned(small_model, monkeypatch):
    monkeypatch.setattr(remat, "_FEW_LAYERS", small_model.config.decoder.num_layers - 1)
    assert "stablehlo.while" in decoder_program(small_model, {"remat": "none"})[0]


def test_layers_are_scanned_elsewhere(small_model, elsewhere):
    assert "stablehlo.while" in decoder_program(small_model, {"remat": "none"})[0]


def test_gradients_are_those_of_scanned_layers(small_model, request):
    _, unrolled = decoder_program(small_model, {"remat": "none"})
    request.getfixturevalue("elsewhere")
    _, scanned = decoder_program(small_model, {"remat": "none"})
    for found, expected in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


PRODUCTS = {
    "BTD,DNH->BTNH": ((2, 3, 5), (5, 2, 4)),
    "MPE,EQNH->QMPNH": ((2, 3, 5), (5, 4, 2, 3)),
    "BTNH,NHD->BTD": ((2, 3, 2, 4), (2, 4, 5)),
    "MHWT,TO->MHWO": ((2, 3, 3, 5), (5, 4)),
}


@pytest.mark.parametrize("equation", PRODUCTS)
def test_a_product_of_matrices_is_the_einsum(equation):
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in PRODUCTS[equation])
    np.testing.assert_allclose(project(equation, x, kernel), np.einsum(equation, x, kernel), rtol=1e-5, atol=1e-5)


def test_the_kernels_gradient_needs_no_transposed_copy():
    x_BTD, kernel_DF = jnp.ones((4, 32, 24)), jnp.ones((24, 40))

    def loss(kernel_DF, x_BTD):
        return jnp.sum(jax.nn.silu(project("BTD,DF->BTF", jax.nn.silu(x_BTD), kernel_DF)))

    program = jax.jit(jax.grad(loss)).lower(kernel_DF, x_BTD).compile().as_text()
    assert "f32[24,128]" not in program and "f32[40,128]" not in program
