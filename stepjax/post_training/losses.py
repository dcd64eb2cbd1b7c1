"""The losses of reinforcement learning, per token, beside their formulas.

Legend: B rows, T tokens. Entry t of an array belongs to the choice of token t + 1 (as `training.losses.next_tokens`
aligns them). S sequences of a row, by `segment_ids_BT`.

With pi the trained policy, pi_old the policy before this iteration's updates, pi_sampler the probabilities that the
engine reported, pi_ref the model that the run started from, and A the advantage:

    r           = exp(log pi - log pi_old)
    surrogate   = -min(r A, clip(r, 1 - e_low, 1 + e_high) A)                         PPO (1707.06347), eq. 7
    dual clip   : at most c |A| where A < 0                                           1912.09729, eq. 5
    GSPO        : r = exp(mean over the sequence of log pi - log pi_old)              2507.18071, eq. 5
    correction  : surrogate * min(pi_old / pi_sampler, C)                             truncated importance sampling
                  surrogate * [bounds hold] * pi_old / pi_sampler                     masked importance sampling

The loss of a batch is the sum over tokens of weight * loss. The weights say how tokens add up:

    token       1 / tokens of the iteration                                           DAPO (2503.14476), eq. 8
    sequence    1 / (tokens of the answer * answers)                                  GRPO (2402.03300), eq. 3
    constant    1 / (longest answer allowed * answers)                                Dr.GRPO (2503.20783), section 3.2

They are known before the first micro-batch, so the gradient does not depend on how answers are divided into rows,
micro-batches or devices.
"""

import jax
import jax.numpy as jnp

from stepjax.post_training.config import KLForm, PolicyLossConfig

MAX_LOG_RATIO = 20.0  # beyond it exp would overflow, or a divergence be infinite

Sums = dict[str, jax.Array]


