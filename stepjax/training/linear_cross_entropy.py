"""Output projection and cross-entropy in one: scores and gradients without the logits of a whole row.

Legend: B rows, T tokens of a row, D width, V vocabulary; C tokens of a chunk, N = B * T. On a mesh each device has its
own tokens and its shard of the vocabulary.

At 4,096 tokens and 151,936 words the float32 logits of one row take 2.5 GB. We compute them for one chunk of tokens at
a time and reduce them to three numbers per token. With p = softmax(logits) and a loss that is a sum over tokens of
f(log p[target], log Z),

    d loss / d logits = f1 * (onehot(target) - p) + f2 * p        f1, f2 the derivatives of f

so the gradient of a token's logits is known as soon as its row is normalized, without recomputing the logits: three
products of N x D x V, where recomputation takes four. Computing gradients in the forward pass comes from Liger Kernel
(Hsu et al. 2024, arXiv:2410.10989); sharding the vocabulary over devices comes from Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053).

We chunk the tokens, not the vocabulary: no chunk of the vocabulary can be normalized before all others are computed.
The price is that every chunk reads and writes the head's float32 gradient, so few large chunks are faster.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check, check_dtype, check_shape
from stepjax.sharding import all_gather, axis_index, axis_size, spec

# (log_probs, log_normalizers, *args) -> losses, elementwise
TokenLoss = Callable[..., jax.Array]


class TokenScores(NamedTuple):
    """What losses, metrics and RL objectives need from the logits; all [B, T], float32."""

    log_probs_BT: jax.Array  # log-probability of the target; NaN for a target outside the vocabulary
    log_normalizers_BT: jax.Array  # logsumexp of the logits, for the z-loss
    correct_BT: jax.Array  # 1 where no token is likelier than the target; not differentiable


def token_scores(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, chunk: int) -> TokenScores:
    """Score every target under softmax(hidden @ head), differentiable with any cotangents.

    The backward pass recomputes the logits: four products of N x D x V in all. If the loss is a sum over tokens,
    `token_loss_sum` takes only three.

    Args:
        hidden_BTD: float32 or bfloat16; products use its dtype and accumulate in float32.
        head_DV: float32 or bfloat16. Its gradient accumulates in float32 and has its dtype.
        targets_BT: int32. A target outside [0, V) has log-probability NaN.
        chunk: tokens per device whose logits are in memory at a time: 6 * chunk * V bytes in bfloat16, 8 in float32.

    Returns:
        Log-probabilities and log-normalizers, with gradients, and whether the target is the likeliest token, without.

    Raises:
        ArgumentError: a shape or dtype differs from the above, or is not divisible by the current mesh.
    """
    _check(hidden_BTD, head_DV, targets_BT, chunk)
    scores: Any = _scores(chunk, hidden_BTD, head_DV, targets_BT)
    return scores._replace(correct_BT=jax.lax.stop_gradient(scores.correct_BT))


def token_loss_sum(
    token_loss: TokenLoss,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *args_BT: jax.Array,
    chunk: int,
) -> tuple[jax.Array, TokenScores]:
    """The sum over all tokens of token_loss(log_probs, log_normalizers, *args), and the scores (without gradients).

    The forward pass computes the gradients too, with three products of N x D x V; without differentiation, one.

    Args:
        token_loss: an elementwise function of float32 arrays of equal shape, called with chunks of tokens. It must not
            close over traced arrays: pass them as `args_BT`.
        args_BT: floating-point, such as weights, advantages or old log-probabilities. They get gradients.
        hidden_BTD, head_DV, targets_BT, chunk: as in `token_scores`.

    Raises:
        ArgumentError: as in `token_scores`, or token_loss does not return floating-point losses of its arguments'
            shape.
    """
    _check(hidden_BTD, head_DV, targets_BT, chunk)
    for i, arg_BT in enumerate(args_BT):
        check_shape(f"args_BT[{i}]", arg_BT, targets_BT.shape, "[B, T]")
        check(
            jnp.issubdtype(arg_BT.dtype, jnp.floating),
            f"args_BT[{i}] is {arg_BT.dtype}; cast it to a floating-point dtype",
        )
    float32 = jax.ShapeDtypeStruct(targets_BT.shape, jnp.float32)
    losses: Any = jax.eval_shape(token_loss, float32, float32, *args_BT)
    fits = getattr(losses, "shape", None) == targets_BT.shape and jnp.issubdtype(losses.dtype, jnp.floating)
    check(fits, f"token_loss returns {losses}; it must return one loss per token, {float32}")
    results: Any = _sum(token_loss, chunk, hidden_BTD, head_DV, targets_BT, args_BT)
    loss, scores = results
    return loss, jax.lax.stop_gradient(scores)


def _check(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk: int) -> None:
    check_shape("hidden_BTD", hidden_BTD, (None, None, None), "[B, T, D]")
    rows, length, width = hidden_BTD.shape
    check(
        math.prod(hidden_BTD.shape) > 0, f"hidden_BTD has shape {hidden_BTD.shape}; every dimension must be at least 1"
    )
    check_shape("head_DV", head_DV, (width, None), "[D, V]")
    check(head_DV.shape[1] > 0, "head_DV has an empty vocabulary; V must be at least 1")
    check_shape("targets_BT", targets_BT, (rows, length), "[B, T]")
    check_dtype("hidden_BTD", hidden_BTD, jnp.float32, jnp.bfloat16)
    check_dtype("head_DV", head_DV, jnp.float32, jnp.bfloat16)
    check_dtype("targets_BT", targets_BT, jnp.int32)
    check(isinstance(chunk, int) and chunk > 0, f"chunk is {chunk!r}; it must be a positive number of tokens")
    sizes = {"batch": rows, "length": length, "embed": width, "vocab": head_DV.shape[1]}
    for axis, size in sizes.items():
        parts = axis_size(axis)
        check(size % parts == 0, f"the mesh shards {axis!r} over {parts} devices, and {size} is not divisible by that")


# Differentiated outside shard_map, so the devices communicate only where the code below says so.


class _Gradients(NamedTuple):
    """Gradients of the sum of the token losses."""

    hidden_BTD: Any
    head_DV: Any
    args_BT: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(chunk, hidden_BTD, head_DV, targets_BT):
    compute = partial(_scores_here, chunk)
    if not jax.sharding.get_abstract_mesh().empty:
        in_specs = spec("batch", "length", None), spec("embed", "vocab"), spec("batch", "length")
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=spec("batch", "length"), check_vma=False)
    return compute(hidden_BTD, head_DV, targets_BT)


def _scores_forward(chunk, hidden_BTD, head_DV, targets_BT):
    return _scores(chunk, hidden_BTD, head_DV, targets_BT), (hidden_BTD, head_DV, targets_BT)


def _scores_backward(chunk, inputs, cotangents: TokenScores):
    def inner_product(log_probs, log_normalizers, log_probs_grad, log_normalizers_grad):
        return log_probs * log_probs_grad + log_normalizers * log_normalizers_grad

    args_BT = cotangents.log_probs_BT, cotangents.log_normalizers_BT
    hidden_BTD, head_DV, targets_BT = inputs
    _, _, gradients = _loss_and_gradients(inner_product, chunk, hidden_BTD, head_DV, targets_BT, args_BT)
    return gradients.hidden_BTD, gradients.head_DV, None


_scores.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(token_loss, chunk, hidden_BTD, head_DV, targets_BT, args_BT):
    scores: Any = _scores(chunk, hidden_BTD, head_DV, targets_BT)
    return jnp.sum(token_loss(scores.log_probs_BT, scores.log_normalizers_BT, *args_BT), dtype=jnp.float32), scores


def _sum_forward(token_loss, chunk, hidden_BTD, head_DV, targets_BT, args_BT):
    loss, scores, gradients = _loss_and_gradients(token_loss, chunk, hidden_BTD, head_DV, targets_BT, args_BT)
    return (loss, scores), gradients


def _sum_backward(token_loss, chunk, gradients: _Gradients, cotangents):
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
    return scaled.hidden_BTD, scaled.head_DV, None, scaled.args_BT


_sum.defvjp(_sum_forward, _sum_backward)


def _loss_and_gradients(
    token_loss: TokenLoss, chunk: int, hidden_BTD, head_DV, targets_BT, args_BT
) -> tuple[jax.Array, TokenScores, _Gradients]:
    compute = partial(_loss_and_gradients_here, token_loss, chunk)
    if not jax.sharding.get_abstract_mesh().empty:
        hidden, head, tokens = spec("batch", "length", None), spec("embed", "vocab"), spec("batch", "length")
        out_specs = spec(), tokens, _Gradients(hidden, head, tokens)
        compute = jax.shard_map(compute, in_specs=(hidden, head, tokens, tokens), out_specs=out_specs, check_vma=False)
    return compute(hidden_BTD, head_DV, targets_BT, args_BT)


# On one device -------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A chunk of softmax rows before normalization; shape [C] unless noted."""

    top: jax.Array  # largest logit of this device's vocabulary shard
    total: jax.Array  # sum of exp(logit - top)
    target: jax.Array  # logit of the target, 0 if it is in another shard
    is_target: jax.Array  # [C, V]
    exps: jax.Array  # exp(logit - top) in the compute dtype, [C, V]


