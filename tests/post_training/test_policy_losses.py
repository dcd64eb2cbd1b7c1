"""The losses against NumPy written from the formulas, and divergences against exact sums over a softmax.

Legend: B rows, T tokens, A actions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.post_training.config import PolicyLossConfig
from stepjax.post_training.losses import (
    MAX_LOG_RATIO,
    correction,
    entropy_bonus,
    kl_loss,
    policy_loss,
    value_loss,
    weighted,
)

RNG = np.random.default_rng(0)
B, T = 2, 9
SEGMENTS_BT = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 3, 3, 3, 3]])
MASK_BT = np.array([[0, 1, 1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 1, 1, 0]], np.float32)
NEW_BT, OLD_BT, SAMPLER_BT, REFERENCE_BT = (-2 + 0.6 * RNG.standard_normal((4, B, T))).astype(np.float32)
ADVANTAGES_BT = RNG.standard_normal((B, T)).astype(np.float32)


def loss_of(config, new_BT=NEW_BT, **changed):
    arrays = dict(old_BT=OLD_BT, sampler_BT=SAMPLER_BT, reference_BT=REFERENCE_BT, advantages_BT=ADVANTAGES_BT)
    arrays |= dict(mask_BT=MASK_BT, segment_ids_BT=SEGMENTS_BT) | changed
    return policy_loss(jnp.asarray(new_BT), config=config, **{name: jnp.asarray(x) for name, x in arrays.items()})


def expected(config):
    """One token at a time."""
    loss_BT = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        if not MASK_BT[b, t]:
            continue
        own = (SEGMENTS_BT[b] == SEGMENTS_BT[b, t]) & (MASK_BT[b] > 0)
        log_ratio = NEW_BT[b, t] - OLD_BT[b, t]
        if config.ratio == "sequence":
            log_ratio = np.mean(NEW_BT[b, own] - OLD_BT[b, own])
        ratio, advantage = np.exp(log_ratio), ADVANTAGES_BT[b, t]
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        loss = -min(ratio * advantage, clipped * advantage)
        if config.dual_clip is not None and advantage < 0:
            loss = min(loss, config.dual_clip * -advantage)
        weight = np.exp(OLD_BT[b, t] - SAMPLER_BT[b, t])
        low, high = config.correction_bounds
        match config.correction:
            case "truncate":
                loss *= min(weight, high)
            case "mask":
                loss *= weight if low <= weight <= high else 0.0
        d = NEW_BT[b, t] - REFERENCE_BT[b, t]
        forms = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "unbiased": ratio * d * NEW_BT[b, t]}
        loss += config.kl * forms[config.kl_form]
        if config.entropy:
            loss += config.entropy * np.exp(NEW_BT[b, t] - OLD_BT[b, t]) * NEW_BT[b, t] ** 2
        loss_BT[b, t] = loss
    return loss_BT


PLAIN = PolicyLossConfig(correction="none", dual_clip=None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dual_clip": 1.5},
        {"clip_low": 0.1, "clip_high": 0.1},
        {"ratio": "sequence", "clip_low": 3e-2, "clip_high": 4e-2},
        {"correction": "truncate", "correction_bounds": (0.0, 1.2)},
        {"correction": "mask", "correction_bounds": (0.5, 2.0)},
        *({"kl": 0.1, "kl_form": form} for form in ("k1", "k2", "k3", "unbiased")),
        {"entropy": 0.01},
        {"dual_clip": 3.0, "correction": "truncate", "correction_bounds": (0.0, 8.0), "kl": 0.05, "entropy": 0.02},
    ],
    ids=str,
)
def test_every_token_has_the_loss_of_the_formula(changes):
    config = dataclasses.replace(PLAIN, **changes)
    loss_BT, _ = loss_of(config)
    np.testing.assert_allclose(np.asarray(loss_BT) * MASK_BT, expected(config), rtol=2e-5, atol=1e-6)


def test_first_update_has_the_gradient_of_the_policy_gradient():
    """At a ratio of 1 nothing is clipped: the gradient of a token's loss is -A."""
    gradient_BT = jax.grad(lambda new: jnp.sum(loss_of(PLAIN, new, old_BT=NEW_BT)[0] * MASK_BT))(NEW_BT)
    np.testing.assert_allclose(gradient_BT, -ADVANTAGES_BT * MASK_BT, rtol=1e-6)


def test_clipped_tokens_have_no_gradient_and_are_counted():
    new_BT = np.where(ADVANTAGES_BT > 0, OLD_BT + 0.5, OLD_BT - 0.5).astype(np.float32)
    gradient_BT = jax.grad(lambda new: jnp.sum(loss_of(PLAIN, new)[0] * MASK_BT))(new_BT)
    assert not np.asarray(gradient_BT).any()
    sums = loss_of(PLAIN, new_BT)[1]
    assert sums["clipped"] == sums["tokens"] == MASK_BT.sum()


