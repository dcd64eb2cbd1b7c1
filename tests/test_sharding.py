"""The same numbers on every mesh, every device with its own shard only, and refusals that name the parameter.

Eight simulated CPU devices (conftest.py). Meshes are written (data, fsdp, context, tensor).

Legend: B rows, T tokens, V vocabulary.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from stepjax.config import MeshConfig, ModelConfig, NumericsConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack
from stepjax.errors import ConfigError
from stepjax.models.step_vl import abstract_model, init_model
from stepjax.sharding import MESH_AXES, RULES, make_mesh, param_axes, shardings, spec
from stepjax.training.losses import next_tokens, token_scores

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="full")
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)]


def mesh_of(*sizes):
    return make_mesh(MeshConfig(**dict(zip(MESH_AXES[-4:], sizes, strict=True))), jax.devices()[: math.prod(sizes)])


def parameters(tree):
    """(path, nnx.Param) of a model."""
    is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), param)
        for path, param in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param)
    ]


# Equal results -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(make_example, small_images):
    """Eight rows of two packed examples, one with two images and one with text alone."""
    budget = RowBudget(tokens=48, global_views=2, crops=4, images=small_images)
    rows = [
        pack([Sample(make_example(3, (1, 2), 4, (0, 0), 5, seed=r), 0), Sample(make_example(8, seed=9 + r), 0)], budget)
        for r in range(8)
    ]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def evaluate(model, batch):
    """Loss, its gradients and the logits of some tokens."""

    def loss_fn(model):
        hidden_BTD = model(
            tokens_BT=batch["tokens_T"],
            positions_BT=batch["positions_T"],
            segment_ids_BT=batch["segment_ids_T"],
            feature_index_BT=batch["feature_index_T"],
            global_views_BGHWC=batch["global_views_GHWC"],
            crops_BCHWC=batch["crops_CHWC"],
        )
        targets_BT, weights_BT = next_tokens(batch["tokens_T"], batch["loss_weights_T"])
        scores = token_scores(hidden_BTD, model.decoder.head(), targets_BT, chunk=16)
        loss = -jnp.sum(weights_BT * scores.log_probs_BT) / jnp.sum(weights_BT)
        return loss, model.decoder.logits(hidden_BTD[:, ::8])

    (loss, logits_BTV), grads = jax.value_and_grad(loss_fn, has_aux=True)(model)
    return loss, grads, logits_BTV


@pytest.fixture(scope="module")
def remat_model(small_model):
    """The model as it is trained, with rematerialisation, and smaller weights so that rounding is not amplified."""
    model = jax.tree.map(lambda leaf: np.asarray(leaf) / 2, small_model)
    for module in (model, model.vision, model.projector, model.decoder):
        module.numerics = FLOAT32
    return model


@pytest.fixture(scope="module")
def on_one_device(remat_model, batch):
    """Plain use, without any mesh in scope."""
    return jax.device_get(jax.jit(evaluate)(remat_model, batch))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_gradients_and_logits_are_those_of_one_device(remat_model, batch, on_one_device, sizes):
    mesh = mesh_of(*sizes)
    layout = shardings(remat_model, mesh)
    model = jax.device_put(remat_model, layout)
    rows = {key: jax.device_put(value, NamedSharding(mesh, spec("batch"))) for key, value in batch.items()}
    with jax.set_mesh(mesh):
        loss, grads, logits_BTV = jax.jit(evaluate, out_shardings=(None, layout, None))(model, rows)
    one_loss, one_grads, one_logits_BTV = on_one_device
    assert np.isfinite(one_loss)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    np.testing.assert_allclose(logits_BTV, one_logits_BTV, rtol=0, atol=1e-5 * np.abs(one_logits_BTV).max())
    for (name, one), many in zip(parameters(one_grads), jax.tree.leaves(grads), strict=True):
        value = np.asarray(one[...])
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(many, value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


# Where parameters lie ------------------------------------------------------------------------------------------------


def test_sharded_initial_values_are_the_unsharded_ones_and_each_device_holds_its_shard(initial_model, small_config):
    mesh = mesh_of(1, 4, 1, 2)
    numerics = NumericsConfig(compute_dtype="bfloat16")  # of no influence on the values
    model = init_model(small_config, numerics, seed=3, mesh=mesh)
    split = {"embed": 4, "mlp": 2, "heads": 2, "kv_heads": 2, "vocab": 2}
    for (name, one), (_, many) in zip(parameters(initial_model), parameters(model), strict=True):
        np.testing.assert_array_equal(one[...], many[...], err_msg=name)
        expected = tuple(dim // split.get(axis, 1) for dim, axis in zip(many.shape, param_axes(many), strict=True))
        shards = many[...].addressable_shards
        assert {shard.device for shard in shards} == set(jax.devices())
        assert {shard.data.shape for shard in shards} == {expected}, name
    kernel = model.decoder.blocks.mlp.gate_kernel
    assert kernel.shape == (2, 32, 48) and kernel[...].addressable_shards[0].data.shape == (2, 8, 24)


def test_matrices_of_the_public_model_are_spread_over_the_whole_mesh():
    """What is left on every device is what the table says: norms, biases, and nothing of size."""
    abstract = abstract_model(ModelConfig())
    layout = shardings(abstract, mesh_of(1, 4, 1, 2))
    held = 0
    for (name, param), sharding in zip(parameters(abstract), jax.tree.leaves(layout), strict=True):
        parts = param.size / math.prod(sharding.shard_shape(param.shape))
        held += param.size / parts
        small = param.size < 47 * 8960 + 1 or name in ("vision/positions", "vision/patch_kernel")
        assert parts == 8 or small, (name, param.shape, parts)
    assert held < 1.01 * 10_171_750_144 / 8


def test_every_parameter_names_the_axes_of_its_dimensions():
    for name, param in parameters(abstract_model(ModelConfig(projector_bias=True))):
        axes = param.get_metadata()["axes"]
        stacked = "/blocks/" in name
        assert len(axes) == len(param.shape) - stacked, name
        assert set(axes) <= set(RULES), name
        assert param_axes(param) == (("layers",) if stacked else ()) + axes
        used = [axis for axis in spec(*param_axes(param)) if axis is not None]
        assert len(used) == len(set(used)), f"{name} spreads two dimensions over one mesh axis"


def test_optimizer_moments_lie_with_their_parameters(small_config):
    mesh = mesh_of(1, 4, 1, 2)
    abstract = abstract_model(small_config)
    [moments, *_] = jax.eval_shape(optax.adamw(1e-3).init, abstract)
    layout = shardings(moments, mesh)
    expected = jax.tree.leaves(shardings(abstract, mesh))
    assert jax.tree.leaves(layout.mu) == expected == jax.tree.leaves(layout.nu)
    assert layout.count == NamedSharding(mesh, PartitionSpec())
    assert len({sharding.spec for sharding in expected}) > 3


# The table and the mesh ----------------------------------------------------------------------------------------------


def test_spec_follows_the_table():
    assert spec("batch", "length", "act_embed") == PartitionSpec(("slice", "data", "fsdp"), "context", None)
    assert spec("embed", None, "heads") == PartitionSpec("fsdp", None, "tensor")
    for rule in RULES.values():
        assert rule is None or set((rule,) if isinstance(rule, str) else rule) <= set(MESH_AXES)


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (1, 1, 8, 1, 1)),
        (MeshConfig(data=2, tensor=2), (1, 2, 2, 1, 2)),
        (MeshConfig(data=-1, fsdp=1), (1, 8, 1, 1, 1)),
    ],
)
def test_mesh_spans_all_devices(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=4), MeshConfig(data=-1, fsdp=-1)])
def test_mesh_that_does_not_fit_the_devices_is_refused(config):
    with pytest.raises(ConfigError, match=r"mesh=\["):
        make_mesh(config)


@pytest.mark.parametrize(
    "sizes, change, named",
    [
        ((1, 1, 1, 8), {}, r"decoder/\S*k_kernel has 2 entries along 'kv_heads'.* 8 devices .*tensor"),
        ((1, 8, 1, 1), {"width": 36}, r"decoder/\S+ has 36 entries along 'embed'.* 8 devices .*fsdp"),
        ((1, 1, 1, 2), {"vocab_size": 63}, r"decoder/\S+ has 63 entries along 'vocab'.* 2 devices .*tensor"),
    ],
)
def test_dimension_that_does_not_divide_is_refused_by_name(small_config, sizes, change, named):
    config = dataclasses.replace(small_config, decoder=dataclasses.replace(small_config.decoder, **change))
    with pytest.raises(ConfigError, match=named):
        init_model(config, mesh=mesh_of(*sizes))


# What the devices exchange -------------------------------------------------------------------------------------------


def exchanged(compiled) -> list[tuple[str, str, tuple[int, ...]]]:
    """(operation, dtype, shape) of everything that devices exchange in a compiled program."""
    pattern = r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return [
        (operation, dtype, tuple(int(n) for n in dims.split(",") if n))
        for shapes, operation in re.findall(pattern, compiled.as_text())
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 4, 1, 1)], ids=str)
def test_devices_exchange_parameters_and_their_gradients_and_no_activations(remat_model, batch, sizes):
    """Everything sent of more than a few numbers has the shape of a parameter, or of one as its layer multiplies it."""
    mesh = mesh_of(*sizes)
    layout = shardings(remat_model, mesh)
    on_mesh = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    model = jax.tree.map(on_mesh, remat_model, layout)
    rows = {key: on_mesh(value, NamedSharding(mesh, spec("batch"))) for key, value in batch.items()}

    def loss_and_gradients(model, batch):
        loss, grads, _ = evaluate(model, batch)
        return loss, grads

    with jax.set_mesh(mesh):
        compiled = jax.jit(loss_and_gradients, out_shardings=(None, layout)).lower(model, rows).compile()
    # A parameter of [9, 32, 64] may travel as [288, 64], turned, or a part of it at a time.
    sizes_of_parameters = {math.prod(param_layer) for _, p in parameters(remat_model) for param_layer in layers(p)}
    parts = {size // n for size in sizes_of_parameters for n in (1, 2, 4, 8) if size % n == 0}
    found = [x for x in exchanged(compiled) if math.prod(x[2]) > 64]
    assert {operation for operation, _, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    for operation, dtype, shape in found:
        allowed = sizes_of_parameters if operation == "all-gather" else parts
        assert dtype == "f32" and math.prod(shape) in allowed, (operation, dtype, shape)
    assert any(operation == "all-gather" for operation, _, _ in found)


def layers(param) -> list[tuple[int, ...]]:
    """The shape of a parameter, and of one layer of a stack."""
    stacked = len(param.shape) - len(param.get_metadata()["axes"])
    return [tuple(param.shape), tuple(param.shape[stacked:])]