def _scores_here(chunk: int, hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array) -> TokenScores:
    """One product of N x D x V."""
    head_DV = all_gather(head_DV.astype(hidden_BTD.dtype), "embed", 0)

    def score(_, hidden_and_targets):
        hidden_CD, targets_C = hidden_and_targets
        row = _exponentials(hidden_CD, head_DV, targets_C)
        return None, _normalize(row, targets_C, head_DV.shape[1])[0]

    count, chunks, join = _cut(targets_BT.shape, chunk)
    _, parts = jax.lax.scan(score, None, (chunks(hidden_BTD), chunks(targets_BT)), length=count)
    return jax.tree.map(join, parts)


def _loss_and_gradients_here(
    token_loss: TokenLoss,
    chunk: int,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    args_BT: Sequence[jax.Array],
) -> tuple[jax.Array, TokenScores, _Gradients]:
    """Sum of the token losses over all devices, scores and gradients; three products of N x D x V."""
    dtype = hidden_BTD.dtype
    whole_head_DV = all_gather(head_DV.astype(dtype), "embed", 0)
    count, chunks, join = _cut(targets_BT.shape, chunk)

    def step(head_grad_DV, x):
        # Without the barrier XLA slices the chunk again inside each of the two products that read it and does not keep
        # it in vector memory. At 8,192 tokens that costs a fifth of the time on v5p, by the compiler's estimate.
        hidden_CD = jax.lax.optimization_barrier(x[0])
        _, targets_C, valid_C, args_C = x
        row = _exponentials(hidden_CD, whole_head_DV, targets_C)
        # One pass over the float32 logits writes the exponentials in the compute dtype. Without the barrier XLA
        # recomputes them in a separate pass for each product.
        exps_CV, total_C, target_C = jax.lax.optimization_barrier((row.exps, row.total, row.target))
        row = row._replace(exps=exps_CV, total=total_C, target=target_C)
        scores_C, scale_C = _normalize(row, targets_C, whole_head_DV.shape[1])

        losses_C, pull = jax.vjp(token_loss, scores_C.log_probs_BT, scores_C.log_normalizers_BT, *args_C)
        f1_C, f2_C, *args_grad_C = (jnp.where(valid_C, g, 0) for g in pull(jnp.ones_like(losses_C)))
        target_grad_C = f1_C + (f2_C - f1_C) * jnp.exp(scores_C.log_probs_BT)
        # The target's entry separately: if p is nearly 1, rounding p to the compute dtype would lose p - 1.
        logits_grad_CV = jnp.where(
            row.is_target, target_grad_C[:, None], ((f2_C - f1_C) * scale_C)[:, None] * row.exps.astype(jnp.float32)
        ).astype(dtype)
        hidden_grad_CD = _dot("CV,DV->CD", logits_grad_CV, whole_head_DV)
        head_grad_DV += _dot("CD,CV->DV", hidden_CD, logits_grad_CV)
        return head_grad_DV, (scores_C, jnp.where(valid_C, losses_C, 0), hidden_grad_CD, tuple(args_grad_C))

    valid_BT = jnp.ones(targets_BT.shape, bool)
    head_grad_DV, (parts, losses, hidden_grad, args_grad) = jax.lax.scan(
        step,
        jnp.zeros(whole_head_DV.shape, jnp.float32),
        (chunks(hidden_BTD), chunks(targets_BT), chunks(valid_BT), tuple(map(chunks, args_BT))),
        length=count,
    )
    loss = jnp.sum(losses, dtype=jnp.float32)
    gradients = _Gradients(
        hidden_BTD=_psum(join(hidden_grad), _axes("vocab")).astype(dtype),
        head_DV=_sum_over_tokens(head_grad_DV).astype(head_DV.dtype),
        args_BT=tuple(map(join, args_grad)),
    )
    return _psum(loss, _axes("batch", "length")), jax.tree.map(join, parts), gradients