def log_ratio(log_probs: jax.Array, others: jax.Array) -> jax.Array:
    """log p - log q, clamped, with the gradient of the clamp."""
    return jnp.clip(log_probs - others, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_mean(values_BT: jax.Array, mask_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Every token's mean over the masked tokens of its sequence; 0 where there are none."""

    def of_row(values_T, mask_T, ids_T):
        totals_S, counts_S = (
            jnp.zeros(len(ids_T) + 1, jnp.float32).at[ids_T].add(x) for x in (values_T * mask_T, mask_T)
        )
        return (totals_S / jnp.maximum(counts_S, 1))[ids_T]

    return jax.vmap(of_row)(values_BT, mask_BT, segment_ids_BT)


def policy_loss(
    log_probs_BT: jax.Array,
    *,
    old_BT: jax.Array,
    sampler_BT: jax.Array,
    reference_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    segment_ids_BT: jax.Array,
    config: PolicyLossConfig,
) -> tuple[jax.Array, Sums]:
    """The loss of every token [B, T], and sums over the masked ones for metrics.

    Args:
        log_probs_BT: log pi, at the sampling temperature; the only argument with a gradient.
        mask_BT: 1 for sampled tokens, else 0. The other arrays may hold anything finite elsewhere.
    """
    difference_BT = log_ratio(log_probs_BT, old_BT)
    if config.ratio == "sequence":
        difference_BT = sequence_mean(difference_BT, mask_BT, segment_ids_BT)
    ratio_BT = jnp.exp(difference_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - config.clip_low, 1 + config.clip_high)
    surrogate_BT = -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    if config.dual_clip is not None:
        bound_BT = config.dual_clip * jnp.abs(advantages_BT)
        surrogate_BT = jnp.where(advantages_BT < 0, jnp.minimum(surrogate_BT, bound_BT), surrogate_BT)
    correction_BT = correction(old_BT, sampler_BT, config)
    loss_BT = correction_BT * surrogate_BT
    if config.kl:
        loss_BT += config.kl * kl_loss(log_probs_BT, old_BT, reference_BT, config.kl_form)
    if config.entropy:
        loss_BT -= config.entropy * entropy_bonus(log_probs_BT, old_BT)

    is_clipped_BT = jnp.where(advantages_BT > 0, ratio_BT > 1 + config.clip_high, ratio_BT < 1 - config.clip_low)
    against_reference_BT = log_ratio(reference_BT, log_probs_BT)
    sums = {
        "tokens": mask_BT,
        "clipped": is_clipped_BT & (advantages_BT != 0),
        "kl_old": -difference_BT,
        "kl_reference": jnp.exp(against_reference_BT) - 1 - against_reference_BT,  # k3: low variance, never negative
        "correction": correction_BT,
    }
    return loss_BT, {name: jnp.sum(value_BT * mask_BT) for name, value_BT in sums.items()}


def correction(old_BT: jax.Array, sampler_BT: jax.Array, config: PolicyLossConfig) -> jax.Array:
    """The weight pi_old / pi_sampler of every token, bounded; it has no gradient.

    Source: spec of truncated importance sampling in STEP3-VL's report (C = 8); masked: IcePop.
    """
    if config.correction == "none":
        return jnp.ones_like(old_BT)
    ratio_BT = jax.lax.stop_gradient(jnp.exp(log_ratio(old_BT, sampler_BT)))
    low, high = config.correction_bounds
    if config.correction == "truncate":
        return jnp.minimum(ratio_BT, high)
    return jnp.where((ratio_BT >= low) & (ratio_BT <= high), ratio_BT, 0.0)


def kl_loss(log_probs_BT: jax.Array, old_BT: jax.Array, reference_BT: jax.Array, form: KLForm) -> jax.Array:
    """A loss whose gradient pulls pi towards pi_ref. With d = log pi - log pi_ref, on tokens drawn from pi_old:

        k1          d                       its gradient vanishes in expectation: of use in a reward only
        k2          d^2 / 2                 the gradient of KL(pi, pi_ref), on-policy only
        k3          exp(-d) - 1 + d         the gradient of KL(pi_ref, pi)
        unbiased    w d log pi              w = pi / pi_old and d without gradients: that of KL(pi, pi_ref) in general

    Source: Schulman, "Approximating KL divergence" (2020) for k1 to k3.
    """
    d_BT = log_ratio(log_probs_BT, reference_BT)
    match form:
        case "k1":
            return d_BT
        case "k2":
            return jnp.square(d_BT) / 2
        case "k3":
            return jnp.exp(-d_BT) - 1 + d_BT
        case "unbiased":
            weight_BT = jnp.exp(log_ratio(log_probs_BT, old_BT))
            return jax.lax.stop_gradient(weight_BT * d_BT) * log_probs_BT


def entropy_bonus(log_probs_BT: jax.Array, old_BT: jax.Array) -> jax.Array:
    """A term whose gradient is that of the policy's entropy, from the sampled tokens alone.

    The gradient of the entropy is the mean under pi of -log pi grad log pi; tokens drawn from pi_old are weighted by
    pi / pi_old. No distribution over the vocabulary is needed.
    """
    weight_BT = jnp.exp(log_ratio(log_probs_BT, old_BT))
    return jax.lax.stop_gradient(-weight_BT * log_probs_BT) * log_probs_BT


def value_loss(
    values_BT: jax.Array, *, old_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array, clip: float | None
) -> tuple[jax.Array, Sums]:
    """max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2 of every token [B, T], and sums for metrics.

    Source: PPO's reference implementation; e is 0.5 in verl and 0.2 in Open-Reasoner-Zero.
    """
    error_BT = jnp.square(values_BT - returns_BT)
    loss_BT = error_BT
    if clip is not None:
        near_BT = jnp.clip(values_BT, old_BT - clip, old_BT + clip)
        loss_BT = jnp.maximum(error_BT, jnp.square(near_BT - returns_BT))
    sums = {"value_error": jnp.sum(error_BT * mask_BT), "value_clipped": jnp.sum((loss_BT > error_BT) * mask_BT)}
    return loss_BT / 2, sums


def weighted(loss_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The sum of weight * loss; where the weight is 0 the loss may be anything, even NaN, and has no gradient."""
    return jnp.sum(weights_BT * jnp.where(weights_BT != 0, loss_BT, 0.0))
