"""Building blocks shared by both towers: parameter creation, norms, rotary positions.

Legend: B batch, T tokens, P patches, N heads, H head dim, D any feature width.

Initial values (`D` is the size of the contracted dimensions):

    matrices            normal, standard deviation 1 / sqrt(D); 0.0156 at width 4096
    residual outputs    the same, divided by sqrt(2 * layers), so the residual stream does not grow with depth
    embeddings          normal, standard deviation config.init_range
    norm scales         one; biases zero; LayerScale config.layer_scale_init
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stepjax.config import DecoderConfig
from stepjax.models.lora import Adapted
from stepjax.sharding import axis_size, target_platform


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int, scale: float = 1.0
) -> nnx.Param:
    """A normally distributed weight with standard deviation scale / sqrt(fan_in)."""
    std = scale / math.sqrt(fan_in)
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def project(equation: str, x: jax.Array, kernel: jax.Array | Adapted) -> jax.Array:
    """`jnp.einsum(equation, x, kernel)`, where the last dimensions of x are contracted with the first of the kernel.

    An adapter takes part through its rank, of the letter R: x A, then times B.

    On CPU this is one product of two matrices. XLA transposes operands of more dimensions into new arrays for the
    kernel's gradient, and recomputes the activation functions that it fuses into them; it passes transposed matrices to
    the matrix library as they are. (A matrix's rows cannot be sharded along two mesh axes, batch and length.)
    """
    inputs, out = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    contracted = len(set(of_x) & set(of_kernel))
    if isinstance(kernel, Adapted):
        of_low = f"{of_x[:-contracted]}R"
        low = project(f"{of_x},{of_kernel[:contracted]}R->{of_low}", x, kernel.a)
        update = project(f"{of_low},R{of_kernel[contracted:]}->{out}", low, kernel.b)
        return project(equation, x, kernel.kernel) + kernel.scale * update
    if target_platform() != "cpu" or axis_size("length") > 1:
        return jnp.einsum(equation, x, kernel)
    rows, columns = x.shape[:-contracted], kernel.shape[contracted:]
    shared = math.prod(kernel.shape[:contracted])
    product = x.reshape(-1, shared) @ kernel.reshape(shared, -1)
    return jnp.einsum(f"{of_x[:-contracted]}{of_kernel[contracted:]}->{out}", product.reshape(*rows, *columns))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in the dtype of x."""

    def __init__(self, dim: int, eps: float):
        self.scale = constant(1.0, (dim,), ("norm",))
        self.eps = eps

    def __call__(self, x_D: jax.Array) -> jax.Array:
        x32_D = x_D.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32_D), axis=-1, keepdims=True) + self.eps)
        return (x32_D * inverse_rms * self.scale.astype(jnp.float32)).astype(x_D.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias, computed in float32 and returned in the dtype of x."""

    def __init__(self, dim: int, eps: float):
        self.scale = constant(1.0, (dim,), ("norm",))
        self.bias = constant(0.0, (dim,), ("norm",))
        self.eps = eps

    def __call__(self, x_D: jax.Array) -> jax.Array:
        x32_D = x_D.astype(jnp.float32)
        x32_D = x32_D - jnp.mean(x32_D, axis=-1, keepdims=True)
        x32_D = x32_D * jax.lax.rsqrt(jnp.mean(jnp.square(x32_D), axis=-1, keepdims=True) + self.eps)
        return (x32_D * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x_D.dtype)


YARN_FAST_TURNS, YARN_SLOW_TURNS = 32, 1

# Rotary positions, in two conventions: the encoder rotates adjacent pairs, the decoder rotates halves.


def rotary_1d(
    positions_BT: Int[Array, "B T"], config: DecoderConfig
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """The decoder's cosines and sines [B, T, H / 2]; angle i is position * theta^(-2i / H)."""
    frequencies_H = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if config.yarn_factor > 1:
        frequencies_H = yarn(frequencies_H, config)
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies_H
    factor = config.yarn_attention_factor if config.yarn_factor > 1 else 1.0
    return factor * jnp.cos(angles_BTH), factor * jnp.sin(angles_BTH)


def yarn(frequencies_H: jax.Array, config: DecoderConfig) -> jax.Array:
    """Frequencies for a context `yarn_factor` times the trained one (YaRN, arXiv 2309.00071, section 3.2).

    Pairs that turn at least 32 times within the trained positions keep their frequency. Pairs that turn at most once
    are slowed by the factor. Between them, the two are interpolated linearly in the pair's index.
    """

    def index_of(turns: float) -> float:
        wavelength = config.yarn_trained_positions / turns
        return config.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(index_of(YARN_FAST_TURNS)), 0)
    last = min(math.ceil(index_of(YARN_SLOW_TURNS)), config.head_dim - 1)
    slowed_H = (jnp.arange(config.head_dim // 2) - first) / max(last - first, 1e-3)
    slowed_H = jnp.clip(slowed_H, 0, 1).astype(jnp.float32)
    return frequencies_H * (1 - slowed_H + slowed_H / config.yarn_factor)


def rotate_halves(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotate the pairs (x[i], x[i + H/2]): the decoder's NeoX convention."""
    low_BTNH, high_BTNH = jnp.split(x_BTNH, 2, axis=-1)
    return rotate(low_BTNH, high_BTNH, cos_BTH, sin_BTH)


def rotate(low_BTNH: jax.Array, high_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotate the pairs (low[i], high[i]) and concatenate the halves: [B, T, N, 2 H], computed in float32."""
    low32_BTNH, high32_BTNH = low_BTNH.astype(jnp.float32), high_BTNH.astype(jnp.float32)
    cos_BT1H, sin_BT1H = cos_BTH[:, :, None], sin_BTH[:, :, None]
    low = low32_BTNH * cos_BT1H - high32_BTNH * sin_BT1H
    high = high32_BTNH * cos_BT1H + low32_BTNH * sin_BT1H
    # Cast before concatenating: XLA does not fuse later operations into a concatenation.
    return jnp.concatenate([low.astype(low_BTNH.dtype), high.astype(high_BTNH.dtype)], axis=-1)


def rotary_2d(grid: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """The encoder's cosines and sines [P, H / 2]: the first half encodes the column, the second the row.

    Positions are the patch's column and row, from 0, for any view size: a 36 x 36 crop uses the corner of the 52 x 52
    table, not a rescaled one.
    """
    per_axis = head_dim // 2
    frequencies_H = theta ** (-jnp.arange(0, per_axis, 2, dtype=jnp.float32) / per_axis)
    row_P, column_P = jnp.divmod(jnp.arange(grid * grid), grid)
    angles_PH = jnp.concatenate([column_P[:, None] * frequencies_H, row_P[:, None] * frequencies_H], axis=-1)
    return jnp.cos(angles_PH), jnp.sin(angles_PH)


def halves_of_pairs(x: jax.Array, axis: int) -> jax.Array:
    """Deinterleave the last axis: even and odd entries become halves along `axis`, which doubles; the last axis halves.

    `rotate` then rotates formerly adjacent pairs (the encoder's GPT-J convention). Permuting queries and keys alike
    leaves their products unchanged, so the encoder deinterleaves its weights, which are small. Rotating adjacent
    entries directly would shuffle TPU lanes for every patch; contiguous halves would still have to be sliced out of the
    projected patches.
    """
    halves = jnp.stack([x[..., 0::2], x[..., 1::2]], axis=axis + 1)
    return halves.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 : -1], x.shape[-1] // 2)
