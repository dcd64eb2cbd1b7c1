"""draft"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from stepjax.data.packing import RowBudget
from stepjax.inference import programs
from stepjax.inference.batch import Batch
from stepjax.models.paged_cache import make_pool, pool_layout
from stepjax.models.serving_decoder import serving_model
from stepjax.models.step_vl import abstract_model
from stepjax.planning.steps import Step, on_mesh
from stepjax.post_training.config import RLConfig
from stepjax.post_training.episodes import make_batch
from stepjax.post_training.sampling import engine_config_of
from stepjax.post_training.step import Programs, abstract_state, make_optimizers
from stepjax.sharding import spec, target_platform


def of_trainer(config: RLConfig, mesh: Mesh) -> dict[str, Step]:
    optimizers = make_optimizers(config)
    functions = Programs(config, optimizers)
    with jax.set_mesh(mesh):
        state = on_mesh(abstract_state(config, optimizers), mesh)
        reference = on_mesh(abstract_model(config.model, config.numerics), mesh) if config.loss.kl else None
    layout = NamedSharding(mesh, spec("batch"))
    empty = make_batch([[]], RowBudget.of(config.batch, config.images, config.numerics.compute_dtype))
    batch = {
        name: jax.ShapeDtypeStruct((config.batch.rows, *x.shape[1:]), x.dtype, sharding=layout)
        for name, x in empty.items()
    }
    model, critic = state.model, state.critic
    steps = {
        "scoring": Step(functions.scores, (model, reference, critic, batch), (model, reference, critic), (), batch),
        "policy": Step(
            functions.policy, ((model, None), model, None, batch), (model, model), (), batch, {"is_first": False}
        ),
        "policy step": Step(functions.apply_policy, (model, state.opt_state, model), (model, model), state.opt_state, ()),
        "critic": Step(functions.critic, (critic, critic, batch), (critic, critic), (), batch),
        "critic step": Step(
            functions.apply_critic, (critic, state.critic_opt_state, critic), (critic, critic), state.critic_opt_state, ()
        ),
    }
    return steps


def of_engine(config: RLConfig, mesh: Mesh, rows: int, tokens: int) -> Step:
    numerics = dataclasses.replace(config.numerics, param_dtype=config.numerics.compute_dtype)
    engine = engine_config_of(config)
    with jax.set_mesh(mesh):
        model = on_mesh(jax.eval_shape(partial(serving_model, weights=None), on_mesh(abstract_model(config.model, numerics), mesh)), mesh)
        dtype = jnp.dtype(numerics.compute_dtype)
        pages = -(-(engine.cache_tokens or engine.max_sequences * engine.max_context) // engine.page_size)
        make = partial(make_pool, config.model.decoder, pages, engine.page_size, dtype, target_platform())
        shape = jax.eval_shape(make)
    pool = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool_layout(mesh))
    layout = NamedSharding(mesh, spec())
    empty = Batch.empty(rows, 1, -(-tokens // engine.page_size), 0)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), (empty.tables, empty.rows))
    static = {"steps": engine.decode_steps, "num_top": 0}
    return Step(programs.decode, (model, pool, *batch), model, (), (pool, batch), static)
