"""The train step: packing and accumulation change nothing, metrics add up, and it trains."""

import dataclasses
import functools
from typing import Any

import grain
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
from stepjax.data.records import open_source
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
SGD = optax.sgd(1.0)
ROWS = CONFIG.batch.rows
BUDGET = RowBudget.of(CONFIG.batch, CONFIG.images)


@functools.cache
def packed_samples() -> list[list[Sample]]:
    """The examples of four packed rows."""
    processor = Processor.from_config(CONFIG.images, CONFIG.tokenizer)
    sources = CONFIG.data.sources
    opened = [open_source(source, 0) for source in sources]
    mixed: Any = mixture(sources, opened, processor, seed=0, bad_records="error")
    samples = [mixed[i] for i in range(24)]
    by_name = {sample.example.name: sample for sample in samples}
    stream = PackingStream(grain.MapDataset.source(samples), BUDGET, stream=0, num_streams=1, open_rows=1)
    return [[by_name[name] for name in next(stream).names] for _ in range(ROWS)]


def to_batch(rows: list[list[Sample]]) -> dict[str, jax.Array]:
    packed = [pack(row, BUDGET) for row in rows]
    names = {key: "{}_B{}".format(*key.rsplit("_", 1)) for key in packed[0]}
    return {name: jnp.asarray(np.stack([row[key] for row in packed])) for key, name in names.items()}


def packed_batch() -> dict[str, jax.Array]:
    return to_batch(packed_samples())


