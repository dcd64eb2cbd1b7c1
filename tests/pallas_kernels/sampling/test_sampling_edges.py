"""Rows with nothing to draw, broken rows, the ends of every parameter's range, and refused arguments."""

import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import by_reference, rows, tpu, xla

from pallas_kernels.checks import ArgumentError
from pallas_kernels.sampling import sample

BATCH, VOCAB = 16, 1500
BOTH = pytest.mark.parametrize("draw", (xla, tpu, by_reference), ids=("xla", "tpu", "reference"))


def call(draw, logits_BV, arguments):
    return draw(logits_BV, arguments) if draw is by_reference else draw(logits_BV, **arguments)


@pytest.fixture
def logits_BV():
    return jnp.asarray(3 * np.random.default_rng(0).standard_normal((BATCH, VOCAB)), jnp.float32)


@BOTH
@pytest.mark.parametrize(
    "greedy", ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-30})
)
def test_greedy_takes_the_first_of_the_most_likely(draw, greedy, logits_BV):
    logits_BV = logits_BV.at[3, 1300].set(50.0).at[3, 44].set(50.0)
    got = call(draw, logits_BV, rows(BATCH, **greedy))
    want_B = np.asarray(jnp.argmax(logits_BV, axis=1))
    tied = greedy.keys() <= {"min_p"} or greedy.get("temperature") == 1e-30  # these keep both of the tied ones
    same_B = np.asarray(got.tokens_B) == want_B
    assert same_B[np.arange(BATCH) != 3].all() and int(got.tokens_B[3]) in ({44, 1300} if tied else {44})
    want_log_probs_B = np.where((np.arange(BATCH) == 3) & tied, np.log(0.5), 0.0)
    np.testing.assert_allclose(got.sampling_log_probs_B, want_log_probs_B, atol=1e-6)


@BOTH
def test_values_that_are_off(draw, logits_BV):
    """Off is off at every value documented as such: the tokens are those of a row without filters."""
    plain = call(draw, logits_BV, rows(BATCH))
    for off in ({"top_k": -1}, {"top_k": VOCAB}, {"top_k": 2**31 - 1}, {"top_p": 1.0, "min_p": 0.0}):
        np.testing.assert_array_equal(call(draw, logits_BV, rows(BATCH, **off)).tokens_B, plain.tokens_B)


@BOTH
def test_no_token_to_draw(draw, logits_BV):
    """-1 and -inf where all logits are -inf, and the other rows as ever."""
    logits_BV = logits_BV.at[5].set(-jnp.inf)
    got = call(draw, logits_BV, rows(BATCH, top_p=[1.0, 0.9] * 8, top_k=[0] * 4 + [20] * 12))
    none_B = np.arange(BATCH) == 5
    np.testing.assert_array_equal(np.asarray(got.tokens_B) == -1, none_B)
    np.testing.assert_array_equal(np.isneginf(got.log_probs_B), none_B)
    np.testing.assert_array_equal(np.isneginf(got.sampling_log_probs_B), none_B)
    assert not np.isnan(got.log_probs_B).any() and not np.isnan(got.sampling_log_probs_B).any()


@BOTH
def test_broken_rows_say_so(draw, logits_BV):
    """A NaN or +inf logit, or a parameter out of range: token -1 and NaN, in that row alone."""
    logits_BV = logits_BV.at[1, 3].set(jnp.nan).at[2, 7].set(jnp.nan).at[3, 1499].set(jnp.inf)
    arguments = rows(BATCH, top_k=[30, 0] * 8)
    for i, (name, value) in enumerate(
        [
            ("temperature_B", -1.0),
            ("temperature_B", np.nan),
            ("temperature_B", np.inf),
            ("top_p_B", 1.5),
            ("top_p_B", -0.1),
            ("top_p_B", np.nan),
            ("min_p_B", 1.1),
            ("min_p_B", np.nan),
        ]
    ):
        arguments[name] = arguments[name].at[5 + i].set(value)
    got = call(draw, logits_BV, arguments)
    broken_B = np.isin(np.arange(BATCH), [1, 2, 3, *range(5, 13)])
    np.testing.assert_array_equal(np.asarray(got.tokens_B) == -1, broken_B)
    np.testing.assert_array_equal(np.isnan(got.log_probs_B), broken_B)
    np.testing.assert_array_equal(np.isnan(got.sampling_log_probs_B), broken_B)


@BOTH
def test_one_token_that_can_be_drawn_is_drawn(draw, logits_BV):
    only_B = np.linspace(0, VOCAB - 1, BATCH).astype(int)
    logits_BV = jnp.where(np.arange(VOCAB) == only_B[:, None], logits_BV, -jnp.inf)
    got = call(draw, logits_BV, rows(BATCH, top_k=[0, 40] * 8, top_p=[1.0, 1.0, 0.5, 0.5] * 4))
    np.testing.assert_array_equal(got.tokens_B, only_B)
    np.testing.assert_array_equal(got.sampling_log_probs_B, 0)
    np.testing.assert_array_equal(got.log_probs_B, 0)


@BOTH
def test_extreme_logits(draw):
    """Differences beyond float32's range, and logits that are all alike."""
    logits_BV = jnp.zeros((BATCH, VOCAB)).at[::2, 9].set(3e38).at[::2, 10:].set(-3e38)
    got = call(draw, logits_BV, rows(BATCH, top_p=0.9))
    assert (got.tokens_B[::2] == 9).all() and (got.tokens_B[1::2] < 1350).all()
    np.testing.assert_allclose(got.sampling_log_probs_B[1::2], -np.log(1350), rtol=1e-6)


@pytest.mark.parametrize(
    "name, value, message",
    (
        ("logits_BV", jnp.zeros(5), r"logits_BV has shape \(5,\)"),
        ("logits_BV", jnp.zeros((4, 9), jnp.float16), "logits_BV is float16; cast it to one of float32"),
        ("logits_BV", jnp.zeros((0, 9)), "logits_BV has no rows"),
        ("logits_BV", jnp.zeros((4, 0)), "vocabulary of 0"),
        ("seeds_B2", jnp.zeros((4, 2), jnp.int32), "seeds_B2 is int32; cast it to one of uint32"),
        ("seeds_B2", jnp.zeros(4, jnp.uint32), r"seeds_B2 has shape \(4,\)"),
        ("positions_B", jnp.zeros(3, jnp.int32), r"positions_B has shape \(3,\)"),
        ("temperature_B", jnp.zeros(4, jnp.int32), "temperature_B is int32"),
        ("top_k_B", jnp.zeros(4), "top_k_B is float32"),
        ("top_p_B", jnp.zeros((4, 1)), r"top_p_B has shape \(4, 1\)"),
        ("min_p_B", jnp.zeros(4, jnp.bfloat16), "min_p_B is bfloat16"),
        ("implementation", "gpu", "implementation is 'gpu'; choose one of 'xla', 'tpu'"),
        ("interpret", True, "interpret is True"),
    ),
)
def test_refused_arguments(name, value, message):
    arguments = {"logits_BV": jnp.zeros((4, 9)), **rows(4), name: value}
    with pytest.raises(ArgumentError, match=message):
        sample(arguments.pop("logits_BV"), **arguments)
