"""Down-samplers against XLA's convolution with PyTorch's padding, and the projector's shapes and order.

Legend: M views, E encoder width, Q tokens of a view, D decoder width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepjax.config import ModelConfig, NumericsConfig, down_sampled
from stepjax.models.projector import DownSampler, Projector
from stepjax.models.step_vl import abstract_model

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")


@pytest.fixture(scope="module")
def projector(small_config, randomized):
    return randomized(abstract_model(small_config, FLOAT32).projector)


@pytest.fixture(scope="module")
def down_sampler(randomized):
    return randomized(jax.eval_shape(lambda: DownSampler(5, 7, rngs=nnx.Rngs(0))))


def convolution(x_MHWE, kernel, bias, padding=((1, 1), (1, 1))):
    out = jax.lax.conv_general_dilated(
        x_MHWE, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    return out + bias


def features(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("height, width", [(6, 6), (7, 7), (1, 1), (2, 2), (9, 4), (13, 13)])
def test_down_sampler_is_the_convolution_with_padding_one(down_sampler, height, width):
    x_MHWE = features(2, height, width, 5)
    out = down_sampler(x_MHWE)
    assert out.shape == (2, (height - 1) // 2 + 1, (width - 1) // 2 + 1, 7)
    expected = convolution(x_MHWE, down_sampler.kernel[...], down_sampler.bias[...])
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_padding_same_would_be_another_function_on_even_grids(down_sampler):
    x_MHWE = features(1, 6, 6, 5)
    same = convolution(x_MHWE, down_sampler.kernel[...], down_sampler.bias[...], padding="SAME")
    assert np.abs(down_sampler(x_MHWE) - same).max() > 0.1


@pytest.mark.parametrize("side", [5, 6])
def test_down_sampler_gradients_are_the_convolution_s(down_sampler, side):
    x_MHWE = features(2, side, side, 5)
    weight = features(2, 3, 3, 7, seed=1)
    bias = down_sampler.bias[...]

    def ours(x, kernel):
        sampler = jax.tree.map(lambda leaf: leaf, down_sampler)
        sampler.kernel[...] = kernel
        return jnp.sum(weight * sampler(x))

    def reference(x, kernel):
        return jnp.sum(weight * convolution(x, kernel, bias))

    arguments = x_MHWE, down_sampler.kernel[...]
    mine, expected = (jax.jit(jax.grad(f, (0, 1)))(*arguments) for f in (ours, reference))
    for one, other in zip(mine, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", [6, 4, 7])
def test_projector_is_two_convolutions_and_one_matrix(projector, grid):
    x_MPE = features(2, grid * grid, 32)
    x = x_MPE.reshape(2, grid, grid, 32)
    for down in (projector.down1, projector.down2):
        x = convolution(x, down.kernel[...], down.bias[...])
    expected_MQD = np.asarray(x).reshape(2, -1, 128) @ np.asarray(projector.kernel[...])
    y_MQD = jax.jit(projector)(x_MPE)
    assert y_MQD.shape == (2, down_sampled(grid) ** 2, 32)
    np.testing.assert_allclose(y_MQD, expected_MQD, rtol=0, atol=1e-5 * np.abs(expected_MQD).max())


def test_tokens_stay_row_major(projector):
    """A token sees the 7 x 7 patches around patch 4 * (row, column), and no other."""
    grid, tokens = 12, 3
    run = jax.jit(projector)
    x_MPE = features(1, grid * grid, 32)
    before = np.asarray(run(x_MPE))[0]
    for patch_row, patch_column in [(0, 11), (11, 0), (4, 8), (6, 6)]:
        changed = x_MPE.copy()
        changed[0, patch_row * grid + patch_column] += 1.0
        moved = np.abs(np.asarray(run(changed))[0] - before).max(axis=-1) > 1e-6
        expected = [
            abs(4 * row - patch_row) <= 3 and abs(4 * column - patch_column) <= 3
            for row in range(tokens)
            for column in range(tokens)
        ]
        assert moved.tolist() == expected


def test_public_sizes_give_169_and_81_tokens():
    projector = abstract_model(ModelConfig()).projector
    for grid, tokens in ((52, 169), (36, 81)):
        x_MPE = jax.ShapeDtypeStruct((2, grid * grid, 1536), jnp.bfloat16)
        out = jax.eval_shape(lambda projector, x_MPE: projector(x_MPE), projector, x_MPE)
        assert out.shape == (2, tokens, 4096)


def test_bias_is_added_when_the_checkpoint_has_one(small_config, randomized, projector):
    config = dataclasses.replace(small_config, projector_bias=True)
    biased: Projector = randomized(abstract_model(config, FLOAT32).projector)
    assert projector.bias is None and biased.bias is not None
    x_MPE = features(1, 16, 32)
    silent = jax.tree.map(lambda leaf: leaf, biased)
    silent.bias[...] = jnp.zeros_like(biased.bias[...])
    np.testing.assert_allclose(
        np.asarray(biased(x_MPE)) - np.asarray(silent(x_MPE)),
        np.broadcast_to(biased.bias[...], (1, 1, 32)),
        atol=1e-4,
    )
