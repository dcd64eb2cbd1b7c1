"""Work other than training: the functions do what they are called, and plans of them make sense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import ConfigError
from stepjax.models.flops import decoder_flops
from stepjax.models.paged_cache import LANES
from stepjax.models.step_vl import init_model, num_parameters
from stepjax.planning import hlo
from stepjax.planning.command import run
from stepjax.planning.hlo import arrays
from stepjax.planning.plan import make_plan
from stepjax.planning.report import to_json, to_text
from stepjax.planning.topologies import find
from stepjax.planning.work import PAGE_SIZE, model_flops, rows_at_once, tokens, work
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
        logits_BTV = jax.jit(lambda model: model.decoder.logits(model(**inputs)))(model)
    wanted_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    tokens_BT = np.asarray(batch["tokens_BT"])
    wanted_BT = np.take_along_axis(np.asarray(wanted_BTV)[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs_BT[:, :-1], wanted_BT, atol=1e-4)


def test_an_engine_spreads_heads_alone(tiny):
    mesh = make_mesh(dataclasses.replace(tiny.mesh, data=2, fsdp=1), jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="data"):
        work("decode", tiny, mesh)


def test_flops_and_tokens(tiny):
    halves = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, accumulation=2))
    assert rows_at_once("train", halves) == 4 and rows_at_once("score", halves) == 2
    assert tokens("train", tiny) == tokens("score", tiny) == 4 * tiny.batch.tokens
    assert tokens("decode", tiny) == 4
    assert model_flops("score", tiny) == pytest.approx(model_flops("train", tiny) / 3)
    assert model_flops("decode", tiny) == decoder_flops(tiny.model.decoder, 4, 4 * tiny.batch.tokens)
    assert rows_at_once("prefill", tiny) == 1 and tokens("prefill", tiny) == tiny.batch.tokens
    assert 0 < model_flops("prefill", tiny) < model_flops("score", tiny) / 4


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("score", "prefill")] + ["decode"]
)
def test_plans_of_other_work_than_training(tiny, kind):
    pytest.importorskip("libtpu")
    # An engine's devices share its batch and part the heads, and here there is one head of keys.
    chips = 4 if kind == "score" else 1
    plan = make_plan(tiny, find("v5p-8" if kind == "score" else "v5e-1"), kind=kind)
    fields, text = to_json(plan), to_text(plan)
    assert plan.fits and fields["step"] == kind and f"  {kind}; mesh" in text
    assert fields["tokens_per_second"] > 0 and fields["days_for_1_2t_tokens"] is None
    # Held in the compute dtype, and no optimizer.
    assert plan.step.parameter_bytes >= 2 * num_parameters(jax.eval_shape(lambda: init_model(tiny.model))) / chips
    assert plan.step.optimizer_bytes == 0 and plan.memory.gradients == 0
    assert not fields["not_understood"]
    if kind == "decode":
        decoder = tiny.model.decoder
        pages = 4 * -(-tiny.batch.tokens // PAGE_SIZE) * decoder.num_layers
        cache = 2 * 2 * pages * PAGE_SIZE * decoder.num_kv_heads * LANES
        assert cache <= plan.step.batch_bytes < cache + 10_000
        assert plan.step.alias_bytes >= cache, "the cache is written in place"
        assert fields["images_per_second"] is None


def test_decoding_on_a_mesh_moves_neither_weights_nor_the_cache(tiny, tmp_path):
    """Four chips, a head each: activations and logits are exchanged, and the pool is written where it lies."""
    pytest.importorskip("libtpu")
    decoder = dataclasses.replace(tiny.model.decoder, num_heads=4, num_kv_heads=4, vocab_size=2048)
    mesh = dataclasses.replace(tiny.mesh, fsdp=1, tensor=4)
    vision = dataclasses.replace(tiny.model.vision, num_heads=4, width=64, mlp_dim=64)
    model = dataclasses.replace(tiny.model, decoder=decoder, vision=vision)
    batch = dataclasses.replace(tiny.batch, rows=64, tokens=8192)  # a cache that is too large for vector memory
    config = dataclasses.replace(tiny, model=model, mesh=mesh, batch=batch)
    text = tmp_path / "program"
    plan = make_plan(config, find("v5e-4"), kind="decode", keep_text=text)
    assert plan.fits
    pages = 64 * 8192 // PAGE_SIZE * decoder.num_layers
    moved = [array for op in operations(text, "copy") for array in arrays(op.shape)]
    assert not [array for array in moved if array.dims[:2] == (pages, 2)], "the cache is copied"
    gathered = [array for op in operations(text, "all-gather") for array in arrays(op.shape)]
    logits = 4 * 64 * decoder.vocab_size
    assert sum(array.bytes for array in gathered) <= 2 * logits, "weights are gathered"


def operations(text, opcode):
    program = hlo.read(text.read_text())
    return [op for ops in program.computations.values() for op in ops if op.opcode.startswith(opcode)]


def test_only_training_is_searched():
    arguments = ["configs/digits/pretrain.py", "--topology", "v5p-8", "--step", "decode", "--search"]
    with pytest.raises(ConfigError, match="--step decode"):
        run(arguments)
