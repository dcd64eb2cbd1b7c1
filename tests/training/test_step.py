"""The train step: packing and accumulation change nothing, metrics add up, and it trains."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepjax.config import (
    BatchConfig,
    DataConfig,
    DecoderConfig,
    DigitsSource,
    ImageConfig,
    LossConfig,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    Phase,
    PretrainConfig,
    ScheduleConfig,
    TokenizerConfig,
    VisionConfig,
)
from stepjax.data.mixture import Sample, mixture
from stepjax.data.packing import PackingStream, RowBudget, pack
from stepjax.models.step_vl import init_model
from stepjax.processing.processor import Processor
from stepjax.training.optimizer import learning_rate, make_optimizer, named_leaves
from stepjax.training.step import TrainState, loss_sum, make_train_step, new_state

CONFIG = PretrainConfig(
    name="tiny",
    model=ModelConfig(
        vision=VisionConfig(width=16, num_layers=1, num_heads=2, mlp_dim=32, patch_size=14, position_grid=4),
        decoder=DecoderConfig(
            vocab_size=512, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64
        ),
        init_range=0.1,
    ),
    images=ImageConfig(global_size=56, crop_size=28, patch_size=14, max_side=84),
    tokenizer=TokenizerConfig(path="demo", generation_starts_thinking=False),
    data=DataConfig(
        sources=(
            DigitsSource(name="strips", weight=2, task="transcribe"),
            DigitsSource(name="sums", weight=1, task="arithmetic"),
        ),
    ),
    batch=BatchConfig(rows=4, tokens=128, global_views=4, crops=24),
    schedule=ScheduleConfig(phases=(Phase(tokens=1e6, start=1e-2, end=1e-3),)),
    loss=LossConfig(z_loss=1e-2),
    numerics=NumericsConfig(compute_dtype="float32", remat="none", loss_chunk=100),
)
BUDGET = RowBudget.of(CONFIG.batch, CONFIG.images)


@functools.cache
def packed_samples() -> list[list[Sample]]:
    """The examples of four packed rows."""
    processor = Processor.from_config(CONFIG.images, CONFIG.tokenizer)
    samples = mixture(CONFIG.data.sources, processor, seed=0, bad_records="error")
    stream = PackingStream(samples, BUDGET, stream=0, num_streams=1, open_rows=4)
    by_name = {samples[i].example.name: samples[i] for i in range(40)}
    return [[by_name[name] for name in next(stream).names] for _ in range(4)]


def to_batch(rows: list[list[Sample]]) -> dict[str, jax.Array]:
    packed = [pack(row, BUDGET) for row in rows]
    names = {key: "{}_B{}".format(*key.rsplit("_", 1)) for key in packed[0]}
    return {name: jnp.asarray(np.stack([row[key] for row in packed])) for key, name in names.items()}


def packed_batch() -> dict[str, jax.Array]:
    return to_batch(packed_samples())


def unpacked_batch() -> dict[str, jax.Array]:
    return to_batch([[sample] for row in packed_samples() for sample in row])


@functools.cache
def model() -> Any:
    return init_model(CONFIG.model, CONFIG.numerics, seed=1)


def copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def with_accumulation(accumulation: int) -> PretrainConfig:
    return dataclasses.replace(CONFIG, batch=dataclasses.replace(CONFIG.batch, accumulation=accumulation))


@functools.cache
def loss_and_gradients(config: PretrainConfig = CONFIG):
    return jax.jit(jax.value_and_grad(functools.partial(loss_sum, config=config), has_aux=True))


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(jax.tree.leaves(leaf)[0]) for name, leaf in named_leaves(tree).items()}


def assert_close(tree: Any, expected: Any, tolerance: float) -> None:
    """Equal to `tolerance` of the largest entry of each array."""
    expected = arrays(expected)
    for name, array in arrays(tree).items():
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance * largest + 1e-12, err_msg=name)


def step_with_sgd(config: PretrainConfig, batch: dict[str, jax.Array]):
    """One step whose update is the gradient: Adam's first step would blow rounding errors up to whole signs."""
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_train_step(config, optimizer, optax.constant_schedule(1.0)))
    return step(new_state(model(), optimizer), batch)


