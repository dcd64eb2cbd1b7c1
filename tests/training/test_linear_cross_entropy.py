"""Scores and gradients against float64 in numpy and against the reference; refusals.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checks import ArgumentError
from stepjax.training.linear_cross_entropy import token_loss_sum, token_scores

B, T, D, V = 2, 13, 8, 50
CHUNKS = [1, 4, 5, 13, 26, 100]  # of 26 tokens: single ones, with and without padding, of two rows, all


def random_case(scale: float = 1.0, dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head_DV = jnp.asarray(scale * rng.normal(size=(D, V)), dtype)
    return hidden_BTD, head_DV, jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32)


def cotangents() -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.asarray(np.random.default_rng(1).normal(size=(2, B, T)), jnp.float32))


def float64_scores(hidden_BTD: Any, head_DV: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, T, V] and log-normalizers [B, T]."""
    logits_BTV = np.asarray(hidden_BTD, np.float64) @ np.asarray(head_DV, np.float64)
    top_BT1 = logits_BTV.max(-1, keepdims=True)
    normalizers_BT1 = top_BT1 + np.log(np.exp(logits_BTV - top_BT1).sum(-1, keepdims=True))
    return logits_BTV - normalizers_BT1, normalizers_BT1[..., 0]


def float64_gradients(hidden_BTD, head_DV, targets_BT, f1_BT, f2_BT) -> tuple[np.ndarray, np.ndarray]:
    """Of sum(f1 * log_probs + f2 * log_normalizers)."""
    log_probs_BTV, _ = float64_scores(hidden_BTD, head_DV)
    f1_BT1, f2_BT1 = (np.asarray(f, np.float64)[..., None] for f in (f1_BT, f2_BT))
    logits_grad_BTV = f1_BT1 * np.eye(head_DV.shape[1])[targets_BT] + (f2_BT1 - f1_BT1) * np.exp(log_probs_BTV)
    hidden_grad_BTD = logits_grad_BTV @ np.asarray(head_DV, np.float64).T
    return hidden_grad_BTD, np.einsum("BTD,BTV->DV", np.asarray(hidden_BTD, np.float64), logits_grad_BTV)


