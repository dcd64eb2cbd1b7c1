"""The encoder against a straight-line float64 reading of its definition.

Legend: M views, P patches, E width, N heads, H head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.config import NumericsConfig
from stepjax.models.layers import halves_of_pairs, rotary_2d, rotate
from stepjax.models.perception_encoder import quick_gelu
from stepjax.models.step_vl import abstract_model

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")


@pytest.fixture(scope="module")
def encoder(small_config, randomized):
    return randomized(abstract_model(small_config, FLOAT32).vision)


def pixels(num_views, side, seed=0):
    return np.random.default_rng(seed).standard_normal((num_views, side, side, 3)).astype(np.float32)


# References: loops over elements, in the words of the specification
# -----------------------------------------------------


def rotate_reference(x_PNH, grid, theta):
    """Pair i of the first half of a head turns by column * theta^(-2i / (H/2)), of the second by row * the same."""
    out = np.array(x_PNH, np.float64)
    per_axis = x_PNH.shape[-1] // 2
    for patch, head in np.ndindex(x_PNH.shape[:2]):
        row, column = divmod(patch, grid)
        for start, position in ((0, column), (per_axis, row)):
            for i in range(per_axis // 2):
                angle = position * theta ** (-2 * i / per_axis)
                even, odd = (float(x) for x in x_PNH[patch, head, start + 2 * i : start + 2 * i + 2])
                out[patch, head, start + 2 * i] = even * math.cos(angle) - odd * math.sin(angle)
                out[patch, head, start + 2 * i + 1] = odd * math.cos(angle) + even * math.sin(angle)
    return out


def interpolate_reference(table, grid):
    """Bilinear with half-pixel centres, edges clamped, no antialiasing."""
    size = table.shape[0]
    out = np.zeros((grid, grid, table.shape[-1]))
    for row, column in np.ndindex(grid, grid):
        y, x = ((i + 0.5) * size / grid - 0.5 for i in (row, column))
        for dy, dx in np.ndindex(2, 2):
            v, u = math.floor(y) + dy, math.floor(x) + dx
            weight = (1 - abs(y - v)) * (1 - abs(x - u))
            out[row, column] += weight * table[min(max(v, 0), size - 1), min(max(u, 0), size - 1)]
    return out


def norm_reference(x, norm, layer=...):
    scale, bias = (np.asarray(p[...], np.float64)[layer] for p in (norm.scale, norm.bias))
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * scale + bias


def encoder_reference(encoder, view_HWC):
    """One view, [side, side, 3] to [P, E], in float64."""
    config, blocks = encoder.config, encoder.blocks
    p, grid = config.patch_size, view_HWC.shape[0] // config.patch_size

    def value(param, layer=...):
        return np.asarray(param[...], np.float64)[layer]

    positions = interpolate_reference(value(encoder.positions), grid)
    x_PE = np.zeros((grid * grid, config.width))
    for row, column in np.ndindex(grid, grid):
        patch = view_HWC[row * p : (row + 1) * p, column * p : (column + 1) * p].astype(np.float64)
        x_PE[row * grid + column] = np.tensordot(patch, value(encoder.patch_kernel), 3) + positions[row, column]
    x_PE = norm_reference(x_PE, encoder.norm_pre)

    for layer in range(config.num_layers):
        attention, mlp = blocks.attention, blocks.mlp
        qkv = np.tensordot(norm_reference(x_PE, blocks.norm1, layer), value(attention.qkv_kernel, layer), 1)
        q, k, v = (qkv + value(attention.qkv_bias, layer)).transpose(1, 0, 2, 3)
        q, k = (rotate_reference(x, grid, config.rope_theta) for x in (q, k))
        scores = np.einsum("PNH,SNH->NPS", q, k) / math.sqrt(config.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("NPS,SNH->PNH", weights / weights.sum(-1, keepdims=True), v)
        branch = np.tensordot(attended, value(attention.out_kernel, layer), 2) + value(attention.out_bias, layer)
        x_PE = x_PE + value(blocks.scale1, layer) * branch

        hidden = norm_reference(x_PE, blocks.norm2, layer) @ value(mlp.up_kernel, layer) + value(mlp.up_bias, layer)
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        branch = hidden @ value(mlp.down_kernel, layer) + value(mlp.down_bias, layer)
        x_PE = x_PE + value(blocks.scale2, layer) * branch
    return x_PE


# Claims
# -----------------------------------------------------------------------------------------------------------------


def test_quick_gelu_is_the_sigmoid_one():
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x, jnp.float32)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    assert np.abs(quick_gelu(jnp.asarray(x)) - jax.nn.gelu(x, approximate=False)).max() > 0.01


@pytest.mark.parametrize("grid", [1, 3, 4])
def test_rotary_rotates_adjacent_pairs_column_half_first(grid):
    x_PNH = np.random.default_rng(0).standard_normal((grid * grid, 2, 12)).astype(np.float32)
    cos_PH, sin_PH = rotary_2d(grid, 12, 100.0)
    low, high = halves_of_pairs(jnp.asarray(x_PNH)[None], axis=0)
    rotated = rotate(low[None], high[None], cos_PH[None], sin_PH[None])[0]
    wanted = halves_of_pairs(jnp.asarray(rotate_reference(x_PNH, grid, 100.0))[None], axis=0)
    np.testing.assert_allclose(rotated, jnp.concatenate([*wanted], axis=-1), atol=2e-6)


def test_rotary_of_a_crop_is_the_corner_of_the_global_table():
    for small, large in zip(rotary_2d(36, 96, 10_000.0), rotary_2d(52, 96, 10_000.0), strict=True):
        np.testing.assert_array_equal(small.reshape(36, 36, 48), large.reshape(52, 52, 48)[:36, :36])


@pytest.mark.parametrize("grid", [4, 6, 8], ids=["crop", "global", "larger"])
def test_equals_the_reference_on_every_grid(encoder, grid):
    """4 and 8 interpolate the 6 x 6 position table, down and up; rotary positions stay 0, 1, 2, ... on all of them."""
    views_MHWC = pixels(2, 4 * grid)
    features_MPE = jax.jit(encoder)(views_MHWC)
    expected = np.stack([encoder_reference(encoder, view) for view in views_MHWC])
    np.testing.assert_allclose(features_MPE, expected, rtol=0, atol=2e-5)


def test_positions_of_a_global_view_are_the_table_itself(encoder):
    np.testing.assert_array_equal(encoder._positions(6), encoder.positions[...])


def test_positions_of_the_public_crop_equal_interpolation_from_52_to_36(small_config, randomized):
    config = dataclasses.replace(
        small_config, vision=dataclasses.replace(small_config.vision, position_grid=52, width=16, num_heads=1)
    )
    encoder = randomized(abstract_model(config, FLOAT32).vision)
    table = np.asarray(encoder.positions[...], np.float64)
    np.testing.assert_allclose(encoder._positions(36), interpolate_reference(table, 36), atol=1e-5)


def test_layer_scale_of_zero_leaves_the_residual_stream(encoder):
    views_MHWC = pixels(1, 24)
    silent = jax.tree.map(lambda x: x, encoder)
    silent.blocks.scale1[...] = jnp.zeros_like(encoder.blocks.scale1[...])
    silent.blocks.scale2[...] = jnp.zeros_like(encoder.blocks.scale2[...])
    deeper = jax.jit(encoder)(views_MHWC)
    still = jax.jit(silent)(views_MHWC)
    scale, bias = encoder.norm_pre.scale[...], encoder.norm_pre.bias[...]
    normalised = (still - bias) / scale
    np.testing.assert_allclose(normalised.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std(-1), 1, atol=1e-3)
    assert np.abs(deeper - still).max() > 0.1


def test_views_do_not_see_each_other_but_patches_do(encoder):
    views_MHWC = pixels(2, 16)
    changed = views_MHWC.copy()
    changed[1, -1, -1] += 1.0
    run = jax.jit(encoder)
    before, after = np.asarray(run(views_MHWC)), np.asarray(run(changed))
    np.testing.assert_array_equal(before[0], after[0])
    assert (np.abs(before[1] - after[1]).max(axis=-1) > 1e-6).all()  # the last pixel reaches the first patch


def test_bfloat16_compute_is_close_and_returns_bfloat16(small_config, randomized):
    numerics = NumericsConfig(compute_dtype="bfloat16", remat="none")
    encoder = randomized(abstract_model(small_config, numerics).vision, spread=0.1)
    views_MHWC = pixels(1, 16)
    features_MPE = jax.jit(encoder)(views_MHWC)
    assert features_MPE.dtype == jnp.bfloat16
    expected = encoder_reference(encoder, views_MHWC[0])
    np.testing.assert_allclose(
        np.asarray(features_MPE[0], np.float64), expected, rtol=0, atol=0.02 * np.abs(expected).max()
    )
