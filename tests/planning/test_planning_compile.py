"""The compiled step: what the real compiler says, and what is made of its refusals."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.chips import TPUS
from stepjax.data.packing import RowBudget, pack
from stepjax.errors import ConfigError
from stepjax.planning.compile import compile_step, read_shortage
from stepjax.planning.topologies import find
from stepjax.planning.work import abstract_batch
from stepjax.sharding import make_mesh


def test_the_batch_is_the_loaders(tiny):
    mesh = make_mesh(tiny.mesh, jax.devices()[:4])
    batch = abstract_batch(tiny, mesh, 4)
    row = pack([], RowBudget.of(tiny.batch, tiny.images, tiny.numerics.compute_dtype))
    assert {name: (x.shape[1:], np.dtype(x.dtype)) for name, x in batch.items()} == {
        f"{name[: name.rindex('_')]}_B{name[name.rindex('_') + 1 :]}": (x.shape, x.dtype) for name, x in row.items()
    }
    assert {x.shape[0] for x in batch.values()} == {4}
    assert {x.sharding.shard_shape(x.shape)[0] for x in batch.values()} == {1}


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


def test_memory_of_the_compiled_step(tiny_plan):
    step = tiny_plan.step
    assert step.fits and step.shortage is None
    parts = step.parameter_bytes + step.optimizer_bytes + step.batch_bytes
    assert step.optimizer_bytes >= 2 * step.parameter_bytes
    # Arguments are padded to whole tiles, never cut.
    assert parts <= step.argument_bytes < step.total_bytes
    assert step.alias_bytes >= step.parameter_bytes, "the state is donated"
    assert tiny_plan.memory.total == pytest.approx(tiny_plan.hbm_gib, rel=1e-6)
    assert min(dataclasses.astuple(tiny_plan.memory)) >= 0


def test_the_environment_is_left_as_it_was(tiny_plan):
    if jax.__version_info__ < (0, 11):  # conftest sets it for these
        assert "xla_cpu" in os.environ["XLA_FLAGS"]


def test_an_unknown_compiler_option_is_a_users_error(tiny):
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match="xla_tpu_no_such_option"):
        compile_step(tiny, find("v5e-4"), compiler_options={"xla_tpu_no_such_option": "true"})
