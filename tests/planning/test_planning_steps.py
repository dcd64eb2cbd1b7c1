"""Steps as functions, their compilation, and what is made of the compiler's refusals."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.chips import TPUS
from stepjax.data.packing import RowBudget, pack
from stepjax.errors import ConfigError
from stepjax.models.flops import decoder_flops
from stepjax.models.paged_cache import LANES
from stepjax.models.step_vl import init_model, num_parameters
from stepjax.planning import hlo
from stepjax.planning.plan import make_plan
from stepjax.planning.report import to_json, to_text
from stepjax.planning.steps import (
    PAGE_SIZE,
    abstract_batch,
    compile_step,
    make_step,
    model_flops,
    read_shortage,
    rows_at_once,
    tokens_at_once,
)
from stepjax.planning.topologies import find
from stepjax.sharding import make_mesh

# Functions ------------------------------------------------------------------------------------------------------------


def test_the_batch_is_the_loaders(tiny):
    mesh = make_mesh(tiny.mesh, jax.devices()[:4])
    batch = abstract_batch(tiny, mesh, 4)
    row = pack([], RowBudget.of(tiny.batch, tiny.images, tiny.numerics.compute_dtype))
    assert {name: (x.shape[1:], np.dtype(x.dtype)) for name, x in batch.items()} == {
        f"{name[: name.rindex('_')]}_B{name[name.rindex('_') + 1 :]}": (x.shape, x.dtype) for name, x in row.items()
    }
    assert {x.shape[0] for x in batch.values()} == {4}
    assert {x.sharding.shard_shape(x.shape)[0] for x in batch.values()} == {1}


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


def test_scores_are_log_probabilities_of_the_next_tokens(tiny):
    float32 = dataclasses.replace(tiny, numerics=dataclasses.replace(tiny.numerics, compute_dtype="float32"))
    model = init_model(float32.model, float32.numerics)
    mesh = make_mesh(float32.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        scoring = make_step("score", float32, mesh)
    batch = filled(scoring.batch, float32)
    with jax.set_mesh(mesh):
        log_probs_BT = scoring.function(model, batch)
        inputs = {name: batch[name] for name in batch if name not in ("loss_weights_BT", "group_BT")}
        logits_BTV = jax.jit(lambda model: model.decoder.logits(model(**inputs)))(model)
    wanted_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    tokens_BT = np.asarray(batch["tokens_BT"])
    wanted_BT = np.take_along_axis(np.asarray(wanted_BTV)[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs_BT[:, :-1], wanted_BT, atol=1e-4)


def test_an_engine_spreads_heads_alone(tiny):
    mesh = make_mesh(dataclasses.replace(tiny.mesh, data=2, fsdp=1), jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="data"):
        make_step("decode", tiny, mesh)


def test_flops_and_tokens(tiny):
    halves = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, accumulation=2))
    assert rows_at_once("train", halves) == 4 and rows_at_once("score", halves) == 2
    assert tokens_at_once("train", tiny) == tokens_at_once("score", tiny) == 4 * tiny.batch.tokens
    assert tokens_at_once("decode", tiny) == 4
    assert model_flops("score", tiny) == pytest.approx(model_flops("train", tiny) / 3)
    assert model_flops("decode", tiny) == decoder_flops(tiny.model.decoder, 4, 4 * tiny.batch.tokens)
    assert rows_at_once("prefill", tiny) == 1 and tokens_at_once("prefill", tiny) == tiny.batch.tokens
    assert 0 < model_flops("prefill", tiny) < model_flops("score", tiny) / 4


# Compilation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "needed", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (1.12T) exceeds available HBM (95.73G). HLO module: jit_train_step.",
            1146.88,
            95.73,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.00M of 256.00M hbm.", 0.5, 0.25),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)
def test_figures_of_a_refusal(message, needed, limit):
    shortage = read_shortage(message)
    assert shortage.needed_gib == (None if needed is None else pytest.approx(needed))
    assert shortage.limit_gib == limit
    assert shortage.message == message


@pytest.mark.parametrize(("chip", "name"), [("v5e", "v5e-4"), ("v5p", "v5p-8"), ("v6e", "v6e-4"), ("tpu7x", "tpu7x-8")])
def test_the_compiler_offers_as_much_memory_as_is_noted(chip, name):
    pytest.importorskip("libtpu")
    mesh = jax.sharding.Mesh(np.array(find(name).devices()[:1]), ("x",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    large = jax.ShapeDtypeStruct((2**20, 2**17), jnp.float32, sharding=layout)
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError) as error:
            jax.jit(lambda x: x + 1).lower(large).compile()
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
    shortage = read_shortage(str(error.value))
    assert shortage.limit_gib == TPUS[chip].hbm_limit_gib
    assert shortage.needed_gib is not None and shortage.needed_gib >= 512


def test_rows_that_do_not_divide_are_refused(tiny):
    pytest.importorskip("libtpu")
    batch = dataclasses.replace(tiny.batch, rows=6)
    with pytest.raises(ConfigError, match="batch.rows=6"):
        compile_step(dataclasses.replace(tiny, batch=batch), find("v5e-4"))


def test_a_mesh_that_is_not_the_topologys_is_refused(tiny):
    pytest.importorskip("libtpu")
    mesh = dataclasses.replace(tiny.mesh, data=3)
    with pytest.raises(ConfigError, match="mesh"):
        compile_step(dataclasses.replace(tiny, mesh=mesh), find("v5e-4"))
    with pytest.raises(ConfigError, match="mesh.slice=1"):
        compile_step(tiny, find("v5e-4", slices=2))


def test_what_a_kernel_refuses_is_a_users_error(tiny):
    pytest.importorskip("libtpu")
    batch = dataclasses.replace(tiny.batch, crops=100_000)
    with pytest.raises(ConfigError, match="cannot be built"):
        compile_step(dataclasses.replace(tiny, batch=batch), find("v5e-4"))


def test_an_unknown_compiler_option_is_a_users_error(tiny):
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match="xla_tpu_no_such_option"):
        compile_step(tiny, find("v5e-4"), kind="score", compiler_options={"xla_tpu_no_such_option": "true"})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "topology"), [("score", "v5p-8"), ("prefill", "v5e-1")])
def test_plans_of_other_steps_than_training(tiny, kind, topology):
    pytest.importorskip("libtpu")
    plan = make_plan(tiny, find(topology), kind=kind)
    check_plan_of_inference(plan)
    assert to_json(plan)["images_per_second"] is None or kind == "score"


def check_plan_of_inference(plan):
    """Parameters are held in the compute dtype, without an optimizer; everything was understood."""
    fields, text = to_json(plan), to_text(plan)
    assert plan.fits and fields["step"] == plan.kind and f"  {plan.kind}; mesh" in text
    assert fields["tokens_per_second"] > 0 and fields["days_for_1_2t_tokens"] is None
    parameters = num_parameters(jax.eval_shape(lambda: init_model(plan.config.model)))
    assert plan.step.parameter_bytes >= 2 * parameters / plan.topology.chips
    assert plan.step.optimizer_bytes == 0 and plan.memory.gradients == 0
    assert not fields["not_understood"]


def test_decoding_on_a_mesh_moves_neither_weights_nor_the_cache(tiny, tmp_path):
    """Four chips, a head each: activations and logits are exchanged, and the pool is written in place."""
    pytest.importorskip("libtpu")
    decoder = dataclasses.replace(tiny.model.decoder, num_heads=4, num_kv_heads=4, vocab_size=2048)
    mesh = dataclasses.replace(tiny.mesh, fsdp=1, tensor=4)
    vision = dataclasses.replace(tiny.model.vision, num_heads=4, width=64, mlp_dim=64)
    model = dataclasses.replace(tiny.model, decoder=decoder, vision=vision)
    batch = dataclasses.replace(tiny.batch, rows=64, tokens=8192)  # a cache that is too large for vector memory
    config = dataclasses.replace(tiny, model=model, mesh=mesh, batch=batch)
    text = tmp_path / "program"
    plan = make_plan(config, find("v5e-4"), kind="decode", keep_text=text)
    check_plan_of_inference(plan)
    assert to_json(plan)["images_per_second"] is None
    pages = 64 * 8192 // PAGE_SIZE * decoder.num_layers
    cache = 2 * 2 * pages * PAGE_SIZE * LANES  # keys and values, bfloat16, of one head
    assert cache <= plan.step.batch_bytes < cache + 100_000
    assert plan.step.alias_bytes >= cache, "the cache is written in place"
    moved = [array for op in operations(text, "copy") for array in hlo.arrays(op.shape)]
    assert not [array for array in moved if array.dims[:2] == (pages, 2)], "the cache is copied"
    gathered = [array for op in operations(text, "all-gather") for array in hlo.arrays(op.shape)]
    logits = 4 * 64 * decoder.vocab_size
    assert sum(array.bytes for array in gathered) <= 2 * logits, "weights are gathered"


def operations(text, opcode):
    program = hlo.read(text.read_text())
    return [op for ops in program.computations.values() for op in ops if op.opcode.startswith(opcode)]


def test_int8_decoding_keeps_a_scale_per_output_beside_stacked_values(tiny):
    mesh = make_mesh(tiny.mesh, find("v6e:1x1").devices())
    with jax.set_mesh(mesh):
        step = make_step("decode", tiny, mesh, "int8")
    layers, width = tiny.model.decoder.num_layers, tiny.model.decoder.width
    down = step.parameters.decoder.down
    assert (down.values.shape, down.values.dtype) == ((layers, width, tiny.model.decoder.mlp_dim), jnp.int8)
    assert (down.scales.shape, down.scales.dtype) == ((layers, width), jnp.float32)