def unpacked_batches() -> list[dict[str, jax.Array]]:
    """The same examples, one a row; as batches of the same shape, the last filled up with empty rows."""
    rows: list[list[Sample]] = [[sample] for row in packed_samples() for sample in row]
    rows += [[]] * (-len(rows) % ROWS)
    return [to_batch(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]


@functools.cache
def model() -> Any:
    return init_model(CONFIG.model, CONFIG.numerics, seed=1)


@functools.partial(jax.jit, static_argnums=1)
def started(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state of copies, which may be donated; compiled as one, not array by array."""
    return new_state(jax.tree.map(jnp.copy, model), optimizer)


norm = jax.jit(optax.global_norm)


@functools.cache
def _value_and_grad():
    return jax.jit(jax.value_and_grad(functools.partial(loss_sum, config=CONFIG), has_aux=True))


def loss_and_gradients(*batches: dict[str, jax.Array]) -> tuple[Any, dict[str, Any], Any]:
    """Loss, metrics and gradients, each a sum over all tokens of all batches."""
    results = [jax.device_get(_value_and_grad()(model(), batch)) for batch in batches]
    (loss, sums), grads = jax.tree.map(lambda *parts: sum(parts), *results)
    return loss, sums, grads


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(jax.tree.leaves(leaf)[0]) for name, leaf in named_leaves(tree).items()}


def assert_close(tree: Any, expected: Any, tolerance: float) -> None:
    """Equal to `tolerance` of the largest entry of each array."""
    expected = arrays(expected)
    for name, array in arrays(tree).items():
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance * largest + 1e-12, err_msg=name)


@functools.cache
def _accumulating_step():
    config = dataclasses.replace(CONFIG, batch=dataclasses.replace(CONFIG.batch, accumulation=2))
    return jax.jit(make_train_step(config, SGD, optax.constant_schedule(1.0)))


def accumulating_step(batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step of two micro-batches, whose update is minus the gradient.

    Adam's first step would blow rounding errors up to whole signs.
    """
    return _accumulating_step()(started(model(), SGD), batch)


# Packing -------------------------------------------------------------------------------------------------------------


def test_rows_hold_several_examples_with_and_without_images():
    """What the tests below rest on."""
    rows = packed_samples()
    assert all(len(row) > 1 for row in rows)
    assert any(len({s.example.num_views[0] > 0 for s in row}) == 2 for row in rows)
    assert any(sum(s.example.num_views[1] > 0 for s in row) > 1 for row in rows)


def test_packed_and_unpacked_examples_give_the_same_loss_and_gradients():
    packed_loss, packed_sums, packed_grads = loss_and_gradients(packed_batch())
    loss, sums, grads = loss_and_gradients(*unpacked_batches())
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for name in sums:
        np.testing.assert_allclose(packed_sums[name], sums[name], rtol=1e-5, err_msg=name)
    assert all(np.any(array) for array in arrays(grads).values())
    assert_close(packed_grads, grads, 1e-5)


def test_packing_would_not_be_neutral_without_segments_or_with_features_mixed_up():
    """The test above could not pass if examples saw each other or each other's images."""
    batch = packed_batch()
    loss, _, _ = loss_and_gradients(batch)
    one_segment = batch | {"segment_ids_BT": jnp.minimum(batch["segment_ids_BT"], 1)}
    one_feature = batch | {"feature_index_BT": jnp.minimum(batch["feature_index_BT"], 0)}
    for other in (one_segment, one_feature):
        assert abs(loss_and_gradients(other)[0] / loss - 1) > 1e-4


def test_padding_has_no_influence():
    batch = packed_batch()
    padding_BT = batch["segment_ids_BT"] == 0
    assert padding_BT.any()
    loss, _, grads = loss_and_gradients(batch)
    other_loss, _, other_grads = loss_and_gradients(batch | {"tokens_BT": jnp.where(padding_BT, 7, batch["tokens_BT"])})
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert_close(other_grads, grads, 1e-6)


# Metrics -------------------------------------------------------------------------------------------------------------


def test_groups_hold_the_sums_of_their_examples():
    """Group 2d is source d without images, 2d + 1 with."""
    expected: dict[str, list[float]] = {name: [0.0] * 4 for name in ("loss_X", "correct_X", "weight_X")}
    samples = [sample for row in packed_samples() for sample in row]
    for group in range(4):
        own = [s for s in samples if group == 2 * s.domain + (s.example.num_views[0] > 0)]
        rows: list[list[Sample]] = [[sample] for sample in own] + [[]] * (-len(own) % ROWS)
        for start in range(0, len(rows), ROWS):
            _, sums, _ = loss_and_gradients(to_batch(rows[start : start + ROWS]))
            for name in expected:
                expected[name][group] += float(jnp.sum(sums[name]))
    _, sums, _ = loss_and_gradients(packed_batch())
    for name, groups in expected.items():
        np.testing.assert_allclose(sums[name], groups, rtol=1e-4, atol=1e-6)
    assert (np.asarray(sums["weight_X"]) > 0).tolist() == [False, True, True, False], "strips have images, sums none"


def test_z_loss_adds_the_squared_log_normalizers():
    loss, sums, _ = loss_and_gradients(packed_batch())
    cross_entropy = float(jnp.sum(sums["loss_X"]))
    assert sums["z"] > 0
    assert loss == pytest.approx(cross_entropy + CONFIG.loss.z_loss * float(sums["z"]), rel=1e-6)
    assert loss > 1.01 * cross_entropy


def test_metrics_are_means_over_the_weighted_tokens():
    batch = packed_batch()
    state, metrics = accumulating_step(batch)
    _, sums, grads = loss_and_gradients(batch)
    weight = float(batch["loss_weights_BT"].sum())
    assert metrics["weight_X"].sum() == pytest.approx(weight)
    assert metrics["loss"] == pytest.approx(float(sums["loss_X"].sum()) / weight, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float(sums["correct_X"].sum()) / weight, rel=1e-5)
    assert metrics["z"] == pytest.approx(float(sums["z"]) / weight, rel=1e-5)
    grad_norm = float(norm(grads)) / weight
    assert metrics["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    assert metrics["update_norm"] == pytest.approx(grad_norm, rel=1e-4)  # SGD of rate 1
    assert metrics["param_norm"] == pytest.approx(float(norm(model())), rel=1e-5)
    assert metrics["learning_rate"] == 1.0 and int(state.step) == 1


def test_batch_without_trained_tokens_changes_nothing():
    batch = packed_batch()
    state, metrics = accumulating_step(batch | {"loss_weights_BT": jnp.zeros_like(batch["loss_weights_BT"])})
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert_close(state.model, model(), 0)


# The step ------------------------------------------------------------------------------------------------------------


def test_accumulation_does_not_change_the_step():
    batch = packed_batch()
    weights_B = np.asarray(batch["loss_weights_BT"].sum(axis=1))
    assert weights_B[::2].sum() != weights_B[1::2].sum(), (
        "micro-batches of different weights, or a mean of means would do"
    )
    state, metrics = accumulating_step(batch)
    _, _, grads = loss_and_gradients(batch)
    expected = jax.tree.map(lambda p, g: p - g / weights_B.sum(), jax.device_get(model()), grads)
    assert_close(state.model, expected, 1e-5)
    # The first step of the optimizer below makes its gradients from the whole batch.
    _, history = train(1)
    for name in ("loss", "accuracy", "z", "loss_X", "correct_X", "weight_X", "grad_norm", "param_norm"):
        np.testing.assert_allclose(metrics[name], history[0][name], rtol=1e-5, err_msg=name)


def test_rows_without_slots_for_views_can_be_accumulated():
    batch = {name: x[:, :0] if "HWC" in name else x for name, x in packed_batch().items()}
    batch["feature_index_BT"] = jnp.full_like(batch["feature_index_BT"], -1)
    config = dataclasses.replace(CONFIG, batch=dataclasses.replace(CONFIG.batch, accumulation=2))
    step = make_train_step(config, SGD, optax.constant_schedule(1.0))
    state, _ = jax.eval_shape(step, new_state(model(), SGD), batch)
    assert [x.shape for x in jax.tree.leaves(state.model)] == [x.shape for x in jax.tree.leaves(model())]


@functools.cache
def adam_step(freeze: tuple[str, ...] = ()):
    optimizer_config = OptimizerConfig(weight_decay=0.1, freeze=freeze)
    schedule = learning_rate(CONFIG.schedule, CONFIG.tokens_per_step)
    optimizer = make_optimizer(optimizer_config, schedule, model())
    return optimizer, jax.jit(make_train_step(CONFIG, optimizer, schedule), donate_argnums=0)


def train(steps: int, freeze: tuple[str, ...] = ()) -> tuple[TrainState, list[dict[str, Any]]]:
    optimizer, step = adam_step(freeze)
    state, batch, history = started(model(), optimizer), packed_batch(), []
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
    np.testing.assert_allclose([m["learning_rate"] for m in history], np.array([schedule(i) for i in range(30)]), 1e-6)


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
    state = started(model(), optimizer)
    after, _ = step(state, packed_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
