"""Next-token cross-entropy and what reinforcement learning needs of it, without the logits of a whole row.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.linear_cross_entropy import (
    Layout,
    TokenLoss,
    TokenScores,
    linear_cross_entropy,
    linear_cross_entropy_sum,
)
from stepjax.sharding import spec


def token_scores(
    hidden_BTD: Float[Array, "B T D"], head_DV: Float[Array, "D V"], targets_BT: Int[Array, "B T"], *, chunk: int
) -> TokenScores:
    """Score `targets_BT` under softmax(hidden @ head), `chunk` tokens of a device at a time.

    Log-probabilities and log-normalizers may be differentiated, with any cotangents.
    """
    return linear_cross_entropy(hidden_BTD, head_DV, targets_BT, chunk=chunk, layout=_layout())


def token_loss_sum(
    token_loss: TokenLoss,
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *args_BT: Shaped[Array, "B T"],
    chunk: int,
) -> tuple[jax.Array, TokenScores]:
    """The sum over tokens of token_loss(log_probs, log_normalizers, *args), and the scores for metrics.

    A quarter cheaper to differentiate than a loss made of `token_scores`; see `linear_cross_entropy_sum`.
    """
    return linear_cross_entropy_sum(
        token_loss, hidden_BTD, head_DV, targets_BT, *args_BT, chunk=chunk, layout=_layout()
    )


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


def _layout() -> Layout | None:
    """How the table of `stepjax.sharding` spreads hidden states and head over the mesh in scope."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spread = (
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in spec("batch", "length", "embed", "vocab")
    )
    rows, length, width, vocab = spread
    return Layout(rows=rows, length=length, width=width, vocab=vocab)


def next_tokens(
    tokens_BT: Int[Array, "B T"], loss_weights_BT: Float[Array, "B T"]
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The target of every position and its weight.

    The weight of a token is that of predicting it from the position before. The first token of every segment has weight
    0, so that rotating by one never predicts across segments, nor a row's first token from its last.
    """
    return jnp.roll(tokens_BT, -1, axis=1), jnp.roll(loss_weights_BT, -1, axis=1)
