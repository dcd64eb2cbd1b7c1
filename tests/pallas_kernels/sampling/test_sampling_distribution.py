"""Tokens come out as often as they should, and the test would notice if they did not."""

import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import kept_probabilities, rows, xla
from scipy import stats

DRAWS = 2000
# The kernel draws the same tokens as this implementation: test_sampling_values.py.
CASES = (
    {"temperature": 0.6},
    {"temperature": 1.8, "top_k": 12},
    {"top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
)


def logits(vocab_size=60):
    return (1.5 * np.random.default_rng(3).standard_normal(vocab_size)).astype(np.float32)


def counts(logits_V, **parameters):
    """How often each token is drawn, by DRAWS rows that differ in seed and position only."""
    arguments = rows(DRAWS, seed=1, **parameters)
    tokens = xla(jnp.broadcast_to(jnp.asarray(logits_V), (DRAWS, len(logits_V))), **arguments).tokens_B
    return np.bincount(tokens, minlength=len(logits_V))


def p_value(count_V, probability_V):
    """Of a chi-square test; tokens expected fewer than five times are taken together."""
    expected_V = DRAWS * probability_V
    assert count_V[probability_V == 0].sum() == 0
    rare = expected_V < 5
    observed = np.append(count_V[~rare], count_V[rare].sum())
    expected = np.append(expected_V[~rare], expected_V[rare].sum())
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
def test_frequencies(case):
    assert p_value(counts(logits(), **case), kept_probabilities(logits(), **case)) > 1e-3


def test_would_notice_a_temperature_off_by_a_fifth():
    count_V = counts(logits(), temperature=1.2)
    assert p_value(count_V, kept_probabilities(logits(), temperature=1.2)) > 1e-3
    assert p_value(count_V, kept_probabilities(logits())) < 1e-3


@pytest.mark.parametrize("successive", ("seeds", "positions"))
def test_successive_seeds_and_positions_are_independent(successive):
    """One request's positions, and one position's requests, are as random as any."""
    numbers = {"seeds": np.full(DRAWS, 7), "positions": np.full(DRAWS, 7)} | {successive: np.arange(DRAWS)}
    seeds_B2 = np.stack([numbers["seeds"], np.zeros(DRAWS)], axis=1)
    arguments = rows(DRAWS) | {
        "seeds_B2": jnp.asarray(seeds_B2, jnp.uint32),
        "positions_B": jnp.asarray(numbers["positions"], jnp.int32),
    }
    tokens = np.asarray(xla(jnp.zeros((DRAWS, 8)), **arguments).tokens_B)
    pairs = np.bincount(8 * tokens[:-1] + tokens[1:], minlength=64)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_tokens_of_a_large_vocabulary_are_all_in_reach():
    """The draw is uniform over 40,000 equal tokens, by sixteenths, and finer than that."""
    tokens = np.asarray(xla(jnp.zeros((256, 40_000)), **rows(256)).tokens_B)
    assert stats.chisquare(np.bincount(tokens * 16 // 40_000, minlength=16)).pvalue > 1e-3
    assert len(np.unique(tokens)) > 245
