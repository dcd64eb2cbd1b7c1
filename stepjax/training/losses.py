"""Next-token cross-entropy, and the token scores for reinforcement learning, without the logits of a whole row.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stepjax.training.linear_cross_entropy import TokenScores, token_loss_sum, token_scores

__all__ = ["TokenScores", "cross_entropy_sum", "next_tokens", "token_loss_sum", "token_scores"]


def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float,
    chunk: int,
) -> tuple[jax.Array, TokenScores]:
    """The sum over tokens of weight * (cross-entropy + z_loss * log_normalizer^2), and the scores for metrics."""
    token_loss = partial(_weighted_cross_entropy, z_loss=z_loss)
    return token_loss_sum(token_loss, hidden_BTD, head_DV, targets_BT, weights_BT, chunk=chunk)


def _weighted_cross_entropy(log_probs, log_normalizers, weights, *, z_loss: float):
    return weights * (z_loss * jnp.square(log_normalizers) - log_probs)


def next_tokens(
    tokens_BT: Int[Array, "B T"], loss_weights_BT: Float[Array, "B T"]
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The target and the weight of every position.

    A token's weight applies to predicting it from the previous position. The first token of every segment has weight 0,
    so rotating by one never predicts across segments, nor a row's first token from its last.
    """
    return jnp.roll(tokens_BT, -1, axis=1), jnp.roll(loss_weights_BT, -1, axis=1)
