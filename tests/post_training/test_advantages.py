"""Advantages by hand. T tokens of an answer."""

from typing import Any

import numpy as np
import pytest

from stepjax.post_training.advantages import (
    gae,
    group_advantages,
    is_mixed,
    moments,
    overlong_penalty,
    token_weights,
    whitened,
)
from stepjax.post_training.config import AdvantageConfig


def test_without_values_every_token_gets_the_reward():
    """Complaint 1: the last one, too, and the reward is not rounded."""
    advantages_T, returns_T = gae(0.37, np.zeros(5), np.ones(5, bool))
    np.testing.assert_array_equal(advantages_T, np.full(5, 0.37))
    np.testing.assert_array_equal(returns_T, np.full(5, 0.37))


def test_undiscounted_advantages_are_the_reward_less_the_value():
    values_T = np.array([0.1, -0.4, 0.9])
    advantages_T, returns_T = gae(1.0, values_T, np.ones(3, bool))
    np.testing.assert_allclose(advantages_T, 1 - values_T)
    np.testing.assert_allclose(returns_T, 1)


def test_discounted_advantages_are_the_sum_of_the_paper():
    """Equation 16: A_t = sum over k of (gamma lambda)^k delta_t+k."""
    values_T, gamma, lam, reward = np.array([0.3, 0.1, 0.8, -0.2]), 0.9, 0.8, 2.0
    following_T, rewards_T = np.append(values_T[1:], 0), np.array([0, 0, 0, reward])
    deltas_T = rewards_T + gamma * following_T - values_T
    wanted_T = [sum((gamma * lam) ** k * deltas_T[t + k] for k in range(4 - t)) for t in range(4)]
    advantages_T, returns_T = gae(reward, values_T, np.ones(4, bool), gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages_T, wanted_T)
    np.testing.assert_allclose(returns_T, wanted_T + values_T)


def test_inserted_tokens_change_no_advantage():
    """Complaint 10: a tool's output, with values of 100, between two sampled parts."""
    values_T, options = np.array([0.3, 0.1, 0.8, -0.2]), dict(gamma=0.9, lam=0.8)
    plain_T, _ = gae(1.0, values_T, np.ones(4, bool), **options)
    mask_T = np.array([1, 1, 0, 0, 0, 1, 1, 0], bool)
    with_tool_T = np.full(8, 100.0)
    with_tool_T[mask_T] = values_T
    advantages_T, returns_T = gae(1.0, with_tool_T, mask_T, **options)
    np.testing.assert_allclose(advantages_T[mask_T], plain_T)
    assert not advantages_T[~mask_T].any() and not returns_T[~mask_T].any()


def test_answer_without_tokens_has_no_advantages():
    advantages_T, returns_T = gae(1.0, np.zeros(0), np.zeros(0, bool))
    assert len(advantages_T) == len(returns_T) == 0


def test_grpo_compares_an_answer_with_its_group():
    config = AdvantageConfig(estimator="grpo")
    rewards = [0.0, 1.0, 1.0, 0.5]
    wanted = (np.array(rewards) - np.mean(rewards)) / np.std(rewards)
    np.testing.assert_allclose(group_advantages(rewards, config), wanted)
    plain = AdvantageConfig(estimator="grpo", divide_by_std=False)
    np.testing.assert_allclose(group_advantages(rewards, plain), np.array(rewards) - np.mean(rewards))


def test_rloo_compares_an_answer_with_the_others():
    rewards = [0.0, 1.0, 0.4]
    wanted = [0 - 0.7, 1 - 0.2, 0.4 - 0.5]
    np.testing.assert_allclose(group_advantages(rewards, AdvantageConfig(estimator="rloo")), wanted)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("rewards", [[0.7], [], [1.0, 1.0, 1.0]])
def test_group_that_teaches_nothing_has_advantage_zero(estimator, rewards):
    """Complaint 18: a group of one must not divide by a deviation of 0."""
    assert not group_advantages(rewards, AdvantageConfig(estimator=estimator)).any()


def test_filter_keeps_groups_that_are_neither_all_right_nor_all_wrong():
    assert is_mixed([0.0, 1.0]) and is_mixed([0.0, None, 1.0])
    assert not any(map(is_mixed, ([0.0, 0.0], [1.0, 1.0], [1.0, None], [None, None], [])))


def test_overlong_penalty_is_linear():
    config = AdvantageConfig(overlong="penalty", overlong_tokens=4)
    assert [overlong_penalty(n, 10, config) for n in (1, 6, 7, 8, 10)] == [0, 0, -0.25, -0.5, -1]
    assert overlong_penalty(10, 10, AdvantageConfig()) == 0


def test_whitening_covers_masked_tokens_of_all_answers():
    rng = np.random.default_rng(0)
    advantages = [rng.standard_normal(n) * 3 + 1 for n in (4, 9, 1)]
    masks = [rng.random(len(each)) < 0.7 for each in advantages]
    totals = moments(advantages, masks)
    done = [whitened(each, mask, totals, 0.01) for each, mask in zip(advantages, masks, strict=True)]
    all_masked = np.concatenate([each[mask] for each, mask in zip(done, masks, strict=True)])
    assert abs(all_masked.mean()) < 1e-12 and abs(all_masked.std() - 1) < 1e-12
    assert not any(each[~mask].any() for each, mask in zip(done, masks, strict=True))


def test_whitening_does_not_blow_up_equal_advantages():
    advantages_T, mask_T = np.array([0.5, 0.5 + 1e-6]), np.ones(2, bool)
    done_T = whitened(advantages_T, mask_T, moments([advantages_T], [mask_T]), 0.01)
    assert np.abs(done_T).max() < 1e-3


def test_weights_add_up_as_the_papers_say():
    """Two answers of 2 and 6 tokens, one of which was inserted."""
    short_T, long_T = np.ones(2, bool), np.array([1, 1, 0, 1, 1, 1], bool)
    options: dict[str, Any] = dict(tokens=7.0, answers=2.0, longest=10)
    by_token = [token_weights(mask, "token", **options) for mask in (short_T, long_T)]
    np.testing.assert_allclose(by_token[0], 1 / 7)
    np.testing.assert_allclose(by_token[1], long_T / 7)
    by_sequence = [token_weights(mask, "sequence", **options).sum() for mask in (short_T, long_T)]
    np.testing.assert_allclose(by_sequence, 0.5)
    constant = [token_weights(mask, "constant", **options).sum() for mask in (short_T, long_T)]
    np.testing.assert_allclose(constant, [2 / 20, 5 / 20])