def reference_scores(hidden_BTD, head_DV, targets_BT) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, log-normalizers, and 1 where no token is likelier: all logits at once, in float32."""
    hidden_BTD, head_DV = hidden_BTD.astype(jnp.float32), head_DV.astype(jnp.float32)
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, precision="highest")
    log_normalizers_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    likeliest_BT = target_BT >= jnp.max(logits_BTV, axis=-1)
    return target_BT - log_normalizers_BT, log_normalizers_BT, likeliest_BT.astype(jnp.float32)


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal to `tolerance` of the largest entry."""
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * largest)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_scores_are_those_of_a_float64_softmax(chunk, scale):
    hidden_BTD, head_DV, targets_BT = random_case(scale)
    scores = token_scores(hidden_BTD, head_DV, targets_BT, chunk=chunk)
    log_probs_BTV, normalizers_BT = float64_scores(hidden_BTD, head_DV)
    expected_BT = np.take_along_axis(log_probs_BTV, np.asarray(targets_BT)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_probs_BT, expected_BT, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(scores.log_normalizers_BT, normalizers_BT, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_array_equal(scores.correct_BT, log_probs_BTV.argmax(-1) == targets_BT)
    assert all(x.shape == (B, T) and x.dtype == jnp.float32 for x in scores)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_those_of_the_reference(dtype):
    """Products of bfloat16 are exact in float32, so that only the order of summation differs."""
    case = random_case(2.0, dtype)
    for actual, expected in zip(token_scores(*case, chunk=4), reference_scores(*case), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_log_probs_are_log_softmax_at_the_target():
    hidden_BTD, head_DV, targets_BT = random_case()
    log_probs_BTV = jax.nn.log_softmax(hidden_BTD @ head_DV)
    expected_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    actual_BT = token_scores(hidden_BTD, head_DV, targets_BT, chunk=7).log_probs_BT
    np.testing.assert_allclose(actual_BT, expected_BT, rtol=1e-6, atol=1e-6)


def test_correct_is_one_where_no_token_is_likelier():
    hidden_BTD, head_DV, _ = random_case()
    best_BT = jnp.argmax(hidden_BTD @ head_DV, axis=-1).astype(jnp.int32)
    assert np.all(token_scores(hidden_BTD, head_DV, best_BT, chunk=4).correct_BT == 1)
    assert np.all(token_scores(hidden_BTD, head_DV, (best_BT + 1) % V, chunk=4).correct_BT == 0)
    twins_DV = head_DV.at[:, :2].set(9 * head_DV[:, :1])  # tied, so both are among the likeliest or neither is
    targets = (jnp.full((B, T), i, jnp.int32) for i in (0, 1))
    one, other = (token_scores(hidden_BTD, twins_DV, targets_BT, chunk=9).correct_BT for targets_BT in targets)
    np.testing.assert_array_equal(one, other)
    assert np.any(one == 1)


@pytest.mark.parametrize("target", [-1, V, -100])
def test_target_outside_the_vocabulary_is_nan_and_spoils_no_other(target):
    hidden_BTD, head_DV, targets_BT = random_case()
    scores = token_scores(hidden_BTD, head_DV, targets_BT.at[1, 3].set(target), chunk=5)
    expected = token_scores(hidden_BTD, head_DV, targets_BT, chunk=5)
    assert np.argwhere(np.isnan(scores.log_probs_BT)).tolist() == [[1, 3]]
    assert scores.correct_BT[1, 3] == 0
    others = np.ones((B, T), bool)
    others[1, 3] = False
    np.testing.assert_array_equal(scores.log_probs_BT[others], expected.log_probs_BT[others])
    np.testing.assert_array_equal(scores.log_normalizers_BT, expected.log_normalizers_BT)


@pytest.mark.parametrize("size", [1e3, 1e15])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_neither_overflow_nor_lose_the_gradient(size, dtype):
    """Logits of +-size: every probability is 0 or 1, whose gradient is known exactly."""
    hidden_BTD = jnp.ones((1, 4, 1), dtype)
    head_DV = jnp.asarray([[-size, size, 0.0, -size]], dtype)
    targets_BT = jnp.asarray([[0, 1, 2, 3]], jnp.int32)
    total, pull = jax.vjp(lambda k: token_scores(hidden_BTD, k, targets_BT, chunk=3).log_probs_BT, head_DV)
    size = float(head_DV[0, 1])  # as rounded
    np.testing.assert_allclose(total, [[-2 * size, 0.0, -size, -2 * size]], rtol=1e-6)
    # Each target adds one to its own column and takes one from the likeliest, the second; they cancel for the second.
    np.testing.assert_array_equal(np.asarray(pull(jnp.ones_like(total))[0], np.float32), [[1, -3, 1, 1]])


# Gradients -----------------------------------------------------------------------------------------------------------


def linear_loss(log_probs, log_normalizers, f1, f2):
    return f1 * log_probs + f2 * log_normalizers


def through_scores(chunk, hidden_BTD, head_DV, targets_BT, f1_BT, f2_BT):
    scores = token_scores(hidden_BTD, head_DV, targets_BT, chunk=chunk)
    return jnp.sum(linear_loss(scores.log_probs_BT, scores.log_normalizers_BT, f1_BT, f2_BT))


def through_sum(chunk, hidden_BTD, head_DV, targets_BT, f1_BT, f2_BT):
    return token_loss_sum(linear_loss, hidden_BTD, head_DV, targets_BT, f1_BT, f2_BT, chunk=chunk)[0]


both_forms = pytest.mark.parametrize("form", [through_scores, through_sum])


@both_forms
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_are_those_of_a_float64_softmax(form, chunk):
    """Through both differentiable outputs, with a cotangent of its own for every token."""
    case, f = random_case(), cotangents()
    actual = jax.grad(partial(form, chunk), argnums=(0, 1))(*case, *f)
    for gradient, expected in zip(actual, float64_gradients(*case, *f), strict=True):
        assert_near(gradient, expected, 1e-5)


@both_forms
@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_gradients_are_within_bfloat16_rounding(form, head_dtype):
    hidden_BTD, head_DV, targets_BT = random_case(dtype=jnp.bfloat16)
    case = hidden_BTD, head_DV.astype(head_dtype), targets_BT
    actual = jax.grad(partial(form, 5), argnums=(0, 1))(*case, *cotangents())
    assert [g.dtype for g in actual] == [jnp.bfloat16, head_dtype]
    for gradient, expected in zip(actual, float64_gradients(*case, *cotangents()), strict=True):
        assert_near(gradient, expected, 2**-7)


def test_head_gradient_is_summed_in_float32():
    """512 equal terms, a token a chunk: in bfloat16 the sum would stop growing at 256 of them."""
    hidden_BTD, targets_BT = jnp.ones((1, 512, 1), jnp.bfloat16), jnp.zeros((1, 512), jnp.int32)
    head_DV = jnp.zeros((1, 2), jnp.bfloat16)
    loss = lambda k: jnp.sum(token_scores(hidden_BTD, k, targets_BT, chunk=1).log_probs_BT)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(head_DV).astype(jnp.float32), [[256.0, -256.0]])


def test_gradient_of_a_confident_token_survives_bfloat16():
    """p = 0.9999: p - 1 is -1e-4, of which a p rounded to bfloat16 would leave nothing."""
    hidden_BTD = jnp.ones((1, 1, 1), jnp.bfloat16)
    head_DV = jnp.asarray([[0.0, 9.25]], jnp.bfloat16)
    loss = lambda k: -token_scores(hidden_BTD, k, jnp.ones((1, 1), jnp.int32), chunk=1).log_probs_BT[0, 0]  # noqa: E731
    expected = 1 / (1 + np.exp(9.25))
    np.testing.assert_allclose(jax.grad(loss)(head_DV).astype(jnp.float32), [[expected, -expected]], rtol=2**-7)


def clipped_objective(log_probs, log_normalizers, former, advantages):
    """PPO's, as RL will use it: not linear in the log-probability, and constant where clipped."""
    ratio = jnp.exp(log_probs - former)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages) + 1e-3 * log_normalizers**2


@pytest.mark.parametrize("chunk", [4, 100])
def test_sum_of_any_token_loss_has_the_value_and_gradients_of_the_reference(chunk):
    hidden_BTD, head_DV, targets_BT = random_case(0.3)
    noise_BT, advantages_BT = cotangents()
    former_BT = reference_scores(hidden_BTD, head_DV, targets_BT)[0] + 0.3 * noise_BT

    def fused(hidden_BTD, head_DV, former_BT, advantages_BT):
        args = hidden_BTD, head_DV, targets_BT, former_BT, advantages_BT
        return 3 * token_loss_sum(clipped_objective, *args, chunk=chunk)[0]  # a cotangent other than 1

    def plain(hidden_BTD, head_DV, former_BT, advantages_BT):
        log_probs_BT, log_normalizers_BT, _ = reference_scores(hidden_BTD, head_DV, targets_BT)
        return 3 * jnp.sum(clipped_objective(log_probs_BT, log_normalizers_BT, former_BT, advantages_BT))

    args = hidden_BTD, head_DV, former_BT, advantages_BT
    (value, actual), (expected_value, expected) = (
        jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*args) for f in (fused, plain)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(fused(*args), expected_value, rtol=1e-5)  # not differentiated: another program
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 1e-5)


