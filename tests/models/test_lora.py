"""Adapters: they start as nothing, act as what is merged, and leave the model that they adapt alone.

Legend: B rows, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stepjax.config import LoraConfig, MeshConfig
from stepjax.errors import ConfigError
from stepjax.models import lora
from stepjax.sharding import make_mesh, named_leaves, shardings

LORA = LoraConfig(rank=3, alpha=5.0, targets=("decoder/", "projector/"))


@pytest.fixture(scope="module")
def adapters(small_model, randomized):
    """Trained ones: neither matrix is zero."""
    return randomized(jax.eval_shape(lambda: lora.init_adapters(LORA, small_model, 0)), seed=7)


@jax.jit
def logits(model, pixels_BGHWC):
    tokens_BT = jnp.arange(24).reshape(2, 12)
    index_BT = jnp.full((2, 12), -1).at[:, 2:6].set(jnp.arange(4))
    hidden_BTD = model(
        tokens_BT=tokens_BT,
        positions_BT=jnp.tile(jnp.arange(12), (2, 1)),
        feature_index_BT=index_BT,
        global_views_BGHWC=pixels_BGHWC,
        crops_BCHWC=jnp.zeros((2, 0, 16, 16, 3)),
    )
    return model.decoder.logits(hidden_BTD)


@pytest.fixture(scope="module")
def pixels():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 24, 24, 3)), jnp.float32)


def test_new_adapters_change_nothing(small_model, pixels):
    new = lora.init_adapters(LORA, small_model, 0)
    before = logits(small_model, pixels)
    np.testing.assert_array_equal(logits(lora.adapted(LORA, small_model, new), pixels), before)
    for name, leaf in lora.merged(LORA, small_model, new).decoder.blocks.attention.__dict__.items():
        if name.endswith("_kernel"):
            np.testing.assert_array_equal(leaf[...], getattr(small_model.decoder.blocks.attention, name)[...])


def test_new_adapters_derive_from_the_seed_and_the_name(small_model):
    fewer = LoraConfig(rank=3, targets=("q_kernel",))
    new, same, other = (lora.init_adapters(LORA, small_model, seed) for seed in (0, 0, 1))
    name = "decoder/blocks/attention/q_kernel"
    np.testing.assert_array_equal(new[f"{name}/a"][...], lora.init_adapters(fewer, small_model, 0)[f"{name}/a"][...])
    for name in new:
        np.testing.assert_array_equal(new[name][...], same[name][...])
        assert name.endswith("/b") or np.abs(new[name][...] - other[name][...]).max() > 0.01
        if name.endswith("/a"):
            bound = np.prod(new[name].shape[1:-1] if "blocks" in name else new[name].shape[:-1]) ** -0.5
            assert 0.8 * bound < np.abs(new[name][...]).max() <= bound


def test_adapters_are_float32_whatever_the_model_is(small_model):
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_model)
    new = lora.init_adapters(LORA, rounded, 0)
    assert {leaf.dtype for leaf in new.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.merged(LORA, rounded, new))} == {jnp.dtype("bfloat16")}


def test_merged_adapters_act_as_unmerged_ones_and_change_the_model(small_model, adapters, pixels):
    merged = logits(lora.merged(LORA, small_model, adapters), pixels)
    np.testing.assert_allclose(logits(lora.adapted(LORA, small_model, adapters), pixels), merged, rtol=0, atol=2e-4)
    assert np.abs(merged - logits(small_model, pixels)).max() > 0.1
    unscaled = LoraConfig(rank=3, alpha=3.0, targets=LORA.targets)
    assert np.abs(merged - logits(lora.merged(unscaled, small_model, adapters), pixels)).max() > 0.05, "alpha / rank"


def test_the_merged_kernels_are_those_of_the_formula(small_model, adapters):
    merged = named_leaves(lora.merged(LORA, small_model, adapters))
    before = named_leaves(small_model)
    for name, inputs in {"attention/q_kernel": 1, "attention/out_kernel": 2, "mlp/down_kernel": 1}.items():
        name = f"decoder/blocks/{name}"
        for layer in range(2):
            a, b = (np.asarray(adapters[f"{name}/{part}"][...])[layer] for part in "ab")
            expected = before[name][...][layer] + 5 / 3 * np.tensordot(a, b, 1)
            assert a.ndim == inputs + 1
            np.testing.assert_allclose(merged[name][...][layer], expected, rtol=0, atol=1e-5)
    untouched = [name for name in before if f"{name}/a" not in adapters]
    assert len(untouched) == len(before) - 8
    for name in untouched:
        np.testing.assert_array_equal(merged[name][...], before[name][...])


@pytest.mark.parametrize(
    ("targets", "count"), [(("decoder/",), 7), (("mlp/",), 3), (("q_kernel", "v_kernel"), 2), (("projector",), 1)]
)
def test_targets_are_patterns_over_linear_layers(small_model, targets, count):
    assert len(lora.targets(LoraConfig(rank=1, targets=targets), small_model)) == count


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("atention", "Did you mean 'attention'"), ("vision", "matches no parameter name"), ("(", "is not a regular")],
)
def test_a_pattern_that_selects_nothing_is_refused(small_model, pattern, message):
    with pytest.raises(ConfigError, match=message):
        lora.targets(LoraConfig(rank=1, targets=(pattern,)), small_model)


def test_gradients_of_adapters_are_the_same_on_eight_devices(small_model, adapters, pixels):
    """And sharded like their kernels, but for the rank."""

    @jax.jit
    def gradient(adapters, model):
        return jax.grad(lambda adapters: jnp.mean(logits(lora.adapted(LORA, model, adapters), pixels) ** 2))(adapters)

    expected = gradient(adapters, small_model)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = shardings(adapters, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put((adapters, small_model), (layout, shardings(small_model, mesh)))
        found = gradient(*placed)
    down_a = jax.tree.leaves(layout["decoder/blocks/mlp/down_kernel/a"])[0]
    assert down_a.spec == PartitionSpec(None, "tensor", None)
    for name, value in expected.items():
        largest = np.abs(value[...]).max()
        assert largest > 0
        np.testing.assert_allclose(found[name][...], value[...], rtol=0, atol=1e-5 * largest, err_msg=name)
