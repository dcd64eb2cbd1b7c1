"""The entropy model's rate against NumPy, and its integers on both ends.

Legend: N features, C channels, E experts, Z latents.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepjax.config import TofcConfig
from stepjax.errors import ConfigError
from stepjax.tofc import codec
from stepjax.tofc.hyperprior import Hyperprior, Tofc, balance_sum, freeze, histogram_bits, laplace_bits
from stepjax.tofc.tables import LIMIT, MAX_LATENT, SCALES, UNIT


def laplace_mass(residual, scale):
    def cumulated(x):
        return np.where(x < 0, np.exp(x / scale) / 2, 1 - np.exp(-x / scale) / 2)

    return cumulated(residual + 0.5) - cumulated(residual - 0.5)


def test_laplace_bits_are_those_of_the_mass():
    residual, scale = np.meshgrid(np.linspace(-8, 8, 161), SCALES[10:])
    found = laplace_bits(jnp.asarray(residual, jnp.float32), jnp.asarray(scale, jnp.float32))
    mass = laplace_mass(residual, scale)
    checked = mass > 1e-9  # elsewhere the difference of two numbers near 1 is no reference
    np.testing.assert_allclose(np.asarray(found)[checked], -np.log2(mass[checked]), rtol=2e-4, atol=2e-6)


def test_laplace_bits_are_finite_far_out_and_nearly_nothing_where_all_is_certain():
    far = laplace_bits(jnp.float32(1e4), jnp.asarray(SCALES, jnp.float32))
    np.testing.assert_allclose(far[:5], 1e4 / SCALES[:5] / np.log(2), rtol=1e-3)
    np.testing.assert_allclose(laplace_bits(jnp.float32(0), jnp.float32(SCALES[0])), 6.55e-5, rtol=0.01)
    gradient = jax.grad(lambda r, b: jnp.sum(laplace_bits(r, b)), argnums=(0, 1))
    for residual in (0.0, 0.499, 0.5, 3.0, 1e4):
        slopes = gradient(jnp.full(len(SCALES), residual, jnp.float32), jnp.asarray(SCALES, jnp.float32))
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_latents_learn_the_histograms_slope():
    logits_ZV = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2 * MAX_LATENT + 1)), jnp.float32)
    latents_NZ = jnp.array([[0.0, -3.0, 15.0], [7.0, 1.0, -15.0]])
    bits_ZV = -np.log2(np.asarray(jax.nn.softmax(logits_ZV)))
    found, gradient = jax.value_and_grad(lambda x: jnp.sum(histogram_bits(x, logits_ZV)))(latents_NZ)
    index = np.asarray(latents_NZ, int) + MAX_LATENT
    np.testing.assert_allclose(found, sum(bits_ZV[z, index[n, z]] for n in range(2) for z in range(3)), rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 1], (bits_ZV[1, 13] - bits_ZV[1, 11]) / 2, rtol=1e-4)


def test_the_rate_is_that_of_the_formula(trained, tables, sample_features):
    """Of the chosen experts, from the codec's integers."""
    x_NC = sample_features(100, seed=3)
    rate = jax.jit(lambda x: trained(x, hard=True))(x_NC)
    experts_N, latents_NZ, scales_NC, residuals_NC = codec.analyse(tables, x_NC)
    bits_N = -np.log2(laplace_mass(residuals_NC, SCALES[scales_NC])).sum(axis=1)
    histogram_EZV = np.asarray(jax.nn.log_softmax(trained.experts.histogram[...])) / np.log(2)
    for n, (expert, latents_Z) in enumerate(zip(experts_N, latents_NZ, strict=True)):
        bits_N[n] -= sum(histogram_EZV[expert, z, latent + MAX_LATENT] for z, latent in enumerate(latents_Z))
    np.testing.assert_allclose(rate.bits_N, bits_N + 2, rtol=1e-4)
    np.testing.assert_allclose(rate.experts_E, np.bincount(experts_N, minlength=4) / 100, rtol=1e-6)
    np.testing.assert_allclose(
        balance_sum(rate.weights_NE[None]) / 100,
        np.sum(np.square(np.bincount(experts_N, minlength=4) / 100 - 0.25)),
        rtol=1e-4,
    )