def test_correction_has_no_gradient():
    config = PolicyLossConfig(correction="truncate")
    assert not np.asarray(jax.grad(lambda old: jnp.sum(correction(old, jnp.asarray(SAMPLER_BT), config)))(OLD_BT)).any()


def test_log_ratios_are_clamped_and_nothing_is_infinite():
    """Complaint 18: a token that the other model all but excludes."""
    config = PolicyLossConfig(kl=0.1, kl_form="k3", correction="truncate")
    far = dict(reference_BT=NEW_BT - 1e4, sampler_BT=OLD_BT - 1e4, old_BT=NEW_BT - 1e4)
    loss_BT, sums = loss_of(config, **far)
    assert np.isfinite(loss_BT).all() and all(np.isfinite(value) for value in sums.values())
    far = dict(reference_BT=NEW_BT + 1e4)
    loss_BT, sums = loss_of(config, **far)
    assert np.isfinite(loss_BT).all() and sums["kl_reference"] < np.exp(MAX_LOG_RATIO) * MASK_BT.sum()


def test_weight_zero_excludes_even_a_token_without_a_finite_loss():
    loss_T, weights_T = jnp.array([1.0, jnp.nan, 2.0]), jnp.array([0.5, 0.0, 0.25])
    assert weighted(loss_T, weights_T) == 1.0
    np.testing.assert_array_equal(jax.grad(weighted)(loss_T, weights_T), weights_T)


# Against exact sums over a softmax -----------------------------------------------------------------------------------

LOGITS_A, OLD_A, OTHER_A = (jnp.asarray(x) for x in RNG.standard_normal((3, 5)).astype(np.float32))


def expected_gradient(loss_of_tokens, drawn_from_A):
    """The gradient with respect to the logits, averaged over all actions with the probabilities they are drawn with."""

    def mean_loss(logits_A):
        return jnp.sum(jax.lax.stop_gradient(drawn_from_A) * loss_of_tokens(jax.nn.log_softmax(logits_A)))

    return jax.grad(mean_loss)(LOGITS_A)


def exact_kl(logits_A):
    log_p, log_q = jax.nn.log_softmax(logits_A), jax.nn.log_softmax(OTHER_A)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def exact_reverse_kl(logits_A):
    log_p, log_q = jax.nn.log_softmax(logits_A), jax.nn.log_softmax(OTHER_A)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p))


def exact_entropy(logits_A):
    log_p = jax.nn.log_softmax(logits_A)
    return -jnp.sum(jnp.exp(log_p) * log_p)


@pytest.mark.parametrize(
    "form, is_on_policy, exact",
    [
        ("k1", True, lambda logits: 0.0 * jnp.sum(logits)),
        ("k2", True, exact_kl),
        ("k3", True, exact_reverse_kl),
        ("unbiased", True, exact_kl),
        ("unbiased", False, exact_kl),
    ],
)
def test_divergences_have_the_gradients_that_the_docstring_says(form, is_on_policy, exact):
    old_A = jax.nn.log_softmax(LOGITS_A if is_on_policy else OLD_A)
    reference_A = jax.nn.log_softmax(OTHER_A)
    found = expected_gradient(lambda log_p: kl_loss(log_p, old_A, reference_A, form), jnp.exp(old_A))
    np.testing.assert_allclose(found, jax.grad(exact)(LOGITS_A), atol=2e-6)


def test_k2_is_wrong_off_policy():
    """Why "unbiased" is the default."""
    old_A, reference_A = jax.nn.log_softmax(OLD_A), jax.nn.log_softmax(OTHER_A)
    found = expected_gradient(lambda log_p: kl_loss(log_p, old_A, reference_A, "k2"), jnp.exp(old_A))
    assert np.abs(found - jax.grad(exact_kl)(LOGITS_A)).max() > 0.02


@pytest.mark.parametrize("is_on_policy", [True, False])
def test_entropy_bonus_has_the_gradient_of_the_entropy(is_on_policy):
    old_A = jax.nn.log_softmax(LOGITS_A if is_on_policy else OLD_A)
    found = expected_gradient(lambda log_p: entropy_bonus(log_p, old_A), jnp.exp(old_A))
    np.testing.assert_allclose(found, jax.grad(exact_entropy)(LOGITS_A), atol=2e-6)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_is_the_formula(clip):
    values_BT, old_BT, returns_BT = RNG.standard_normal((3, B, T)).astype(np.float32)
    loss_BT, sums = value_loss(
        jnp.asarray(values_BT), old_BT=old_BT, returns_BT=returns_BT, mask_BT=jnp.asarray(MASK_BT), clip=clip
    )
    error_BT = (values_BT - returns_BT) ** 2
    wanted_BT = error_BT
    if clip is not None:
        wanted_BT = np.maximum(error_BT, (np.clip(values_BT, old_BT - clip, old_BT + clip) - returns_BT) ** 2)
    np.testing.assert_allclose(loss_BT, wanted_BT / 2, rtol=1e-5)
    np.testing.assert_allclose(sums["value_error"], (error_BT * MASK_BT).sum(), rtol=1e-5)
