"""Output projection and cross-entropy in one: scores and gradients without the logits of a whole row.

Legend: B rows, T tokens, D width, V vocabulary.

At 4,096 tokens and 151,936 words the float32 logits of one row are 2.5 GB. They are made for a chunk of tokens at a
time, reduced to three numbers a token, and in the same breath to the gradients, where the loss is known: see `chunked`.
Forming gradients in the forward pass is the idea of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), spreading the
vocabulary over devices that of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check, check_dtype, check_shape
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.chunked import Gradients, TokenLoss, TokenScores
from pallas_kernels.linear_cross_entropy.layout import Layout

__all__ = ["Layout", "TokenLoss", "TokenScores", "linear_cross_entropy", "linear_cross_entropy_sum"]


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int = 2048,
    layout: Layout | None = None,
) -> TokenScores:
    """Score every target under softmax(hidden @ kernel), differentiable with any cotangents.

    The backward pass makes the logits again: four products of B * T x D x V in all. Where the loss is a sum over
    tokens, `linear_cross_entropy_sum` takes three.

    Args:
      hidden_BTD: float32 or bfloat16 [B, T, D]; products are taken in its dtype and summed in float32.
      kernel_DV: float32 or bfloat16 [D, V]. Its gradient is summed in float32 and has its dtype.
      targets_BT: int32 [B, T]. A target outside [0, V) has log-probability NaN.
      chunk: tokens of a device whose logits exist at one time: 6 * chunk * V bytes in bfloat16, 8 in float32.
      layout: how the arrays are spread over the mesh in scope; None on one device, or to leave it to XLA.

    Returns:
      TokenScores: log-probabilities and log-normalizers, which carry gradients, and whether the target is the likeliest
      token, which carries none.

    Raises:
      ArgumentError: a shape or dtype differs from the above, or the layout does not fit the mesh.
    """
    layout = _check(hidden_BTD, kernel_DV, targets_BT, chunk, layout)
    scores: Any = _scores(chunk, layout, hidden_BTD, kernel_DV, targets_BT)
    return scores._replace(correct_BT=jax.lax.stop_gradient(scores.correct_BT))


def linear_cross_entropy_sum(
    token_loss: TokenLoss,
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    *args_BT: jax.Array,
    chunk: int = 2048,
    layout: Layout | None = None,
) -> tuple[jax.Array, TokenScores]:
    """The sum over all tokens of token_loss(log_probs, log_normalizers, *args), and the scores.

    Gradients are formed in the forward pass, by three products of B * T x D x V. Without differentiation it is one.

    Args:
      token_loss: a function of float32 arrays of equal shapes, elementwise, that returns one more; it is called with
        chunks of them. It must not close over traced arrays: hand them over as `args_BT`.
      args_BT: floating-point [B, T], such as weights, advantages or former log-probabilities. They get gradients.
      hidden_BTD, kernel_DV, targets_BT, chunk, layout: as in `linear_cross_entropy`.

    Returns:
      float32 [], and TokenScores without gradients.

    Raises:
      ArgumentError: as in `linear_cross_entropy`; token_loss does not return a floating-point array of its arguments'
        shape.
    """
    layout = _check(hidden_BTD, kernel_DV, targets_BT, chunk, layout)
    for i, arg_BT in enumerate(args_BT):
        check_shape(f"args_BT[{i}]", arg_BT, targets_BT.shape, "[B, T]")
        check(
            jnp.issubdtype(arg_BT.dtype, jnp.floating),
            f"args_BT[{i}] is {arg_BT.dtype}; cast it to a floating-point dtype",
        )
    float32 = jax.ShapeDtypeStruct(targets_BT.shape, jnp.float32)
    losses: Any = jax.eval_shape(token_loss, float32, float32, *args_BT)
    fits = getattr(losses, "shape", None) == targets_BT.shape and jnp.issubdtype(losses.dtype, jnp.floating)
    check(fits, f"token_loss returns {losses}; it must return one loss for every token, {float32}")
    results: Any = _sum(token_loss, chunk, layout, hidden_BTD, kernel_DV, targets_BT, args_BT)
    loss, scores = results
    return loss, jax.lax.stop_gradient(scores)


def _check(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, chunk: int, layout: Layout | None
) -> Layout:
    check_shape("hidden_BTD", hidden_BTD, (None, None, None), "[B, T, D]")
    rows, length, width = hidden_BTD.shape
    check(
        math.prod(hidden_BTD.shape) > 0, f"hidden_BTD has shape {hidden_BTD.shape}; every dimension must be at least 1"
    )
    check_shape("kernel_DV", kernel_DV, (width, None), "[D, V]")
    check(kernel_DV.shape[1] > 0, "kernel_DV has an empty vocabulary; V must be at least 1")
    check_shape("targets_BT", targets_BT, (rows, length), "[B, T]")
    check_dtype("hidden_BTD", hidden_BTD, jnp.float32, jnp.bfloat16)
    check_dtype("kernel_DV", kernel_DV, jnp.float32, jnp.bfloat16)
    check_dtype("targets_BT", targets_BT, jnp.int32)
    check(isinstance(chunk, int) and chunk > 0, f"chunk is {chunk!r}; it must be a positive number of tokens")
    if layout is None:
        return Layout()
    layout.check(rows, length, width, kernel_DV.shape[1])
    return layout


def _scores_of_devices(
    chunk: int, layout: Layout, hidden_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array
) -> TokenScores:
    compute = partial(chunked.scores, chunk=chunk, layout=layout)
    if layout != Layout():
        in_specs = (layout.hidden_spec, layout.kernel_spec, layout.token_spec)
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=layout.token_spec, check_vma=False)
    return compute(hidden_BTD, kernel_DV, targets_BT)


def _gradients_of_devices(
    token_loss: TokenLoss, chunk: int, layout: Layout, hidden_BTD, kernel_DV, targets_BT, args_BT
) -> tuple[jax.Array, TokenScores, Gradients]:
    compute = partial(chunked.loss_and_gradients, token_loss, chunk=chunk, layout=layout)
    if layout != Layout():
        tokens = layout.token_spec
        gradients = Gradients(layout.hidden_spec, layout.kernel_spec, tokens)  # type: ignore[arg-type]
        compute = jax.shard_map(
            compute,
            in_specs=(layout.hidden_spec, layout.kernel_spec, tokens, tokens),
            out_specs=(jax.sharding.PartitionSpec(), tokens, gradients),
            check_vma=False,
        )
    return compute(hidden_BTD, kernel_DV, targets_BT, args_BT)


# Differentiated outside of shard_map, so that what the devices exchange is what `layout` says and no more.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(chunk, layout, hidden_BTD, kernel_DV, targets_BT):
    return _scores_of_devices(chunk, layout, hidden_BTD, kernel_DV, targets_BT)


def _scores_forward(chunk, layout, hidden_BTD, kernel_DV, targets_BT):
    return _scores_of_devices(chunk, layout, hidden_BTD, kernel_DV, targets_BT), (hidden_BTD, kernel_DV, targets_BT)


def _scores_backward(chunk, layout, inputs, cotangents: TokenScores):
    def inner_product(log_probs, log_normalizers, log_probs_grad, log_normalizers_grad):
        return log_probs * log_probs_grad + log_normalizers * log_normalizers_grad

    args_BT = cotangents.log_probs_BT, cotangents.log_normalizers_BT
    hidden_BTD, kernel_DV, targets_BT = inputs
    _, _, gradients = _gradients_of_devices(inner_product, chunk, layout, hidden_BTD, kernel_DV, targets_BT, args_BT)
    return gradients.hidden_BTD, gradients.kernel_DV, None


_scores.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum(token_loss, chunk, layout, hidden_BTD, kernel_DV, targets_BT, args_BT):
    scores = _scores_of_devices(chunk, layout, hidden_BTD, kernel_DV, targets_BT)
    return jnp.sum(token_loss(scores.log_probs_BT, scores.log_normalizers_BT, *args_BT), dtype=jnp.float32), scores


def _sum_forward(token_loss, chunk, layout, hidden_BTD, kernel_DV, targets_BT, args_BT):
    loss, scores, gradients = _gradients_of_devices(
        token_loss, chunk, layout, hidden_BTD, kernel_DV, targets_BT, args_BT
    )
    return (loss, scores), gradients


def _sum_backward(token_loss, chunk, layout, gradients: Gradients, cotangents):
    scaled = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
    return scaled.hidden_BTD, scaled.kernel_DV, None, scaled.args_BT


_sum.defvjp(_sum_forward, _sum_backward)
