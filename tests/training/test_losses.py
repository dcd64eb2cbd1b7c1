"""The losses of training by what they sum, whatever the chunk; and targets that stay within their segment.

The operation beneath has tests of its own, in test_linear_cross_entropy.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.training.losses import cross_entropy_sum, next_tokens, token_loss_sum, token_scores

B, T, D, V = 2, 13, 8, 50


def random_case() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, head, targets and weights."""
    rng = np.random.default_rng(0)
    hidden_BTD, head_DV, weights_BT = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, D), (D, V), (B, T))
    )
    return hidden_BTD, head_DV, jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32), weights_BT


def plain_loss(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss: float) -> jax.Array:
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, precision="highest")
    cross_entropy_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (cross_entropy_BT + z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_cross_entropy_sum_is_the_weighted_loss_with_its_gradients(chunk, z_loss):
    hidden_BTD, head_DV, targets_BT, weights_BT = random_case()

    def loss(hidden_BTD, head_DV):
        return cross_entropy_sum(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss=z_loss, chunk=chunk)[0]

    def plain(hidden_BTD, head_DV):
        return plain_loss(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss)

    (value, gradients), (expected_value, expected) = (
        jax.value_and_grad(f, argnums=(0, 1))(hidden_BTD, head_DV) for f in (loss, plain)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_scores_beside_the_loss_are_the_token_scores():
    hidden_BTD, head_DV, targets_BT, weights_BT = random_case()
    _, beside = cross_entropy_sum(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss=0.1, chunk=5)
    scores = token_scores(hidden_BTD, head_DV, targets_BT, chunk=7)
    log_probs_BTV = jax.nn.log_softmax(hidden_BTD @ head_DV)
    expected_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_probs_BT, expected_BT, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.correct_BT, jnp.argmax(log_probs_BTV, axis=-1) == targets_BT)
    for a, b in zip(beside, scores, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_token_loss_sum_and_a_loss_made_of_the_scores_are_one():
    """Two ways to an objective of log-probabilities, as reinforcement learning has: one value, the same gradients."""
    hidden_BTD, head_DV, targets_BT, advantages_BT = random_case()

    def objective(log_probs, log_normalizers, advantages):
        return jnp.exp(log_probs) * advantages

    def fused(hidden_BTD, head_DV):
        return token_loss_sum(objective, hidden_BTD, head_DV, targets_BT, advantages_BT, chunk=5)[0]

    def by_scores(hidden_BTD, head_DV):
        scores = token_scores(hidden_BTD, head_DV, targets_BT, chunk=5)
        return jnp.sum(objective(scores.log_probs_BT, scores.log_normalizers_BT, advantages_BT))

    results = [jax.value_and_grad(f, argnums=(0, 1))(hidden_BTD, head_DV) for f in (fused, by_scores)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


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
    """Forwards and backwards, nothing is larger than the logits of a chunk, or the head's gradient."""
    hidden_BTD, head_DV, targets_BT, weights_BT = random_case()

    def largest(chunk: int) -> int:
        def loss(hidden_BTD, head_DV):
            return cross_entropy_sum(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss=0.1, chunk=chunk)[0]

        return largest_array(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden_BTD, head_DV).jaxpr)

    assert largest(4) == D * V < largest(13) == 13 * V < largest(B * T) == B * T * V


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
