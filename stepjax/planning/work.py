"""What a plan can be made of: the functions that a job runs over and over, over abstract arrays.

    train     one optimizer step; also what an update of reinforcement learning costs
    score     log-probabilities of the tokens of a batch, without gradients: references and old policies
    prefill   a row's worth of a prompt's tokens into the engine's cache, images encoded already
    decode    one token more for every sequence of a batch, each with a cache as long as a row

All but training hold the parameters in the compute dtype and take the recipe's micro-batch (rows / accumulation); the
last two are programs of the inference engine, with a cache for the micro-batch.

Legend: B rows, C tokens of a row, R rows of the feature store, D width, T tokens of a page.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepjax.config import PretrainConfig
from stepjax.data.packing import RowBudget, pack
from stepjax.inference import programs
from stepjax.inference.batch import Batch
from stepjax.inference.config import EngineConfig
from stepjax.models.flops import decoder_flops, training_flops
from stepjax.models.paged_cache import Chunk, make_pool, pool_layout
from stepjax.models.step_vl import abstract_model
from stepjax.planning.kinds import Kind
from stepjax.sharding import check_heads_only, shardings, spec, target_platform
from stepjax.training.losses import next_tokens, token_scores
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.step import abstract_state, make_train_step

PAGE_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """A function and what it is called with. The arrays are those of the whole mesh."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    parameters: Any
    optimizer: Any
    batch: Any  # with the cache, where there is one


def work(kind: Kind, config: PretrainConfig, mesh: Mesh) -> Work:
    if kind == "train":
        return _train(config, mesh)
    numerics = dataclasses.replace(config.numerics, param_dtype=config.numerics.compute_dtype)
    model = _on_mesh(abstract_model(config.model, numerics), mesh)
    rows, loss_chunk = config.batch.rows // config.batch.accumulation, numerics.loss_chunk
    if kind in ("prefill", "decode"):
        return _of_engine(kind, config, model, rows, mesh)
    batch = abstract_batch(config, mesh, rows)

    def score(model, batch):
        hidden_BTD = model(**_inputs(batch))
        targets_BT, _ = next_tokens(batch["tokens_BT"], batch["loss_weights_BT"])
        with jax.named_scope("loss"):
            return token_scores(hidden_BTD, model.decoder.head(), targets_BT, chunk=loss_chunk).log_probs_BT

    return Work(score, (model, batch), (), model, (), batch)


def _train(config: PretrainConfig, mesh: Mesh) -> Work:
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_model(config.model, config.numerics))
    state = _on_mesh(abstract_state(config, optimizer), mesh)
    batch = abstract_batch(config, mesh, config.batch.rows)
    function = make_train_step(config, optimizer, schedule)
    return Work(function, (state, batch), (0,), state.model, state.opt_state, batch)


def _of_engine(kind: Kind, config: PretrainConfig, model: Any, rows: int, mesh: Mesh) -> Work:
    """A program of the engine, for `rows` sequences of up to as many tokens as a row has.

    Raises:
        ConfigError: the mesh is not one that an engine can use.
    """
    check_heads_only(mesh)
    decoder, length = config.model.decoder, config.batch.tokens
    dtype, row_pages = jnp.dtype(config.numerics.compute_dtype), -(-length // PAGE_SIZE)
    num_pages = rows * row_pages
    shape = jax.eval_shape(lambda: make_pool(decoder, num_pages, PAGE_SIZE, dtype, target_platform()))
    pool_S2KTW = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool_layout(mesh))
    everywhere = NamedSharding(mesh, spec())

    def replicated(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

    if kind == "decode":
        empty = Batch.empty(rows, 1, row_pages, 0)
        batch = replicated((empty.tables, empty.rows))

        def decode(model, pool_S2KTW, tables, sequences):
            return programs.decode(model, pool_S2KTW, tables, sequences, steps=1, num_top=0)

        return Work(decode, (model, pool_S2KTW, *batch), (1,), model, (), (pool_S2KTW, batch))

    store_RD = jax.ShapeDtypeStruct((EngineConfig().feature_cache_tokens, decoder.width), dtype)
    tokens_C = jax.ShapeDtypeStruct((length,), jnp.int32)
    chunk = Chunk(np.zeros(row_pages, np.int32), np.int32(0), np.int32(0))
    batch = replicated((store_RD, tokens_C, tokens_C, chunk))

    def prefill(model, pool_S2KTW, store_RD, tokens_C, feature_rows_C, chunk):
        return programs.prefill(model, pool_S2KTW, store_RD, tokens_C, feature_rows_C, chunk)

    return Work(prefill, (model, pool_S2KTW, *batch), (1,), model, (), (pool_S2KTW, batch))


def _inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: batch[name] for name in batch if name not in ("loss_weights_BT", "group_BT")}


def abstract_batch(config: PretrainConfig, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the loader would hand it over, without its arrays."""
    layout = NamedSharding(mesh, spec("batch"))
    batch = {}
    for key, row in pack([], RowBudget.of(config.batch, config.images, config.numerics.compute_dtype)).items():
        name, _, suffix = key.rpartition("_")
        batch[f"{name}_B{suffix}"] = jax.ShapeDtypeStruct((rows, *row.shape), row.dtype, sharding=layout)
    return batch


def _on_mesh(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree, shardings(tree, mesh)
    )


def rows_at_once(kind: Kind, config: PretrainConfig) -> int:
    """Sequences that one call works on."""
    if kind == "prefill":
        return 1
    return config.batch.rows if kind == "train" else config.batch.rows // config.batch.accumulation


def tokens(kind: Kind, config: PretrainConfig) -> int:
    """That one call trains on, scores, reads or writes."""
    return rows_at_once(kind, config) * (1 if kind == "decode" else config.batch.tokens)


def model_flops(kind: Kind, config: PretrainConfig) -> float:
    """Of a call whose slots are all full, by examples as long as they may be; a cache that is full."""
    batch, images, rows, decoder = config.batch, config.images, rows_at_once(kind, config), config.model.decoder
    if kind == "decode":
        return decoder_flops(decoder, rows, rows * batch.tokens)
    if kind == "prefill":  # without the output projection
        head = 2.0 * decoder.width * decoder.vocab_size * batch.tokens
        return decoder_flops(decoder, batch.tokens, batch.tokens * (batch.tokens + 1) / 2) - head
    flops = training_flops(
        config.model,
        tokens=rows * batch.tokens,
        attention_pairs=rows * batch.attention_pairs,
        global_views=rows * batch.global_views,
        crops=rows * batch.crops,
        global_grid=images.global_grid,
        crop_grid=images.crop_grid,
    )
    return flops if kind == "train" else flops / 3


def num_bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