@both_forms
def test_token_of_weight_zero_has_no_gradient(form):
    case, (f1_BT, f2_BT) = random_case(), cotangents()
    f1_BT, f2_BT = f1_BT.at[0, 2:5].set(0), f2_BT.at[0, 2:5].set(0)
    hidden_grad_BTD = jax.grad(partial(form, 4))(*case, f1_BT, f2_BT)
    zero_BT = ~np.any(hidden_grad_BTD, axis=-1)
    np.testing.assert_array_equal(zero_BT, f1_BT == 0)
    no_weights = jnp.zeros((B, T))
    for gradient in jax.grad(partial(form, 4), argnums=(0, 1))(*case, no_weights, no_weights):
        assert not np.any(gradient)


def test_padding_of_the_last_chunk_meets_a_loss_that_is_infinite_at_zero():
    """17 tokens in chunks of 5: three padded ones, for which this loss and its gradient are not finite."""

    def loss(log_probs, log_normalizers, weights):
        return log_probs / weights

    hidden_BTD, head_DV, targets_BT = (x[:1] if x.ndim != 2 or x.shape[0] == B else x for x in random_case())
    hidden_BTD, targets_BT = (jnp.concatenate([x, x[:, :4]], axis=1) for x in (hidden_BTD, targets_BT))
    weights_BT = jnp.full((1, 17), 2.0)
    total = lambda h, chunk: token_loss_sum(loss, h, head_DV, targets_BT, weights_BT, chunk=chunk)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(total)(hidden_BTD, 5)
    expected_value, expected = jax.value_and_grad(total)(hidden_BTD, 17)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_near(gradient, expected, 1e-6)


