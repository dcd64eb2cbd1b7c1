"""The schedule against its closed form, and AdamW against a few lines of numpy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stepjax.config import OptimizerConfig, Phase, ScheduleConfig
from stepjax.errors import ConfigError
from stepjax.training.optimizer import learning_rate, make_optimizer, named_leaves, parameter_names, trained_names

REPORT = ScheduleConfig(
    phases=(Phase(tokens=900e9, start=5e-5, end=1e-5), Phase(tokens=300e9, start=1e-5, end=6e-6)), warmup_tokens=2e9
)


class Stack(nnx.Module):
    """Two stacked layers: a kernel and a norm scale, as the towers have them."""

    def __init__(self, normal):
        self.kernel = nnx.Param(normal(2, 4, 3), axes=("embed", "mlp"))
        self.scale = nnx.Param(normal(2, 4), axes=("embed",))


class Model(nnx.Module):
    def __init__(self, normal):
        self.vision = Stack(normal)
        self.decoder = Stack(normal)
        self.embed = nnx.Param(normal(6, 4), axes=("vocab", "embed"))
        self.qkv_bias = nnx.Param(normal(3, 2), axes=("qkv", "heads"))  # no matrix, though it has two axes


NAMES = ["decoder/kernel", "decoder/scale", "embed", "qkv_bias", "vision/kernel", "vision/scale"]


def model(seed: int = 0, scale: float = 1.0, dtype: Any = np.float32) -> Any:
    generator = np.random.default_rng(seed)
    return Model(lambda *shape: jnp.asarray((scale * generator.normal(size=shape)).astype(dtype)))


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(jax.tree.leaves(leaf)[0], np.float64) for name, leaf in named_leaves(tree).items()}


def constant(_):
    return 1e-2


# The schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_report_schedule_follows_its_closed_form(decay):
    schedule: Any = jax.jit(
        learning_rate(
            ScheduleConfig(phases=REPORT.phases, warmup_tokens=REPORT.warmup_tokens, decay=decay), 4096 * 8192
        )
    )

    def expected(tokens: float) -> float:
        warmup = min(1.0, tokens / 2e9)
        for begin, length, start, end in ((0, 900e9, 5e-5, 1e-5), (900e9, 300e9, 1e-5, 6e-6)):
            x = (tokens - begin) / length
            if x < 1:
                return warmup * (end + (start - end) * (0.5 + 0.5 * np.cos(np.pi * x) if decay == "cosine" else 1 - x))
        return 6e-6

    for step in [0, 1, 30, 59, 60, 61, 1000, 13_411, 26_822, 26_823, 30_000, 35_762, 35_763, 10**6]:
        assert float(schedule(step)) == pytest.approx(expected(step * 4096 * 8192), rel=1e-5, abs=1e-12), step


def test_schedule_is_exact_enough_when_steps_are_small():
    """With 4,096 tokens a step the 1.2e12 tokens are 293 million steps, beyond the integers of float32."""
    schedule: Any = jax.jit(learning_rate(REPORT, 4096))
    assert float(schedule(jnp.int32(0))) == 0.0
    assert float(schedule(jnp.int32(1e9 / 4096))) == pytest.approx(2.5e-5, rel=1e-4)
    assert float(schedule(jnp.int32(450e9 / 4096))) == pytest.approx(3e-5, rel=1e-5)
    assert float(schedule(jnp.int32(1050e9 / 4096))) == pytest.approx(8e-6, rel=1e-5)
    assert float(schedule(jnp.int32(2**31 - 1))) == pytest.approx(6e-6)


def test_rate_jumps_between_phases_that_do_not_meet():
    schedule: Any = learning_rate(
        ScheduleConfig(phases=(Phase(tokens=100, start=1.0, end=0.5), Phase(tokens=100, start=4.0, end=2.0))), 10
    )
    assert [float(schedule(step)) for step in (0, 10, 20, 99)] == [1.0, 4.0, 2.0, 2.0]
    assert 0.5 < float(schedule(9)) < 0.55


@pytest.mark.parametrize("phase", [Phase(tokens=0, start=1, end=1), Phase(tokens=5, start=1, end=-1e-6)])
def test_impossible_phases_are_refused_by_index(phase):
    with pytest.raises(ConfigError, match=r"schedule\.phases\.1\."):
        learning_rate(ScheduleConfig(phases=(Phase(tokens=5, start=1, end=1), phase)), 1)


# AdamW ----------------------------------------------------------------------------------------------------------------


def reference_adamw(params, gradients, config, rates, scales, decayed, frozen):
    """AdamW as in Loshchilov & Hutter, algorithm 2, with global-norm clipping. Float64; dicts of arrays by name."""
    params = dict(params)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(g**2) for name, g in gradient.items() if name not in frozen))
        clip = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        for name in params:
            if name in frozen:
                continue
            g = gradient[name] * clip
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            adam = first[name] / (1 - config.beta1**t) / (np.sqrt(second[name] / (1 - config.beta2**t)) + config.eps)
            decay = config.weight_decay * params[name] if name in decayed else 0.0
            params[name] = params[name] - rate * scales.get(name, 1.0) * (adam + decay)
    return params


MATRICES = {"decoder/kernel", "embed", "vision/kernel"}
VISION = {"vision/kernel": 0.25, "vision/scale": 0.25}
CASES = {
    "defaults": (OptimizerConfig(), {}, MATRICES, set()),
    "no clipping": (OptimizerConfig(clip_norm=None), {}, MATRICES, set()),
    "heavy decay everywhere": (OptimizerConfig(weight_decay=3.0, decay_vectors=True), {}, set(NAMES), set()),
    "heavy decay on matrices": (OptimizerConfig(weight_decay=3.0), {}, MATRICES, set()),
    "slow vision": (
        OptimizerConfig(weight_decay=3.0, learning_rate_scales=(("^vision/", 0.25), ("kernel$", 2.0))),
        {**VISION, "decoder/kernel": 2.0},
        MATRICES,
        set(),
    ),
    "frozen decoder": (
        OptimizerConfig(weight_decay=3.0, freeze=("^decoder/", "bias")),
        {},
        MATRICES,
        {"decoder/kernel", "decoder/scale", "qkv_bias"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_adamw_matches_numpy_over_several_steps(case):
    config, scales, decayed, frozen = CASES[case]
    params = start = model()
    gradients = [model(seed=k + 1, scale=0.3 * (k + 1)) for k in range(5)]
    rates = [1e-2 * 0.8**k for k in range(5)]
    optimizer = make_optimizer(config, lambda step: 1e-2 * 0.8**step, params)

    @jax.jit
    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = step(gradient, state, params)

    expected = reference_adamw(arrays(start), [arrays(g) for g in gradients], config, rates, scales, decayed, frozen)
    assert isinstance(params, Model)
    for name, value in arrays(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-7, err_msg=name)
        assert np.array_equal(value, arrays(start)[name]) == (name in frozen), name


def test_frozen_parameters_have_zero_updates_no_moments_and_no_part_in_clipping():
    params = model()
    optimizer = make_optimizer(OptimizerConfig(freeze=("^vision/",)), constant, params)
    state = jax.jit(optimizer.init)(params)
    assert not [name for name in parameter_names(state) if "vision" in name]
    assert len([name for name in parameter_names(state) if "decoder/kernel" in name]) == 2  # the two moments

    poisoned = model()
    poisoned.vision.kernel[...] = np.full((2, 4, 3), np.nan, np.float32)
    poisoned.vision.scale[...] = np.full((2, 4), np.nan, np.float32)
    update = jax.jit(optimizer.update)
    clean_updates, _ = update(params, state, params)
    updates, _ = update(poisoned, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for name, value in arrays(updates).items():
        np.testing.assert_array_equal(value, arrays(clean_updates)[name])
        assert bool(np.any(value)) != name.startswith("vision/")


def test_moments_and_updates_are_float32_for_bfloat16_parameters():
    params, gradient = model(dtype=jnp.bfloat16), model(1, dtype=jnp.bfloat16)
    optimizer = make_optimizer(OptimizerConfig(clip_norm=None), constant, params)
    state = jax.jit(optimizer.init)(params)
    updates, state = jax.jit(optimizer.update)(gradient, state, params)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    assert {x.dtype.name for x in jax.tree.leaves(optax.apply_updates(params, updates))} == {"bfloat16"}
    second: Any = next(leaf for name, leaf in named_leaves(state).items() if "nu/" in name and "embed" in name)
    wanted = 0.05 * arrays(gradient)["embed"] ** 2
    np.testing.assert_allclose(np.asarray(jax.tree.leaves(second)[0]), wanted, rtol=1e-5)


def test_abstract_model_gives_the_same_state_and_moments_keep_metadata():
    params = model()
    abstract: Any = jax.eval_shape(model)
    optimizer = make_optimizer(OptimizerConfig(), constant, abstract)
    shapes = jax.eval_shape(optimizer.init, abstract)
    state = jax.jit(optimizer.init)(params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(state)]
    moments = [leaf for name, leaf in named_leaves(state).items() if name.endswith("vision/kernel")]
    assert [moment.get_metadata()["axes"] for moment in moments] == [("embed", "mlp")] * 2


def test_plain_dicts_of_arrays_are_parameters_too():
    shared = np.ones((2, 2), np.float32)
    params: Any = {"a": shared, "b": shared, "c": np.ones(2, np.float32)}
    optimizer = make_optimizer(OptimizerConfig(freeze=("b",), weight_decay=0.5), constant, params)
    zeros: Any = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)
    np.testing.assert_allclose(updates["a"], -5e-3)
    assert not np.any(updates["b"]) and not np.any(updates["c"])


# Names and patterns ---------------------------------------------------------------------------------------------------


def test_names_are_paths_in_the_model():
    assert parameter_names(model()) == NAMES
    assert parameter_names(jax.eval_shape(model)) == NAMES
    assert trained_names(OptimizerConfig(freeze=("scale$",)), model()) == set(NAMES) - {"decoder/scale", "vision/scale"}


@pytest.mark.parametrize("field", ["freeze", "learning_rate_scales"])
def test_pattern_that_matches_nothing_is_refused_with_suggestions(field):
    value: Any = ("^visoin/",) if field == "freeze" else (("^visoin/", 0.1),)
    config = dataclasses.replace(OptimizerConfig(), **{field: value})
    with pytest.raises(ConfigError) as caught:
        make_optimizer(config, constant, model())
    message = str(caught.value)
    assert f"optimizer.{field}" in message and "'^visoin/'" in message and "Did you mean 'vision'?" in message
    assert "Names start with decoder, embed, qkv_bias, vision." in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(freeze=("vision/(",)), r"freeze pattern 'vision/\(' is not a regular expression"),
        (OptimizerConfig(freeze=(".",)), "freezes every parameter"),
        (
            OptimizerConfig(learning_rate_scales=(("kernel", 2.0), ("vision/kernel", 0.1))),
            "'vision/kernel' never applies",
        ),
        (OptimizerConfig(learning_rate_scales=(("vision", 0.0),)), "'vision': scale 0.0 must be positive"),
        (OptimizerConfig(learning_rate_scales=(("vision", float("nan")),)), "scale nan must be positive"),
        (OptimizerConfig(clip_norm=0.0), "clip_norm=0.0"),
        (OptimizerConfig(weight_decay=-0.1), "weight_decay=-0.1"),
    ],
)
def test_unusable_options_are_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config, constant, model())