def test_every_expert_is_used_and_the_soft_rate_is_near_the_hard_one(trained, sample_features):
    x_NC = sample_features(500, seed=4)
    hard, soft = (jax.jit(lambda x, c=c: trained(x, temperature=0.05, hard=c))(x_NC) for c in (True, False))
    assert np.asarray(hard.experts_E).min() > 0.05
    np.testing.assert_allclose(soft.bits_N.sum(), hard.bits_N.sum(), rtol=0.02)


def test_a_mixture_is_the_weighted_sum(trained, sample_features):
    x_NC = jnp.asarray(sample_features(20, seed=5))
    rate = jax.jit(lambda x: trained(x, temperature=3.0))(x_NC)
    standard_NC = (x_NC - trained.offset[...]) / trained.spread[...]
    scores_NE = trained.router(jnp.clip(jnp.round(standard_NC * UNIT), -LIMIT, LIMIT)) / UNIT
    weights_NE = jax.nn.softmax(scores_NE / 3.0)
    features_NC, bits_N = 0.0, 2.0
    alone = jax.jit(lambda expert, x: expert(x))
    for e in range(4):
        own_NC, own_N = alone(jax.tree.map(lambda x, e=e: x[e], trained.experts), standard_NC)
        features_NC, bits_N = features_NC + weights_NE[:, e : e + 1] * own_NC, bits_N + weights_NE[:, e] * own_N
    np.testing.assert_allclose(rate.bits_N, bits_N, rtol=1e-5)
    expected = trained.offset[...] + trained.spread[...] * features_NC
    np.testing.assert_allclose(rate.features_NC, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", ["router", "analysis", "synthesis"])
def test_integers_are_the_same_in_numpy_and_jax_and_in_every_batch(trained, tables, network):
    """Inputs of all sizes, far beyond those of features: also where a sum comes near its bound."""
    rng = np.random.default_rng(6)
    fan_in, largest = (tables.num_latents, MAX_LATENT) if network == "synthesis" else (tables.channels, LIMIT)
    x_NI = rng.integers(-largest, largest + 1, (64, fan_in)).astype(np.float32)
    x_NI[:8] = np.sign(x_NI[:8]) * largest
    for expert in range(1 if network == "router" else 4):
        if network == "router":
            module = trained.router
        else:
            module = jax.tree.map(lambda x, expert=expert: x[expert], getattr(trained.experts, network))
        found = tables.network(network, x_NI, expert)
        run = jax.jit(lambda x, module=module: module(x))
        np.testing.assert_array_equal(run(x_NI), found)
        for size in (1, 16):
            parts = np.split(x_NI, 64 // size)
            np.testing.assert_array_equal(
                np.concatenate([tables.network(network, part, expert) for part in parts]), found
            )
            np.testing.assert_array_equal(np.concatenate([run(part) for part in parts]), found)
        exact = [tables.arrays[f"{network}_{part}"] for part in ("weights1", "bias1", "weights2", "bias2")]
        w1, b1, w2, b2 = (part[expert].astype(np.int64) for part in exact)
        s1, s2 = tables.arrays[f"{network}_shifts"].tolist()
        hidden = np.clip((x_NI.astype(np.int64) @ w1 + b1 + (1 << s1 >> 1)) >> s1, 0, LIMIT)
        np.testing.assert_array_equal((hidden @ w2 + b2 + (1 << s2 >> 1)) >> s2, found)


def test_products_in_bfloat16_give_the_same_integers(trained):
    """As a TPU multiplies by default."""
    x_NI = np.random.default_rng(7).integers(-LIMIT, LIMIT + 1, (64, 32)).astype(np.float32)
    weights_IH, bias_H, *_ = trained.router.integers()
    low = jnp.matmul(x_NI.astype(jnp.bfloat16), weights_IH.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(low + bias_H, x_NI @ weights_IH + bias_H)


@pytest.mark.parametrize("bottleneck, noisy", [(None, False), (16, True)], ids=str)
def test_gradients_are_finite_and_reach_everything_that_is_trained(bottleneck, noisy):
    config = TofcConfig(width=24, bottleneck=bottleneck, experts=3, hidden=16, latents=4)
    model = Tofc(config, rngs=nnx.Rngs(1))
    x_MNF = np.random.default_rng(8).standard_normal((3, 25, 24)).astype(np.float32)
    x_MNF[0], x_MNF[1, :20] = 0.0, x_MNF[1, 0]  # a blank view, and a flat background
    views_M = jnp.array([True, True, False])
    key = jax.random.key(0) if noisy else None

    def loss(model, x_MNF):
        x_MKC = model.merged(x_MNF, 6)
        rate = model.hyperprior(x_MKC.reshape(18, -1), mask_N=jnp.repeat(views_M, 6), noise_key=key)
        y_MKF = model.expanded(rate.features_NC.reshape(x_MKC.shape))
        return jnp.mean(jnp.square(y_MKF)) + 1e-3 * jnp.sum(rate.bits_N) + balance_sum(rate.weights_NE[None])

    gradient, to_features = jax.jit(jax.grad(loss, argnums=(0, 1)))(model, x_MNF)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, to_features)))
    assert np.asarray(to_features)[:2].any() and not np.asarray(to_features)[2].any()
    hyperprior = gradient.hyperprior
    assert not np.asarray(hyperprior.offset[...]).any() and not np.asarray(hyperprior.spread[...]).any()
    trained_parts = [hyperprior.router, hyperprior.experts]
    trained_parts += [] if bottleneck is None else [gradient.down, gradient.up]
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(trained_parts))