def test_scores_of_the_sum_are_the_scores_and_carry_no_gradient():
    case, f = random_case(), cotangents()

    def total(hidden_BTD):
        loss, scores = token_loss_sum(linear_loss, hidden_BTD, *case[1:], *f, chunk=4)
        return loss + jnp.sum(scores.log_probs_BT), scores

    gradient, scores = jax.grad(total, has_aux=True)(case[0])
    np.testing.assert_array_equal(gradient, jax.grad(partial(through_sum, 4))(*case, *f))
    for a, b in zip(scores, token_scores(*case, chunk=4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_correct_carries_no_gradient():
    case = random_case()
    gradient = jax.grad(lambda h: jnp.sum(token_scores(h, *case[1:], chunk=9).correct_BT))(case[0])
    assert not np.any(gradient)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_BTD": jnp.zeros((T, D))}, r"hidden_BTD has shape \(13, 8\)"),
        ({"hidden_BTD": jnp.zeros((B, 0, D))}, r"hidden_BTD has shape \(2, 0, 8\)"),
        ({"hidden_BTD": jnp.zeros((B, T, D), jnp.float16)}, "hidden_BTD is float16"),
        ({"head_DV": jnp.zeros((V, D))}, r"head_DV has shape \(50, 8\)"),
        ({"head_DV": jnp.zeros((D, 0))}, "empty vocabulary"),
        ({"head_DV": jnp.zeros((D, V), jnp.int8)}, "head_DV is int8"),
        ({"targets_BT": jnp.zeros((B, T + 1), jnp.int32)}, r"targets_BT has shape \(2, 14\)"),
        ({"targets_BT": jnp.zeros((B, T))}, "targets_BT is float32"),
        ({"chunk": 0}, "chunk is 0"),
        ({"chunk": 2.5}, "chunk is 2.5"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = dict(zip(("hidden_BTD", "head_DV", "targets_BT"), random_case(), strict=True)) | {"chunk": 4} | change
    with pytest.raises(ArgumentError, match=message):
        token_scores(**arguments)
    with pytest.raises(ArgumentError, match=message):
        token_loss_sum(lambda log_probs, _: log_probs, **arguments)


@pytest.mark.parametrize(
    "args, message",
    [
        ([jnp.zeros((B, T + 1))], r"args_BT\[0\] has shape \(2, 14\)"),
        ([jnp.zeros((B, T)), jnp.zeros((B, T), jnp.int32)], r"args_BT\[1\] is int32"),
    ],
)
def test_bad_extra_arguments_are_refused_by_name(args, message):
    with pytest.raises(ArgumentError, match=message):
        token_loss_sum(lambda log_probs, *_: log_probs, *random_case(), *args, chunk=4)


@pytest.mark.parametrize("loss", [lambda p, z: jnp.sum(p), lambda p, z: p > z, lambda p, z: (p, z)])
def test_token_loss_that_is_not_one_number_a_token_is_refused(loss):
    with pytest.raises(ArgumentError, match="token_loss returns"):
        token_loss_sum(loss, *random_case(), chunk=4)
