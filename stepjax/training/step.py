"""One optimizer step as a pure function: (state, batch) -> (state, metrics).

Legend: A micro-batches, B rows, T tokens, F features of a row, N features, E experts, D width, X groups (twice the
number of sources: without and with images).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stepjax.config import PretrainConfig, RunConfig
from stepjax.models import lora
from stepjax.models.step_vl import NO_FEATURE, StepVL, abstract_model
from stepjax.tofc.hyperprior import balance_sum
from stepjax.training.losses import cross_entropy_sum, next_tokens

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step except the data position. Holds no keys: they derive from (seed, step)."""

    step: jax.Array  # int32, steps done
    model: Any  # what is trained: a StepVL, or its adapters
    opt_state: Any
    base: Any = None  # the frozen StepVL that the adapters belong to; it is not saved


def new_state(model: Any, optimizer: optax.GradientTransformation, base: Any = None) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), base)


def initial_state(model: StepVL, config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a new run that starts from this model: with new adapters if the run trains those."""
    if config.adapters is None:
        return new_state(model, optimizer)
    return new_state(lora.init_adapters(config.adapters, model, config.seed), optimizer, base=model)


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state with shapes instead of arrays, for restoring checkpoints and for dry runs."""
    make = partial(initial_state, config=config, optimizer=optimizer)
    return jax.eval_shape(make, abstract_model(config.model, config.numerics))


def abstract_trained(config: RunConfig) -> Any:
    """The parameters that `config.optimizer` is for, with shapes instead of arrays: a model, or its adapters."""
    model = abstract_model(config.model, config.numerics)
    adapters = config.adapters
    return model if adapters is None else jax.eval_shape(lambda: lora.init_adapters(adapters, model, config.seed))


def whole_model(state: TrainState, config: RunConfig) -> StepVL:
    """A plain model for inference: the trained one, or a copy of the base with the adapters merged."""
    return state.model if config.adapters is None else lora.merged(config.adapters, state.base, state.model)


def forward(
    model: StepVL, batch: Batch, features_BFD: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states [B, T, D] of packed rows, and the target and weight [B, T] of every position.

    Args:
        features_BFD: the rows' feature tables; None: encode the views.
    """
    if features_BFD is None:
        features_BFD = model.feature_table(batch["global_views_BGHWC"], batch["crops_BCHWC"])
    hidden_BTD = model.hidden(
        features_BFD,
        tokens_BT=batch["tokens_BT"],
        positions_BT=batch["positions_BT"],
        segment_ids_BT=batch["segment_ids_BT"],
        prefix_ids_BT=batch.get("prefix_ids_BT"),
        feature_index_BT=batch["feature_index_BT"],
    )
    return hidden_BTD, *next_tokens(batch["tokens_BT"], batch["loss_weights_BT"])


def loss_sum(
    model: StepVL, batch: Batch, features_BFD: jax.Array | None = None, *, config: PretrainConfig
) -> tuple[jax.Array, Metrics]:
    """Weighted sum of the token losses of a batch, and sums for the metrics. Arguments are as in `forward`.

    Returns:
        The sum over tokens of weight * (cross-entropy + z_loss * log_normalizer^2), and the sums by group [X].
    """
    hidden_BTD, targets_BT, weights_BT = forward(model, batch, features_BFD)
    with jax.named_scope("loss"):
        total, scores = cross_entropy_sum(
            hidden_BTD,
            model.decoder.head(),
            targets_BT,
            weights_BT,
            z_loss=config.loss.z_loss,
            chunk=config.numerics.loss_chunk,
        )
        cross_entropy_BT = -scores.log_probs_BT
        z_BT = jnp.square(scores.log_normalizers_BT)

    def by_group(values_BT):
        num_groups = 2 * len(config.data.sources)
        return jnp.zeros(num_groups, jnp.float32).at[batch["group_BT"]].add(values_BT)

    sums = {
        "loss_X": by_group(weights_BT * cross_entropy_BT),
        "correct_X": by_group(weights_BT * scores.correct_BT),
        "weight_X": by_group(weights_BT),
        "z": jnp.sum(weights_BT * z_BT),
    }
    return total, sums


def loss_share(
    model: StepVL, micro_batch: Batch, batch: Batch, step: jax.Array, *, config: PretrainConfig
) -> tuple[jax.Array, Metrics]:
    """What a micro-batch adds to the loss of its step's `batch`, and sums for the metrics.

    The loss is the weighted mean over the tokens, and with a codec (`config.model.tofc`) also

        rate_weight * bits / (features * channels) + balance_weight * balance        (TOFC, eqs. 16 and 18)

    Each is a sum over rows, divided by what the whole batch has: the result does not depend on the micro-batches.
    """
    total_weight = jnp.maximum(jnp.sum(batch["loss_weights_BT"]), 1e-6)
    tofc = config.model.tofc
    if tofc is None:
        total, sums = loss_sum(model, micro_batch, config=config)
        return total / total_weight, sums
    exists_BF = _features_in_use(micro_batch, config)
    fall = (tofc.last_temperature / tofc.temperature) ** jnp.minimum(2 * step / config.num_steps, 1)
    features_BFD, rate = model.coded_feature_table(
        micro_batch["global_views_BGHWC"], micro_batch["crops_BCHWC"], exists_BF, temperature=tofc.temperature * fall
    )
    total, sums = loss_sum(model, micro_batch, features_BFD, config=config)
    # Every feature of a real view has one token.
    num_features = jnp.maximum(jnp.sum(batch["feature_index_BT"] != NO_FEATURE), 1)
    bits, balance = jnp.sum(rate.bits_N), balance_sum(rate.weights_NE.reshape(*exists_BF.shape, -1))
    share = tofc.rate_weight * bits / tofc.channels + tofc.balance_weight * balance
    sums |= {"bits_per_value": bits / (num_features * tofc.channels), "balance": balance / num_features}
    return total / total_weight + share / num_features, sums


def _features_in_use(batch: Batch, config: PretrainConfig) -> jax.Array:
    """Which entries of the rows' feature tables [B, F] are of real views."""
    images, views, crops = config.images, batch["global_views_BGHWC"].shape[1], batch["crops_BCHWC"].shape[1]
    size = crops * images.crop_tokens + views * images.global_tokens
    index_BT = batch["feature_index_BT"]
    place_BT = jnp.where(index_BT == NO_FEATURE, size, index_BT)
    rows_B1 = jnp.arange(len(index_BT))[:, None]
    return jnp.zeros((len(index_BT), size), bool).at[rows_B1, place_BT].set(True, mode="drop")


def calibrated(state: TrainState, batch: Batch, *, config: PretrainConfig) -> tuple[TrainState, jax.Array]:
    """The state with the codec fitted to the features of its first batch, and their number; to be jitted."""
    exists_BF = _features_in_use(batch, config)
    count = state.model.calibrate(batch["global_views_BGHWC"], batch["crops_BCHWC"], exists_BF)
    return state, count


def make_train_step(
    config: PretrainConfig, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step for this configuration; jit it with the state donated.

    The loss is the weighted mean over all tokens of the step, across micro-batches: accumulation changes the memory,
    not the result.
    """

    def gradients(model: Any, base: Any, batch: Batch, step: jax.Array) -> tuple[Any, Metrics]:
        def share(model, micro_batch):
            whole = model if config.adapters is None else lora.adapted(config.adapters, base, model)
            return loss_share(whole, micro_batch, batch, step, config=config)

        gradient = jax.grad(share, has_aux=True)
        if config.batch.accumulation == 1:
            return gradient(model, batch)

        # Micro-batch i takes rows i, i + A, ...: rows stay on their device, and each device has rows in every one.
        def split(x):
            rows = x.shape[0] // config.batch.accumulation
            return x.reshape(rows, config.batch.accumulation, *x.shape[1:]).swapaxes(0, 1)

        def accumulate(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient(model, micro_batch)), None

        micro_batches = jax.tree.map(split, batch)
        shapes = jax.eval_shape(gradient, model, jax.tree.map(lambda x: x[0], micro_batches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, micro_batches)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        model: Any = state.model  # optax's types do not know that a module is a pytree
        grads, sums = gradients(model, state.base, batch, state.step)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, model)
            new_model: Any = optax.apply_updates(model, updates)
        weight = jnp.maximum(jnp.sum(sums["weight_X"]), 1e-6)
        metrics = {
            "loss": jnp.sum(sums["loss_X"]) / weight,
            "accuracy": jnp.sum(sums["correct_X"]) / weight,
            "z": sums["z"] / weight,
            "loss_X": sums["loss_X"],
            "correct_X": sums["correct_X"],
            "weight_X": sums["weight_X"],
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(model),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        metrics |= {name: sums[name] for name in ("bits_per_value", "balance") if name in sums}
        return TrainState(state.step + 1, new_model, opt_state, state.base), metrics

    return train_step
