"""Work other than training: the functions do what they are called, and plans of them make sense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import ConfigError
from stepjax.models.flops import decoder_flops
from stepjax.models.step_vl import init_model, num_parameters
from stepjax.planning.command import run
from stepjax.planning.plan import make_plan
from stepjax.planning.report import to_json, to_text
from stepjax.planning.topologies import find
from stepjax.planning.work import model_flops, rows_at_once, tokens, work
from stepjax.sharding import make_mesh


@pytest.fixture(scope="module")
def float32(tiny):
    return dataclasses.replace(tiny, numerics=dataclasses.replace(tiny.numerics, compute_dtype="float32"))


@pytest.fixture(scope="module")
def model(float32):
    return init_model(float32.model, float32.numerics)


def filled(tree, config):
    """Arrays of the shapes of a batch: one segment a row, tokens at random."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        name = jax.tree_util.keystr(path)
        if "tokens" in name:
            return jnp.asarray(rng.integers(0, config.model.decoder.vocab_size, x.shape), x.dtype)
        if "positions" in name:
            return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=x.dtype), x.shape)
        if "feature_index" in name:
            return jnp.full(x.shape, -1, x.dtype)
        return jnp.ones(x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def on_one_device(kind, config):
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return mesh, work(kind, config, mesh)


def test_scores_are_log_probabilities_of_the_next_tokens(float32, model):
    mesh, scoring = on_one_device("score", float32)
    batch = filled(scoring.batch, float32)
    with jax.set_mesh(mesh):
        log_probs_BT = jax.jit(scoring.function)(model, batch)
        inputs = {name: batch[name] for name in batch if name not in ("loss_weights_BT", "group_BT")}
        logits_BTV = jax.jit(lambda model: model.decoder.logits(model(**inputs)[0]))(model)
    wanted_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    tokens_BT = np.asarray(batch["tokens_BT"])
    wanted_BT = np.take_along_axis(np.asarray(wanted_BTV)[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs_BT[:, :-1], wanted_BT, atol=1e-4)


def test_decoding_goes_on_where_prefill_stops(float32, model):
    """The token after the prompt, and the one after that, are those of a forward pass over the longer sequence."""
    mesh, filling = on_one_device("prefill", float32)
    _, decoding = on_one_device("decode", float32)
    batch = filled(filling.batch, float32)
    half = float32.batch.tokens // 2
    with jax.set_mesh(mesh):
        short = {name: x[:, :half] if name.endswith("_BT") else x for name, x in batch.items()}
        first_B, cache = jax.jit(filling.function)(model, short)
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, half), (0, 0), (0, 0))), cache)
        assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, decoding.batch[0])
        second_B, _ = jax.jit(decoding.function)(model, cache, first_B, jnp.full(first_B.shape, half))
        longer_BT = jnp.concatenate([short["tokens_BT"], first_B[:, None]], axis=1)
        positions_BT = jnp.broadcast_to(jnp.arange(half + 1), longer_BT.shape)

        @jax.jit
        def last_two(model):
            hidden_BTD, _ = model.decoder(model.decoder.embed(longer_BT), positions_BT)
            return jnp.argmax(model.decoder.logits(hidden_BTD[:, -2:]), axis=-1)

        wanted_BT = last_two(model)
    np.testing.assert_array_equal(jnp.stack([first_B, second_B], axis=1), wanted_BT)


def test_flops_and_tokens(tiny):
    halves = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, accumulation=2))
    assert rows_at_once("train", halves) == 4 and rows_at_once("score", halves) == 2
    assert tokens("train", tiny) == tokens("score", tiny) == 4 * tiny.batch.tokens
    assert tokens("decode", tiny) == 4
    assert model_flops("score", tiny) == pytest.approx(model_flops("train", tiny) / 3)
    assert model_flops("decode", tiny) == decoder_flops(tiny.model.decoder, 4, 4 * tiny.batch.tokens)
    head = 2 * tiny.model.decoder.width * tiny.model.decoder.vocab_size
    assert model_flops("score", tiny) - model_flops("prefill", tiny) == head * 4 * (tiny.batch.tokens - 1)


@pytest.mark.parametrize("kind", ["score", pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_plans_of_other_work_than_training(tiny, kind):
    pytest.importorskip("libtpu")
    plan = make_plan(tiny, find("v5p-8"), kind=kind)
    fields, text = to_json(plan), to_text(plan)
    assert plan.fits and fields["step"] == kind and f"  {kind}; mesh" in text
    assert fields["tokens_per_second"] > 0 and fields["days_for_1_2t_tokens"] is None
    # Held in the compute dtype, and no optimizer.
    assert plan.step.parameter_bytes >= 2 * num_parameters(jax.eval_shape(lambda: init_model(tiny.model))) / 4
    assert plan.step.optimizer_bytes == 0 and plan.memory.gradients == 0
    assert not fields["not_understood"]
    if kind == "decode":
        decoder = tiny.model.decoder
        slots = 4 * tiny.batch.tokens * decoder.num_layers
        cache = 2 * 2 * slots * decoder.num_kv_heads * decoder.head_dim
        assert plan.step.batch_bytes == pytest.approx(cache / 4, rel=0.01)
        assert plan.step.alias_bytes >= cache / 4, "the cache is written in place"
        assert fields["images_per_second"] is None


def test_only_training_is_searched():
    arguments = ["configs/digits/pretrain.py", "--topology", "v5p-8", "--step", "decode", "--search"]
    with pytest.raises(ConfigError, match="--step decode"):
        run(arguments)
