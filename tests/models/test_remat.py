"""Rematerialisation policies: the same gradients, from ever less that is kept."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepjax.config import DecoderConfig, NumericsConfig, VisionConfig
from stepjax.models.perception_encoder import PerceptionEncoder
from stepjax.models.qwen3 import Qwen3

POLICIES = ("full", "attention", "qkv", "dots", "none")  # in the order of what they keep
VISION = VisionConfig(width=32, num_layers=2, num_heads=2, mlp_dim=64, patch_size=4, position_grid=4)
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=64, vocab_size=64, max_positions=64
)


def encoder(numerics):
    model = PerceptionEncoder(VISION, numerics, rngs=nnx.Rngs(0))
    views_MHWC = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    return lambda model: jnp.sum(jnp.square(model(views_MHWC))), model


def decoder(numerics):
    model = Qwen3(DECODER, numerics, rngs=nnx.Rngs(0))
    positions_BT = jnp.broadcast_to(jnp.arange(24), (2, 24))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 24, 32))
    return lambda model: jnp.sum(jnp.square(model(x_BTD, positions_BT)[0])), model


@pytest.fixture(scope="module", params=[encoder, decoder], ids=["encoder", "decoder"])
def by_policy(request):
    """The gradients under each policy, and the bytes that wait for the backward pass."""
    results = {}
    for policy in POLICIES:
        loss, model = request.param(NumericsConfig(compute_dtype="float32", remat=policy))
        pull_back = jax.eval_shape(lambda model: jax.vjp(loss, model)[1], model)  # noqa: B023
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))
        results[policy] = jax.tree.leaves(jax.jit(jax.grad(loss))(model)), kept
    return results


def test_the_gradients_are_the_same(by_policy):
    for gradients, _ in by_policy.values():
        for mine, wanted in zip(gradients, by_policy["none"][0], strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=2e-4, atol=2e-5)


def test_each_policy_keeps_more_than_the_one_before(by_policy):
    for less, more in itertools.pairwise(POLICIES):
        assert by_policy[less][1] < by_policy[more][1], (less, more)


def test_the_encoder_can_have_a_policy_of_its_own():
    assert NumericsConfig(remat="dots").policy_of_encoder == "dots"
    assert NumericsConfig(remat="dots", encoder_remat="qkv").policy_of_encoder == "qkv"
