"""The device side of reinforcement learning: scores, gradients and updates as pure functions.

Legend: B rows, T tokens. Arrays of a batch are those of `episodes.make_batch`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stepjax.config import OptimizerConfig
from stepjax.models.step_vl import StepVL, abstract_model
from stepjax.models.value_head import Critic
from stepjax.post_training.config import RLConfig, UpdateConfig, warmed
from stepjax.post_training.losses import policy_loss, value_loss, weighted
from stepjax.sharding import is_param, parameter_name
from stepjax.training.losses import token_scores
from stepjax.training.optimizer import make_optimizer, trained_names

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RLState:
    """All that changes from iteration to iteration, except the position among the prompts."""

    step: jax.Array  # int32, iterations done
    model: StepVL
    opt_state: Any
    critic: Any  # a Critic, or None without one
    critic_opt_state: Any


@dataclasses.dataclass(frozen=True)
class Optimizers:
    policy: optax.GradientTransformation
    critic: optax.GradientTransformation | None


def make_critic(config: RLConfig, model: StepVL) -> Any:
    """The critic that goes with a policy at the start of a run; None if the estimator has none."""
    if not config.has_critic:
        return None
    from flax import nnx

    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return Critic(model, shares_trunk=config.critic.trunk == "shared", rngs=nnx.Rngs(key))


def make_optimizers(config: RLConfig) -> Optimizers:
    model = abstract_model(config.model, config.numerics)

    def make(update: UpdateConfig, params: Any, optimizer: Any) -> optax.GradientTransformation:
        return make_optimizer(optimizer, warmed(update, config.iterations, update.steps), params)

    critic: Any = jax.eval_shape(partial(make_critic, config), model)
    if critic is None:
        return Optimizers(make(config.policy, model, config.optimizer), None)
    # Patterns name parameters of the policy.
    plain = dataclasses.replace(config.optimizer, freeze=(), learning_rate_scales=())
    return Optimizers(make(config.policy, model, config.optimizer), make(config.critic.update, critic, plain))


def new_state(model: Any, *, config: RLConfig, optimizers: Optimizers) -> RLState:
    step, opt_state = jnp.zeros((), jnp.int32), optimizers.policy.init(model)
    if optimizers.critic is None:
        return RLState(step, model, opt_state, None, None)
    critic = jax.tree.map(jnp.copy, make_critic(config, model))  # its trunk is a copy
    return RLState(step, model, opt_state, critic, optimizers.critic.init(critic))


def abstract_state(config: RLConfig, optimizers: Optimizers) -> RLState:
    make = partial(new_state, config=config, optimizers=optimizers)
    return jax.eval_shape(make, abstract_model(config.model, config.numerics))


# Forward -------------------------------------------------------------------------------------------------------------


def hidden_states(model: StepVL, batch: Batch) -> jax.Array:
    """Hidden states [B, T, D] of packed rows with shared prompts."""
    names = "tokens", "positions", "segment_ids", "prefix_ids", "feature_index"
    arguments = {f"{name}_BT": batch[f"{name}_BT"] for name in names}
    views = {name: batch[name] for name in ("global_views_BGHWC", "crops_BCHWC")}
    return model(**arguments, **views)


def log_probs(model: StepVL, hidden_BTD: jax.Array, batch: Batch, temperature: float) -> jax.Array:
    """The log-probability of every choice [B, T] at the sampling temperature."""
    scaled_BTD = hidden_BTD if temperature == 1 else (hidden_BTD / temperature).astype(hidden_BTD.dtype)
    targets_BT = jnp.roll(batch["tokens_BT"], -1, axis=1)
    return token_scores(scaled_BTD, model.decoder.head(), targets_BT, chunk=model.numerics.loss_chunk).log_probs_BT


def values(critic: Critic, hidden_BTD: Any, batch: Batch) -> jax.Array:
    """The value of every state [B, T]; `hidden_BTD` are the policy's, for a critic that shares its trunk."""
    if critic.trunk is not None:
        hidden_BTD = hidden_states(critic.trunk, batch)
    return critic.head(hidden_BTD)