# Packing -------------------------------------------------------------------------------------------------------------


def test_rows_hold_several_examples_with_and_without_images():
    """What the tests below rest on."""
    rows = packed_samples()
    assert all(len(row) > 1 for row in rows)
    assert any(len({len(s.example.global_views) > 0 for s in row}) == 2 for row in rows)
    assert any(sum(len(s.example.crops) > 0 for s in row) > 1 for row in rows)


def test_packed_and_unpacked_examples_give_the_same_loss_and_gradients():
    (packed_loss, packed_sums), packed_grads = loss_and_gradients()(model(), packed_batch())
    (loss, sums), grads = loss_and_gradients()(model(), unpacked_batch())
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for name in sums:
        np.testing.assert_allclose(packed_sums[name], sums[name], rtol=1e-5, err_msg=name)
    assert all(np.any(array) for array in arrays(grads).values())
    assert_close(packed_grads, grads, 1e-5)


def test_packing_would_not_be_neutral_without_segments():
    """The test above could not pass if examples saw each other, or their positions ran on."""
    batch = packed_batch()
    (loss, _), _ = loss_and_gradients()(model(), batch)
    merged = batch | {"segment_ids_BT": jnp.minimum(batch["segment_ids_BT"], 1)}
    assert abs(loss_and_gradients()(model(), merged)[0][0] / loss - 1) > 1e-4
    shifted = batch | {"feature_index_BT": jnp.where(batch["feature_index_BT"] < 0, -1, 0)}
    assert abs(loss_and_gradients()(model(), shifted)[0][0] / loss - 1) > 1e-4


def test_padding_has_no_influence():
    batch = packed_batch()
    padding_BT = batch["segment_ids_BT"] == 0
    assert padding_BT.any()
    (loss, _), grads = loss_and_gradients()(model(), batch)
    other = batch | {"tokens_BT": jnp.where(padding_BT, 7, batch["tokens_BT"])}
    (other_loss, _), other_grads = loss_and_gradients()(model(), other)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert_close(other_grads, grads, 1e-6)


# Metrics -------------------------------------------------------------------------------------------------------------


