"""Token scores against float64 softmax in numpy, values and gradients, whatever the chunk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.training.losses import next_tokens, token_scores

B, T, D, V = 2, 13, 8, 50


def random_case(seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel_DV = (scale * rng.normal(size=(D, V))).astype(np.float32)
    return hidden_BTD, kernel_DV, rng.integers(0, V, size=(B, T)).astype(np.int32)


def scores_of(hidden_BTD: Any, kernel_DV: Any, targets_BT: Any, chunk: int):
    return token_scores(hidden_BTD, targets_BT, lambda h_BCD: h_BCD @ kernel_DV, chunk=chunk)


def log_softmax_f64(hidden_BTD: np.ndarray, kernel_DV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, T, V] and log-normalizers [B, T]."""
    logits_BTV = hidden_BTD.astype(np.float64) @ kernel_DV.astype(np.float64)
    top_BT1 = logits_BTV.max(-1, keepdims=True)
    normalizers_BT1 = top_BT1 + np.log(np.exp(logits_BTV - top_BT1).sum(-1, keepdims=True))
    return logits_BTV - normalizers_BT1, normalizers_BT1[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_scores_are_those_of_a_float64_softmax(chunk, scale):
    hidden_BTD, kernel_DV, targets_BT = random_case(scale=scale)
    scores = scores_of(hidden_BTD, kernel_DV, targets_BT, chunk)
    log_probs_BTV, normalizers_BT = log_softmax_f64(hidden_BTD, kernel_DV)
    expected_BT = np.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    atol = 1e-5 * scale
    np.testing.assert_allclose(scores.log_probs_BT, expected_BT, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(scores.log_normalizers_BT, normalizers_BT, rtol=1e-5, atol=atol)
    np.testing.assert_array_equal(scores.correct_BT, log_probs_BTV.argmax(-1) == targets_BT)
    assert all(x.shape == (B, T) and x.dtype == jnp.float32 for x in scores)


def test_correct_is_one_where_the_target_is_likeliest():
    hidden_BTD, kernel_DV, _ = random_case()
    best_BT = np.argmax(hidden_BTD @ kernel_DV, axis=-1)
    assert np.all(scores_of(hidden_BTD, kernel_DV, best_BT, 4).correct_BT == 1)
    assert np.all(scores_of(hidden_BTD, kernel_DV, (best_BT + 1) % V, 4).correct_BT == 0)


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_gradients_are_those_of_a_float64_softmax(chunk):
    hidden_BTD, kernel_DV, targets_BT = random_case()
    rng = np.random.default_rng(1)
    weights_BT, z_weights_BT = rng.normal(size=(2, B, T))

    def objective(hidden_BTD, kernel_DV):
        scores = scores_of(hidden_BTD, kernel_DV, targets_BT, chunk)
        return jnp.sum(weights_BT * scores.log_probs_BT) + jnp.sum(z_weights_BT * scores.log_normalizers_BT**2)

    hidden_grad_BTD, kernel_grad_DV = jax.grad(objective, argnums=(0, 1))(jnp.asarray(hidden_BTD), kernel_DV)

    # d log p(target) / d logits = onehot - p, and d log Z / d logits = p.
    log_probs_BTV, normalizers_BT = log_softmax_f64(hidden_BTD, kernel_DV)
    probs_BTV = np.exp(log_probs_BTV)
    logits_grad_BTV = weights_BT[..., None] * (np.eye(V)[targets_BT] - probs_BTV)
    logits_grad_BTV += (2 * z_weights_BT * normalizers_BT)[..., None] * probs_BTV
    expected_hidden = logits_grad_BTV @ kernel_DV.astype(np.float64).T
    expected_kernel = np.einsum("BTD,BTV->DV", hidden_BTD.astype(np.float64), logits_grad_BTV)
    np.testing.assert_allclose(hidden_grad_BTD, expected_hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kernel_grad_DV, expected_kernel, rtol=1e-4, atol=1e-4)


def largest_array(jaxpr: Any) -> int:
    """Entries of the largest array that a computation makes, inner computations included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


def test_logits_of_a_row_never_exist_at_one_time():
    """Forwards and backwards, nothing is larger than the logits of a chunk, or the kernel's gradient."""
    hidden_BTD, kernel_DV, targets_BT = random_case()

    def largest(chunk: int) -> int:
        def loss(hidden_BTD, kernel_DV):
            return -jnp.sum(scores_of(hidden_BTD, kernel_DV, targets_BT, chunk).log_probs_BT)

        return largest_array(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden_BTD, kernel_DV).jaxpr)

    assert largest(4) == max(B * 4 * V, D * V) < largest(T) == B * T * V


# Targets -------------------------------------------------------------------------------------------------------------


def test_targets_are_the_next_tokens_with_their_weights():
    tokens_BT = jnp.array([[10, 11, 12, 20, 21, 0]])
    weights_BT = jnp.array([[0.0, 1.0, 0.5, 0.0, 2.0, 0.0]])
    targets_BT, target_weights_BT = next_tokens(tokens_BT, weights_BT)
    assert targets_BT[0, :5].tolist() == [11, 12, 20, 21, 0]
    assert target_weights_BT[0].tolist() == [1.0, 0.5, 0.0, 2.0, 0.0, 0.0]


def test_nothing_is_predicted_across_segments_nor_around_the_end_of_a_row():
    """For packed examples, whose first tokens weigh nothing; here all others do."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 6, size=8)
        segment_ids_T = np.repeat(np.arange(1, 9), lengths)
        positions_T = np.concatenate([np.arange(n) for n in lengths])
        tokens_T = rng.integers(1, 99, size=lengths.sum())
        targets, weights = next_tokens(jnp.asarray(tokens_T[None]), jnp.asarray(positions_T[None] > 0, jnp.float32))
        predicting = np.flatnonzero(weights[0])
        assert len(predicting) == np.sum(lengths - 1)
        np.testing.assert_array_equal(segment_ids_T[predicting], segment_ids_T[predicting + 1])
        np.testing.assert_array_equal(np.asarray(targets)[0, predicting], tokens_T[predicting + 1])