def scores(model: StepVL, reference: StepVL | None, critic: Critic | None, batch: Batch, *, temperature: float):
    """What a batch needs before the first update: log-probabilities and values, by the answers' fields."""
    hidden_BTD = hidden_states(model, batch)
    found = {"old_L": log_probs(model, hidden_BTD, batch, temperature)}
    if reference is not None:
        found["reference_L"] = log_probs(reference, hidden_states(reference, batch), batch, temperature)
    if critic is not None:
        found["values_L"] = values(critic, hidden_BTD, batch)
    return found


# Gradients -----------------------------------------------------------------------------------------------------------


def policy_objective(model: StepVL, critic: Critic | None, batch: Batch, *, config: RLConfig, is_first: bool):
    """The policy's loss, with that of a critic that shares its trunk.

    Args:
        critic: None if it has a trunk of its own, or there is none.
        is_first: nothing was updated since the answers were sampled, so the old log-probabilities are these.
    """
    model = without_frozen(model, config.optimizer)
    hidden_BTD = hidden_states(model, batch)
    log_probs_BT = log_probs(model, hidden_BTD, batch, config.rollout.temperature)
    loss_BT, sums = policy_loss(
        log_probs_BT,
        old_BT=jax.lax.stop_gradient(log_probs_BT) if is_first else batch["old_BT"],
        sampler_BT=batch["sampler_BT"],
        reference_BT=batch["reference_BT"],
        advantages_BT=batch["advantages_BT"],
        mask_BT=batch["mask_BT"],
        segment_ids_BT=batch["segment_ids_BT"],
        config=config.loss,
    )
    sums["loss"] = total = weighted(loss_BT, batch["weights_BT"])
    if critic is not None:
        value, value_sums = _value_objective(values(critic, hidden_BTD, batch), batch, config)
        total, sums = total + config.critic.coefficient * value, sums | value_sums
    return total, (sums, log_probs_BT)


def critic_objective(critic: Critic, batch: Batch, *, config: RLConfig):
    return _value_objective(values(critic, None, batch), batch, config)


def _value_objective(values_BT: jax.Array, batch: Batch, config: RLConfig):
    loss_BT, sums = value_loss(
        values_BT,
        old_BT=batch["old_values_BT"],
        returns_BT=batch["returns_BT"],
        mask_BT=batch["mask_BT"],
        clip=config.critic.clip,
    )
    sums["value_loss"] = total = weighted(loss_BT, batch["weights_BT"])
    return total, sums


def apply(
    optimizer: optax.GradientTransformation, params: Any, opt_state: Any, gradients: Any
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """New parameters and optimiser state, and the norms of the gradients and of the update."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(gradients), optax.tree.norm(updates)


def without_frozen(model: StepVL, config: OptimizerConfig) -> StepVL:
    """The model, whose frozen parameters pass on no gradient: what only they need is not computed."""
    trained = trained_names(config, model)

    def kept(path, leaf):
        return leaf if parameter_name(path) in trained else jax.lax.stop_gradient(leaf)

    return jax.tree_util.tree_map_with_path(kept, model, is_leaf=is_param)


class Programs:
    """The compiled functions. Gradients of several calls are added up on the devices."""

    def __init__(self, config: RLConfig, optimizers: Optimizers, options: dict[str, Any] | None = None):
        jit: Callable[..., Any] = partial(jax.jit, compiler_options=options)
        self.scores = jit(partial(scores, temperature=config.rollout.temperature))

        def policy(total, model, critic, batch, is_first):
            objective = partial(policy_objective, config=config, is_first=is_first)
            gradients, aux = jax.grad(objective, (0, 1), has_aux=True)(model, critic, batch)
            return jax.tree.map(jnp.add, total, gradients), aux

        def critic(total, critic, batch):
            gradients, sums = jax.grad(partial(critic_objective, config=config), has_aux=True)(critic, batch)
            return jax.tree.map(jnp.add, total, gradients), sums

        # Not compiled: it would not know how to divide arrays that depend on none.
        self.zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding))
        self.policy = jit(policy, donate_argnums=0, static_argnames="is_first")
        self.critic = jit(critic, donate_argnums=0)
        self.apply_policy = jit(partial(apply, optimizers.policy), donate_argnums=(0, 1))
        if optimizers.critic is not None:
            self.apply_critic = jit(partial(apply, optimizers.critic), donate_argnums=(0, 1))
