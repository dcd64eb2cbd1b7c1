"""AdamW, its learning-rate schedule, and the rules that select parameters by name.

The report (section 2.3) gives AdamW with beta 0.9 / 0.95, eps 1e-8 and weight decay 0.01, and two learning-rate
phases measured in tokens: 900 B tokens from 5e-5 to 1e-5, then 300 B tokens from 1e-5 to 6e-6. Its other figures
disagree: 370 K iterations of 8,192 rows of 4,096 tokens are 12.4 T tokens, ten times the stated 1.2 T (about 36 K such
iterations). We therefore write schedules in tokens, the only unit the report gives for both phases; the number of steps
follows from the batch. The report does not give the decay shape, warm-up and gradient clipping: they are options.

A parameter is named by its path in the model, "/"-separated: "decoder/layers/attention/q/kernel". Stacked layers share
one name. Frozen parameters do not count towards clipping and have no moments.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stepjax.config import OptimizerConfig, ScheduleConfig
from stepjax.errors import ConfigError
from stepjax.sharding import is_param, matching, named_leaves, parameter_name


def learning_rate(config: ScheduleConfig, tokens_per_step: int) -> optax.Schedule:
    """The learning rate as a function of the step (int or int32 scalar -> float32 scalar).

    Step s comes after s * tokens_per_step tokens (row slots, padding included). Within a phase the rate goes from
    `start` to `end` along a half cosine or a line. It jumps if a phase does not start where the previous one ended, and
    stays at the last `end` after the schedule. Warm-up multiplies this curve by tokens / warmup_tokens until that
    reaches 1: step 0 has rate zero, and the curve is not shifted.
    """
    # 1.2e12 tokens overflow an int32, so we convert the boundaries to (fractional) steps in double precision.
    warmup_steps = config.warmup_tokens / tokens_per_step
    lengths = [phase.tokens / tokens_per_step for phase in config.phases]
    firsts = [sum(lengths[:index]) for index in range(len(lengths))]

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rate = jnp.float32(config.phases[-1].end)
        for phase, first, length in reversed(list(zip(config.phases, firsts, lengths, strict=True))):
            fraction = jnp.clip((step - first) / length, 0.0, 1.0)
            remaining = 0.5 * (1.0 + jnp.cos(math.pi * fraction)) if config.decay == "cosine" else 1.0 - fraction
            rate = jnp.where(step < first + length, phase.end + (phase.start - phase.end) * remaining, rate)
        if warmup_steps > 0:
            rate = rate * jnp.minimum(step / warmup_steps, 1.0)
        return rate

    return schedule


def parameter_names(tree: Any) -> list[str]:
    """The names of a pytree's parameters, in tree order. `tree` may be a model, its gradients, or a train state."""
    return list(named_leaves(tree))


def trained_names(config: OptimizerConfig, params_like: Any) -> frozenset[str]:
    """The names of the parameters that `config.freeze` does not match.

    Raises ConfigError if a pattern is malformed or matches nothing, or if no parameter is left to train.
    """
    names = parameter_names(params_like)
    frozen = set[str]()
    for pattern in config.freeze:
        frozen.update(matching(pattern, names, "optimizer.freeze"))
    if frozen.issuperset(names):
        raise ConfigError(f"optimizer.freeze={config.freeze!r}: freezes every parameter; leave something to train")
    return frozenset(names) - frozen


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, params_like: Any) -> optax.GradientTransformation:
    """AdamW over the trained parameters of a model.

    For each trained parameter p with gradient g, all in float32:

        g <- g * min(1, clip_norm / |g|)                 the norm is over all trained parameters together
        p <- p - rate(step) * scale * (adam(g) + weight_decay * p)

    `scale` belongs to the first pattern of `learning_rate_scales` found in the name (re.search), else it is 1. Weight
    decay applies to parameters with two or more axes, including embeddings but not biases, even if their axes are split
    into heads; with `decay_vectors` it applies to all. The leading axis of stacked layers does not count: we look at
    the `axes` metadata of an `nnx.Param`, and at `ndim` only for plain arrays.

    `params_like` is the model or its abstract form. `init` and `update` take trees of the same structure; updates are
    float32, exactly zero for frozen parameters. The state holds dicts from name to moment for trained parameters only;
    a moment keeps its parameter's type and metadata, so one table shards both.

    Raises ConfigError for patterns that are malformed, match nothing or never apply, and for negative values.
    """
    if config.weight_decay < 0:
        raise ConfigError(f"optimizer.weight_decay={config.weight_decay!r}: must not be negative")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ConfigError(f"optimizer.clip_norm={config.clip_norm!r}: must be positive, or None to disable clipping")
    trained = trained_names(config, params_like)
    scales = _scales(config, parameter_names(params_like))
    decayed = {
        name: config.decay_vectors or _is_matrix(name, leaf)
        for name, leaf in named_leaves(params_like).items()
        if name in trained
    }

    def scale_by_name(updates: Any, _: Any) -> Any:
        return {name: jax.tree.map(lambda u, s=scales[name]: u * s, update) for name, update in updates.items()}

    adamw = optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(scale_by_name),
    )

    def select(tree: Any) -> dict[str, Any]:
        return {name: _float32(leaf) for name, leaf in named_leaves(tree).items() if name in trained}

    def init(params: Any) -> optax.OptState:
        return adamw.init(select(params))

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        assert params is not None, "weight decay needs the parameters"
        trained_updates, state = adamw.update(select(updates), state, select(params))
        return _fill(updates, trained_updates), state

    return optax.GradientTransformation(init, update)


def _float32(leaf: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(jnp.float32), leaf)


def _fill(tree: Any, updates: Any) -> Any:
    """`tree` with the leaves named in `updates` replaced, and all others set to float32 zeros."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)
    named = [(parameter_name(path), leaf) for path, leaf in pairs]

    def zeros(leaf: Any) -> Any:
        return jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), leaf)

    return jax.tree.unflatten(treedef, [updates[name] if name in updates else zeros(leaf) for name, leaf in named])


def _is_matrix(name: str, leaf: Any) -> bool:
    """Whether a parameter is a matrix (or kernel, or table) in each layer, not a vector."""
    if name.endswith("bias"):
        return False
    if not is_param(leaf):
        return leaf.ndim >= 2
    axes = leaf.get_metadata().get("axes")
    assert axes is not None, f"{name} of shape {leaf.shape} was made without `axes`"
    return len(axes) >= 2


def _scales(config: OptimizerConfig, names: list[str]) -> dict[str, float]:
    """The learning-rate scale of every name."""
    scales: dict[str, float] = {}
    for pattern, scale in config.learning_rate_scales:
        field = "optimizer.learning_rate_scales"
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(
                f"{field} {pattern!r}: scale {scale!r} must be positive; to freeze parameters, use optimizer.freeze"
            )
        undecided = [name for name in matching(pattern, names, field) if name not in scales]
        if not undecided:
            raise ConfigError(
                f"{field} pattern {pattern!r} never applies: earlier ones match all its names; move it up or remove it"
            )
        scales.update(dict.fromkeys(undecided, scale))
    return {name: scales.get(name, 1.0) for name in names}
