"""The operation on one device's tokens, a chunk of them at a time; XLA compiles it for every platform.

Legend: B rows, T tokens of a row, N = B * T, C tokens of a chunk, D width, V vocabulary (this device's part of it).

With p = softmax(logits) and a loss that is a sum over tokens of f(log p[target], log Z),

    d loss / d logits = f1 * (onehot(target) - p) + f2 * p        f1, f2 the derivatives of f

so the gradient of a token's logits is known as soon as its row is normalized, and the logits need not be made a second
time for it: three products of N x D x V where recomputation takes four.

Chunks are of tokens and not of the vocabulary, since a chunk of the vocabulary cannot be normalized before all others
are made. The price is that every chunk reads and writes the kernel's float32 gradient, so few large chunks are faster.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.layout import (
    Layout,
    first_token_id,
    gather_width,
    max_over_vocab,
    sum_over_tokens,
    sum_over_vocab,
)

# (log_probs, log_normalizers, *args) -> losses, elementwise
TokenLoss = Callable[..., jax.Array]


class TokenScores(NamedTuple):
    """What losses, metrics and RL objectives need of the logits; all [B, T], float32."""

    log_probs_BT: jax.Array  # log-probability of the target; NaN for a target outside the vocabulary
    log_normalizers_BT: jax.Array  # logsumexp of the logits, for the z-loss
    correct_BT: jax.Array  # 1 where no token is likelier than the target; not differentiable


class Gradients(NamedTuple):
    """Of the sum of the token losses."""

    hidden_BTD: jax.Array
    kernel_DV: jax.Array
    args_BT: tuple[jax.Array, ...]


class _Row(NamedTuple):
    """A chunk of rows of the softmax, before normalization; C each, but for the last two."""

    top: jax.Array  # largest logit of this device's part of the vocabulary
    total: jax.Array  # sum of exp(logit - top)
    target: jax.Array  # logit of the target, 0 if it is in another part
    is_target: jax.Array  # [C, V]
    exps: jax.Array  # exp(logit - top) in the compute dtype, [C, V]


def scores(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, *, chunk: int, layout: Layout
) -> TokenScores:
    """One product of N x D x V."""
    kernel_DV = gather_width(kernel_DV.astype(hidden_BTD.dtype), layout)

    def score(_, hidden_and_targets):
        hidden_CD, targets_C = hidden_and_targets
        row = _exponentials(hidden_CD, kernel_DV, targets_C, layout)
        return None, _normalize(row, targets_C, kernel_DV.shape[1], layout)[0]

    count, chunks, join = _cut(targets_BT.shape, chunk)
    _, parts = jax.lax.scan(score, None, (chunks(hidden_BTD), chunks(targets_BT)), length=count)
    return jax.tree.map(join, parts)


def loss_and_gradients(
    token_loss: TokenLoss,
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    args_BT: Sequence[jax.Array],
    *,
    chunk: int,
    layout: Layout,
) -> tuple[jax.Array, TokenScores, Gradients]:
    """Sum of the token losses over all devices, scores and gradients; three products of N x D x V."""
    dtype = hidden_BTD.dtype
    whole_kernel_DV = gather_width(kernel_DV.astype(dtype), layout)
    count, chunks, join = _cut(targets_BT.shape, chunk)

    def step(kernel_grad_DV, x):
        # Without the barrier XLA slices the chunk anew inside each of the two products that read it, and does not keep
        # it in vector memory: of 8,192 tokens a fifth of the time on v5p, by the compiler's estimate.
        hidden_CD = jax.lax.optimization_barrier(x[0])
        _, targets_C, valid_C, args_C = x
        row = _exponentials(hidden_CD, whole_kernel_DV, targets_C, layout)
        # One pass over the float32 logits leaves the exponentials in the compute dtype; left to itself XLA takes a pass
        # for each product and forms them again.
        exps_CV, total_C, target_C = jax.lax.optimization_barrier((row.exps, row.total, row.target))
        row = row._replace(exps=exps_CV, total=total_C, target=target_C)
        scores_C, scale_C = _normalize(row, targets_C, whole_kernel_DV.shape[1], layout)

        losses_C, pull = jax.vjp(token_loss, scores_C.log_probs_BT, scores_C.log_normalizers_BT, *args_C)
        f1_C, f2_C, *args_grad_C = (jnp.where(valid_C, g, 0) for g in pull(jnp.ones_like(losses_C)))
        target_grad_C = f1_C + (f2_C - f1_C) * jnp.exp(scores_C.log_probs_BT)
        # Apart from the others: where p is nearly 1, p - 1 would be lost in the rounding of p to the compute dtype.
        logits_grad_CV = jnp.where(
            row.is_target, target_grad_C[:, None], ((f2_C - f1_C) * scale_C)[:, None] * row.exps.astype(jnp.float32)
        ).astype(dtype)
        hidden_grad_CD = _dot("CV,DV->CD", logits_grad_CV, whole_kernel_DV)
        kernel_grad_DV += _dot("CD,CV->DV", hidden_CD, logits_grad_CV)
        return kernel_grad_DV, (scores_C, jnp.where(valid_C, losses_C, 0), hidden_grad_CD, tuple(args_grad_C))

    valid_BT = jnp.ones(targets_BT.shape, bool)
    kernel_grad_DV, (parts, losses, hidden_grad, args_grad) = jax.lax.scan(
        step,
        jnp.zeros(whole_kernel_DV.shape, jnp.float32),
        (chunks(hidden_BTD), chunks(targets_BT), chunks(valid_BT), tuple(map(chunks, args_BT))),
        length=count,
    )
    loss = jnp.sum(losses, dtype=jnp.float32)
    gradients = Gradients(
        hidden_BTD=sum_over_vocab(join(hidden_grad), layout).astype(dtype),
        kernel_DV=sum_over_tokens(kernel_grad_DV, layout).astype(kernel_DV.dtype),
        args_BT=tuple(map(join, args_grad)),
    )
    return jax.lax.psum(loss, layout.tokens) if layout.tokens else loss, jax.tree.map(join, parts), gradients


def _dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _exponentials(hidden_CD: jax.Array, kernel_DV: jax.Array, targets_C: jax.Array, layout: Layout) -> _Row:
    logits_CV = _dot("CD,DV->CV", hidden_CD, kernel_DV)
    ids_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
    # Compared and summed, not gathered: this joins the pass that sums the exponentials.
    is_target_CV = ids_CV == (targets_C - first_token_id(logits_CV.shape[1], layout))[:, None]
    top_C = jnp.max(logits_CV, axis=-1)
    exps_CV = jnp.exp(logits_CV - top_C[:, None])
    target_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    return _Row(top_C, jnp.sum(exps_CV, axis=-1), target_C, is_target_CV, exps_CV.astype(hidden_CD.dtype))


def _normalize(row: _Row, targets_C: jax.Array, vocab_here: int, layout: Layout) -> tuple[TokenScores, jax.Array]:
    """Scores, and what `row.exps` is to be multiplied with to give probabilities."""
    top_C = max_over_vocab(row.top, layout)
    total_C, target_C = sum_over_vocab(jnp.stack([row.total * jnp.exp(row.top - top_C), row.target]), layout)
    log_normalizers_C = top_C + jnp.log(total_C)
    vocab = vocab_here * (jax.lax.axis_size(layout.vocab) if layout.vocab else 1)
    target_C = jnp.where((targets_C >= 0) & (targets_C < vocab), target_C, jnp.nan)
    correct_C = (target_C >= top_C).astype(jnp.float32)
    return TokenScores(target_C - log_normalizers_C, log_normalizers_C, correct_C), jnp.exp(row.top - log_normalizers_C)


def _cut(
    shape: tuple[int, ...], chunk: int
) -> tuple[int, Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """The number of chunks, and how to cut [B, T, ...] into [chunks, C, ...] and to join such an array again.

    Chunks are made equal, so that a length that is no multiple of `chunk` costs hardly any padding.
    """
    rows, length = shape
    total = rows * length
    count = -(-total // chunk)
    size = -(-total // count)
    padding = count * size - total

    def cut(x):
        x = jnp.pad(x.reshape(total, *x.shape[2:]), ((0, padding),) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(count, size, *x.shape[1:])

    def join(x):
        return x.reshape(count * size, *x.shape[2:])[:total].reshape(rows, length, *x.shape[2:])

    return count, cut, join