def test_groups_hold_the_sums_of_their_examples():
    """Group 2d is source d without images, 2d + 1 with; an example's sums are those of a batch of its own."""
    expected: dict[str, dict[int, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for row in packed_samples():
        for sample in row:
            (_, sums), _ = loss_and_gradients()(model(), to_batch([[sample]] * 4))
            group = 2 * sample.domain + (len(sample.example.global_views) > 0)
            for name in ("loss_X", "correct_X", "weight_X"):
                expected[name][group] += float(jnp.sum(sums[name])) / 4
    (_, sums), _ = loss_and_gradients()(model(), packed_batch())
    for name, groups in expected.items():
        assert sums[name].shape == (4,)
        np.testing.assert_allclose(sums[name], [groups[i] for i in range(4)], rtol=1e-4, atol=1e-6)
    assert sums["weight_X"][1] > 0 and sums["weight_X"][2] > 0, "strips have images, sums have none"


def test_metrics_are_means_over_the_weighted_tokens():
    batch = packed_batch()
    state, metrics = step_with_sgd(CONFIG, batch)
    (total, sums), grads = loss_and_gradients()(model(), batch)
    weight = float(batch["loss_weights_BT"].sum())
    assert metrics["weight_X"].sum() == pytest.approx(weight)
    assert metrics["loss"] == pytest.approx(float(sums["loss_X"].sum()) / weight, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float(sums["correct_X"].sum()) / weight, rel=1e-5)
    assert metrics["loss"] + 1e-2 * metrics["z"] == pytest.approx(float(total) / weight, rel=1e-5)
    grad_norm = float(optax.global_norm(grads)) / weight
    assert metrics["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    assert metrics["update_norm"] == pytest.approx(grad_norm, rel=1e-4)  # SGD of rate 1
    assert metrics["param_norm"] == pytest.approx(float(optax.global_norm(model())), rel=1e-5)
    assert metrics["learning_rate"] == 1.0 and int(state.step) == 1


def test_z_loss_adds_the_squared_log_normalizers():
    plain = dataclasses.replace(CONFIG, loss=LossConfig(z_loss=0.0))
    (with_z, sums), grads = loss_and_gradients()(model(), packed_batch())
    (without, plain_sums), plain_grads = loss_and_gradients(plain)(model(), packed_batch())
    np.testing.assert_allclose(without, jnp.sum(plain_sums["loss_X"]), rtol=1e-6)
    np.testing.assert_allclose(with_z - without, 1e-2 * sums["z"], rtol=1e-3)
    assert sums["z"] > 0
    differences = [np.abs(arrays(grads)[name] - g).max() for name, g in arrays(plain_grads).items()]
    assert max(differences) > 1e-3


def test_batch_without_trained_tokens_changes_nothing():
    batch = packed_batch()
    batch = batch | {"loss_weights_BT": jnp.zeros_like(batch["loss_weights_BT"])}
    state, metrics = step_with_sgd(CONFIG, batch)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert_close(state.model, model(), 0)


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_step(accumulation):
    batch = packed_batch()
    weights_B = np.asarray(batch["loss_weights_BT"].sum(axis=1))
    assert len(set(weights_B)) > 1, "micro-batches of different weights, or a mean of means would do"
    expected, expected_metrics = step_with_sgd(CONFIG, batch)
    state, metrics = step_with_sgd(with_accumulation(accumulation), batch)
    updates = jax.tree.map(jnp.subtract, state.model, model())
    assert_close(updates, jax.tree.map(jnp.subtract, expected.model, model()), 1e-4)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@functools.cache
def adam_step(freeze: tuple[str, ...] = ()):
    optimizer_config = OptimizerConfig(weight_decay=0.1, freeze=freeze)
    schedule = learning_rate(CONFIG.schedule, CONFIG.tokens_per_step)
    optimizer = make_optimizer(optimizer_config, schedule, model())
    return optimizer, jax.jit(make_train_step(CONFIG, optimizer, schedule), donate_argnums=0)


def train(steps: int, freeze: tuple[str, ...] = ()) -> tuple[TrainState, list[dict[str, Any]]]:
    optimizer, step = adam_step(freeze)
    state, batch, history = new_state(copied(model()), optimizer), packed_batch(), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def test_loss_falls_on_a_batch_seen_thirty_times():
    state, history = train(30)
    losses = [metrics["loss"] for metrics in history]
    assert losses[-1] < 0.3 * losses[0]
    assert history[-1]["accuracy"] > history[0]["accuracy"] + 0.3
    assert int(state.step) == 30
    schedule = learning_rate(CONFIG.schedule, CONFIG.tokens_per_step)
    np.testing.assert_allclose([m["learning_rate"] for m in history], [schedule(i) for i in range(30)], rtol=1e-6)


def test_two_runs_are_equal_to_the_last_bit():
    (one, one_history), (other, other_history) = train(3), train(3)
    for a, b in zip(jax.tree.leaves((one, one_history)), jax.tree.leaves((other, other_history)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_parameters_stay_as_they_are():
    before = arrays(model())
    after = arrays(train(2, freeze=("^vision/",))[0].model)
    for name, array in after.items():
        assert np.array_equal(array, before[name]) == name.startswith("vision/"), name


def test_state_is_donated():
    optimizer, step = adam_step()
    state = new_state(copied(model()), optimizer)
    after, _ = step(state, packed_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
