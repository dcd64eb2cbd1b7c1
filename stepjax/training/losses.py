"""Next-token cross-entropy without the logits of a whole row.

Legend: B rows, T tokens, D width, V vocabulary, C positions of a chunk.

At 4,096 tokens and 151,936 words the float32 logits of one row are 2.5 GB, so they are made for a few positions at a
time, reduced to three numbers a token, and made again in the backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenScores(NamedTuple):
    """What the loss, its metrics and the RL objectives need of the logits; all [B, T], float32."""

    log_probs_BT: jax.Array  # log-probability of the target
    log_normalizers_BT: jax.Array  # logsumexp of the logits, for the z-loss
    correct_BT: jax.Array  # 1 where the target is the likeliest token


def token_scores(
    hidden_BTD: jax.Array, targets_BT: jax.Array, logits_fn: Callable[[jax.Array], jax.Array], *, chunk: int
) -> TokenScores:
    """Score `targets_BT` under `logits_fn(hidden)`, `chunk` positions of each row at a time.

    `logits_fn` maps [B, C, D] to float32 [B, C, V].
    """
    rows, length, _ = hidden_BTD.shape
    chunk = min(chunk, length)
    padding = -length % chunk

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def score(_, hidden_and_targets):
        hidden_BCD, targets_BC = hidden_and_targets
        logits_BCV = logits_fn(hidden_BCD)
        log_normalizers_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_logits_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        correct_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        scores = target_logits_BC - log_normalizers_BC, log_normalizers_BC, correct_BC.astype(jnp.float32)
        return None, TokenScores(*scores)

    _, scores = jax.lax.scan(score, None, (chunks(hidden_BTD), chunks(targets_BT)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :length], scores)


def next_tokens(tokens_BT: jax.Array, loss_weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The target of every position and its weight.

    The weight of a token is that of predicting it from the position before. The first token of every segment has weight
    0, so that rotating by one never predicts across segments, nor a row's first token from its last.
    """
    return jnp.roll(tokens_BT, -1, axis=1), jnp.roll(loss_weights_BT, -1, axis=1)