def _dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _exponentials(hidden_CD: jax.Array, head_DV: jax.Array, targets_C: jax.Array) -> _Row:
    logits_CV = _dot("CD,DV->CV", hidden_CD, head_DV)
    first_id = axis_index("vocab") * logits_CV.shape[1]  # of this device's vocabulary shard
    ids_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
    # Compare and sum instead of gathering: this fuses into the pass that sums the exponentials.
    is_target_CV = ids_CV == (targets_C - first_id)[:, None]
    top_C = jnp.max(logits_CV, axis=-1)
    exps_CV = jnp.exp(logits_CV - top_C[:, None])
    target_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    return _Row(top_C, jnp.sum(exps_CV, axis=-1), target_C, is_target_CV, exps_CV.astype(hidden_CD.dtype))


def _normalize(row: _Row, targets_C: jax.Array, vocab_here: int) -> tuple[TokenScores, jax.Array]:
    """Scores, and the factor that turns `row.exps` into probabilities."""
    vocab = _axes("vocab")
    top_C = jax.lax.pmax(row.top, vocab) if vocab else row.top
    total_C, target_C = _psum(jnp.stack([row.total * jnp.exp(row.top - top_C), row.target]), vocab)
    log_normalizers_C = top_C + jnp.log(total_C)
    in_vocab_C = (targets_C >= 0) & (targets_C < vocab_here * axis_size("vocab"))
    target_C = jnp.where(in_vocab_C, target_C, jnp.nan)
    correct_C = (target_C >= top_C).astype(jnp.float32)
    return TokenScores(target_C - log_normalizers_C, log_normalizers_C, correct_C), jnp.exp(row.top - log_normalizers_C)


def _cut(
    shape: tuple[int, ...], chunk: int
) -> tuple[int, Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """The number of chunks, and functions that cut [B, T, ...] into [chunks, C, ...] and join it again.

    Chunks have equal size, so lengths that are not a multiple of `chunk` need hardly any padding.
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


def _axes(*logical_axes: str) -> tuple[str, ...]:
    """The mesh axes with more than one device that shard these logical axes; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    spread = ((axes,) if isinstance(axes, str) else axes or () for axes in spec(*logical_axes))
    return tuple(axis for axis in itertools.chain.from_iterable(spread) if mesh.shape[axis] > 1)


def _psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _sum_over_tokens(head_grad_DV: jax.Array) -> jax.Array:
    """Sum the head's gradient over the devices and leave each device its own rows."""
    width = _axes("embed")
    if width:
        head_grad_DV = jax.lax.psum_scatter(head_grad_DV, width, scatter_dimension=0, tiled=True)
    return _psum(head_grad_DV, tuple(axis for axis in _axes("batch", "length") if axis not in width))
