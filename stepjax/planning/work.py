"""What a plan can be made of: the functions that a job runs over and over, over abstract arrays.

    train     one optimizer step; also what an update of reinforcement learning costs
    score     log-probabilities of the tokens of a batch, without gradients: references and old policies
    prefill   a batch of prompts, images included, into a key-value cache
    decode    one token more for every sequence of a batch, each with a cache as long as a row

All but training hold the parameters in the compute dtype and take the recipe's micro-batch (rows / accumulation).

Legend: B rows, T tokens, S cache slots, V vocabulary.
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
from stepjax.models.flops import decoder_flops, training_flops
from stepjax.models.qwen3 import make_cache
from stepjax.models.step_vl import abstract_model
from stepjax.planning.kinds import Kind
from stepjax.sharding import shardings, spec
from stepjax.training.losses import next_tokens, token_scores
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.step import abstract_state, make_train_step


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
    if kind == "decode":
        return _decode(config, model, rows, mesh)
    batch = abstract_batch(config, mesh, rows)

    def score(model, batch):
        hidden_BTD = model(**_inputs(batch))[0]
        targets_BT, _ = next_tokens(batch["tokens_BT"], batch["loss_weights_BT"])
        with jax.named_scope("loss"):
            return token_scores(hidden_BTD, model.decoder.head(), targets_BT, chunk=loss_chunk).log_probs_BT

    def prefill(model, batch):
        inputs = _inputs(batch)
        segment_ids_BT = inputs.pop("segment_ids_BT")
        dtype = jnp.dtype(numerics.compute_dtype)
        rows, slots = segment_ids_BT.shape
        cache = make_cache(config.model.decoder, rows, slots, dtype)
        cache = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _cache_layout(mesh)), cache)
        hidden_BTD, cache = model(**inputs, cache=cache)
        last_B1D = hidden_BTD[:, -1:]
        with jax.named_scope("loss"):
            return jnp.argmax(model.decoder.logits(last_B1D)[:, 0], axis=-1), cache

    return Work(score if kind == "score" else prefill, (model, batch), (), model, (), batch)


def _train(config: PretrainConfig, mesh: Mesh) -> Work:
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_model(config.model, config.numerics))
    state = _on_mesh(abstract_state(config, optimizer), mesh)
    batch = abstract_batch(config, mesh, config.batch.rows)
    function = make_train_step(config, optimizer, schedule)
    return Work(function, (state, batch), (0,), state.model, state.opt_state, batch)


def _decode(config: PretrainConfig, model: Any, rows: int, mesh: Mesh) -> Work:
    dtype = jnp.dtype(config.numerics.compute_dtype)
    shapes = jax.eval_shape(lambda: make_cache(config.model.decoder, rows, config.batch.tokens, dtype))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_cache_layout(mesh)), shapes)
    of_rows = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(mesh, spec("batch")))

    def decode(model, cache, token_B, position_B):
        with jax.named_scope("embed"):
            x_B1D = model.decoder.embed(token_B[:, None])
        with jax.named_scope("decoder"):
            hidden_B1D, cache = model.decoder(x_B1D, position_B[:, None], None, cache)
        with jax.named_scope("loss"):
            return jnp.argmax(model.decoder.logits(hidden_B1D)[:, 0], axis=-1), cache

    return Work(decode, (model, cache, of_rows, of_rows), (1,), model, (), (cache, of_rows, of_rows))


def _cache_layout(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(None, "batch", None, "kv_heads", None))


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
    return config.batch.rows if kind == "train" else config.batch.rows // config.batch.accumulation


def tokens(kind: Kind, config: PretrainConfig) -> int:
    """That one call trains on, scores, reads or writes."""
    return rows_at_once(kind, config) * (1 if kind == "decode" else config.batch.tokens)


def model_flops(kind: Kind, config: PretrainConfig) -> float:
    """Of a call whose slots are all full, by examples as long as they may be; a cache that is full."""
    batch, images, rows = config.batch, config.images, rows_at_once(kind, config)
    if kind == "decode":
        return decoder_flops(config.model.decoder, rows, rows * batch.tokens)
    flops = training_flops(
        config.model,
        tokens=rows * batch.tokens,
        attention_pairs=rows * batch.attention_pairs,
        global_views=rows * batch.global_views,
        crops=rows * batch.crops,
        global_grid=images.global_grid,
        crop_grid=images.crop_grid,
    )
    if kind == "prefill":  # of the output projection, the last token's only
        unused = 2.0 * config.model.decoder.width * config.model.decoder.vocab_size
        return flops / 3 - unused * rows * (batch.tokens - 1)
    return flops if kind == "train" else flops / 3


def num_bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