def test_without_latents_an_expert_has_a_mean_and_a_scale_for_every_channel(sample_features):
    model = Hyperprior(TofcConfig(width=32, experts=3, hidden=16, latents=0), rngs=nnx.Rngs(1))
    x_NC = sample_features(40, seed=12)
    model.calibrate(jnp.asarray(x_NC))
    gradient = jax.grad(lambda model: jnp.sum(model(x_NC).bits_N))(model)
    assert np.asarray(gradient.experts.synthesis.bias2[...]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    rate, tables = model(x_NC, hard=True), freeze(model)
    experts_N, latents_NZ, scales_NC, _ = codec.analyse(tables, x_NC)
    assert not latents_NZ.any()
    assert all(len(np.unique(scales_NC[experts_N == expert], axis=0)) == 1 for expert in np.unique(experts_N))
    (found_NC,) = codec.decode(tables, codec.encode(tables, [x_NC]))
    np.testing.assert_allclose(found_NC, rate.features_NC, rtol=1e-4, atol=1e-4)


def test_features_that_do_not_exist_cost_nothing(trained, sample_features):
    x_NC, mask_N = sample_features(12, seed=9), np.arange(12) < 7
    whole = jax.jit(trained)(x_NC[:7])
    part = jax.jit(lambda x, mask: trained(x, mask_N=mask))(np.where(mask_N[:, None], x_NC, np.nan), mask_N)
    np.testing.assert_allclose(part.bits_N, np.append(whole.bits_N, np.zeros(5)), rtol=1e-5)
    parts, wholes = balance_sum(part.weights_NE[None]), balance_sum(whole.weights_NE[None])
    np.testing.assert_allclose(parts, wholes, rtol=1e-5)
    assert not np.asarray(part.features_NC[7:]).any()


def test_a_model_with_a_nan_is_not_frozen(trained):
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), trained)
    with pytest.raises(ConfigError, match="not finite"):
        freeze(broken)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 0}, "tofc.width=0"),
        ({"bottleneck": 33}, "tofc.bottleneck=33: must be 1 to width 32"),
        ({"experts": 0}, "tofc.experts=0"),
        ({"hidden": 513}, "tofc.hidden=513"),
        ({"latents": -1}, "tofc.latents=-1"),
        ({"temperature": 0.0}, "tofc.temperature=0.0"),
        ({"rate_weight": -1.0}, "tofc.rate_weight=-1.0"),
    ],
    ids=str,
)
def test_configurations_are_checked(changes, words):
    with pytest.raises(ConfigError, match=words):
        TofcConfig(**{"width": 32, **changes})


def test_channels_that_hardly_vary_have_no_tiny_steps():
    model = Hyperprior(TofcConfig(width=4, experts=1, hidden=8, latents=1), rngs=nnx.Rngs(0))
    x_NC = np.random.default_rng(0).standard_normal((50, 4)) * [1, 1, 1e-6, 0]
    model.calibrate(jnp.asarray(x_NC))
    np.testing.assert_allclose(model.spread[...][2:], 1e-2 * np.sqrt(np.mean(np.var(x_NC, axis=0))), rtol=1e-5)
