"""The decoder as the engine runs it: the same computation, with weights laid out so that a decoding step streams them.

A step for a few tokens reads every weight once and does little else. Against `Qwen3`:

  - every layer's kernels are arrays of their own: from stacked arrays, XLA on CPU and GPU copies a layer's kernels
    before it multiplies them;
  - a kernel's rows are its outputs, so that each output reads contiguous memory;
  - queries, keys and values are one product, and so are gate and up;
  - kernels may be int8, with a float32 scale per output.

Legend: B rows, T tokens, D width, N query heads, K key-value heads, R = N / K, H head dim, F MLP width, V vocabulary,
L layers, I inputs of a kernel, O its outputs, P devices that share a layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from stepjax.models.layers import rotate_halves
from stepjax.models.paged_cache import PagedCache, append_and_attend
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import Model, StepVL
from stepjax.sharding import axis_size, constrain, target_platform

Weights = Literal["int8"] | None  # None: as they are

_MOST = 127  # of an int8


class Kernels(nnx.Module):
    """One linear map per layer; if its values are int8, every output has a float32 scale."""

    def __init__(self, values: nnx.List | nnx.Param, scales: nnx.List | nnx.Param | None = None):
        """`values` are [O, I] each, or stacked as [L, O, I]; `scales` [O], or [L, O]."""
        self.values, self.scales = nnx.data(values), nnx.data(scales)

    def of(self, layer: int | jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The values [O, I] and scales [O] of a layer, which has to be an int where the layers are listed."""
        values, scales = cast(Any, self.values), cast(Any, self.scales)
        return values[layer][...], None if scales is None else scales[layer][...]

    def __call__(self, x_BTI: jax.Array, layer: int | jax.Array) -> jax.Array:
        """[B, T, O] in the dtype of x. `layer` may be the index of a scan."""
        if isinstance(layer, int) or not isinstance(self.values, nnx.List):
            return product(x_BTI, *self.of(layer))
        # A scan compiles the rest of the layer only once. Its body cannot index a list, but it can branch.
        branches = [partial(self._product, layer=layer) for layer in range(len(self.values))]
        return jax.lax.switch(layer, branches, x_BTI)

    def _product(self, x_BTI: jax.Array, layer: int) -> jax.Array:
        return product(x_BTI, *self.of(layer))


def quantise(kernel_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 values and the float32 scale of every output: symmetric, the largest weight becomes 127."""
    scale_O = jnp.max(jnp.abs(kernel_OI), axis=1).astype(jnp.float32) / _MOST
    return jnp.round(kernel_OI / jnp.where(scale_O == 0, 1, scale_O)[:, None]).astype(jnp.int8), scale_O


def product(x_BTI: jax.Array, kernel_OI: jax.Array, scale_O: jax.Array | None, *, dtype: Any = None) -> jax.Array:
    """x times the transposed kernel, summed in float32: [B, T, O] in `dtype`, by default that of x."""
    on_cpu = target_platform() == "cpu"
    if scale_O is not None:
        y_BTO = (_of_digits if on_cpu else _of_floats)(x_BTI, kernel_OI) * scale_O
    elif on_cpu and x_BTI.dtype == jnp.float32 and x_BTI.size > x_BTI.shape[-1]:
        y_BTO = _of_columns(x_BTI, kernel_OI)
    else:
        y_BTO = _of_floats(x_BTI, kernel_OI)
    return y_BTO.astype(dtype or x_BTI.dtype)


def _of_floats(x_BTI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    return _dot(x_BTI, kernel_OI.astype(x_BTI.dtype), jnp.float32)


def _of_columns(x_BTI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """For XLA on CPU: it packs the right operand, which had better be the small one. With 16 rows in float32 this takes
    0.56 of the time. The barriers keep XLA from swapping the operands back.
    """
    rows = x_BTI.shape[:-1]
    x_IX = jax.lax.optimization_barrier(x_BTI.reshape(-1, x_BTI.shape[-1]).T)
    y_OX = jax.lax.optimization_barrier(jnp.matmul(kernel_OI.astype(x_IX.dtype), x_IX))
    return y_OX.T.reshape(*rows, -1)


def _of_digits(x_BTI: jax.Array, values_OI: jax.Array) -> jax.Array:
    """For XLA on CPU: int8 products of two digits of x, of 7 bits and a sign each.

    It has kernels for int8 times int8, but to multiply int8 by floats it would first convert the whole kernel.
    """
    x_BTI = x_BTI.astype(jnp.float32)
    step_BT1 = jnp.max(jnp.abs(x_BTI), axis=-1, keepdims=True) / _MOST
    x_BTI = x_BTI / jnp.where(step_BT1 == 0, 1, step_BT1)
    high_BTI = jnp.round(x_BTI)
    low_BTI = jnp.round((x_BTI - high_BTI) * 2 * _MOST)
    digits = jnp.concatenate([high_BTI, low_BTI]).astype(jnp.int8)
    high_BTO, low_BTO = jnp.split(_dot(digits, values_OI, jnp.int32).astype(jnp.float32), 2)
    return (high_BTO + low_BTO / (2 * _MOST)) * step_BT1


def _dot(x_BTI: jax.Array, kernel_OI: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(x_BTI, kernel_OI, (((2,), (1,)), ((), ())), preferred_element_type=dtype)


class ServingDecoder(Qwen3):
    """Made by `serving_decoder`. It takes the place of a `Qwen3` in the engine, and only works with a cache."""

    def __init__(self, decoder: Qwen3, kernels: dict[str, Kernels]):
        attention = decoder.blocks.attention
        self.config, self.numerics = decoder.config, decoder.numerics
        self.norm1, self.norm2, self.norm = decoder.blocks.norm1, decoder.blocks.norm2, decoder.norm
        self.q_norm, self.k_norm = nnx.data(attention.q_norm), nnx.data(attention.k_norm)
        self.qkv, self.out, self.gate_up, self.down = (kernels[name] for name in ("qkv", "out", "gate_up", "down"))
        self.embedding = nnx.data(None if decoder.head_kernel is None else decoder.embedding)
        self.head_kernel = kernels["head"]  # of one "layer"

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """See `Qwen3.embed`."""
        if self.embedding is not None:
            return super().embed(tokens_BT)
        table_VD, scale_V = self.head_kernel.of(0)
        x_BTD = constrain(table_VD, "vocab", None)[tokens_BT]
        if scale_V is not None:
            x_BTD = x_BTD * scale_V[tokens_BT][..., None]
        return x_BTD.astype(jnp.dtype(self.numerics.compute_dtype))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V]."""
        return product(x_BTD, *self.head_kernel.of(0), dtype=jnp.float32)

    def _with_cache(self, x_BTD, rotary, positions_BT, cache: PagedCache) -> tuple[jax.Array, PagedCache]:
        num_layers = self.config.num_layers
        layer = partial(self._layer, rotary)
        if target_platform() == "gpu":  # a branch would wait for the host
            for index in range(num_layers):
                (x_BTD, cache), _ = layer((x_BTD, cache), index)
        else:
            (x_BTD, cache), _ = jax.lax.scan(layer, (x_BTD, cache), jnp.arange(num_layers))
        return self.norm(x_BTD), cache

    def _layer(self, rotary, carry: tuple[jax.Array, PagedCache], index: int | jax.Array):
        """A layer, as in `qwen3.DecoderBlock`."""
        x_BTD, cache = carry
        config, norms = self.config, (self.norm1, self.norm2, self.q_norm, self.k_norm)
        norm1, norm2, q_norm, k_norm = jax.tree.map(lambda scale_LD: scale_LD[index], norms)
        with jax.named_scope("attention"):
            qkv_BTO = self.qkv(norm1(x_BTD), index)
            qkv_BTKXH = qkv_BTO.reshape(*qkv_BTO.shape[:2], config.num_kv_heads, -1, config.head_dim)
            q_BTKRH, k_BTKH, v_BTKH = qkv_BTKXH[..., :-2, :], qkv_BTKXH[..., -2, :], qkv_BTKXH[..., -1, :]
            q_BTNH = q_BTKRH.reshape(*qkv_BTO.shape[:2], config.num_heads, config.head_dim)
            if q_norm is not None and k_norm is not None:
                q_BTNH, k_BTKH = q_norm(q_BTNH), k_norm(k_BTKH)
            q_BTNH, k_BTKH = rotate_halves(q_BTNH, *rotary), rotate_halves(k_BTKH, *rotary)
            here = cache.at_layer(index, config.num_layers)
            attended_BTNH, cache = append_and_attend(q_BTNH, k_BTKH, v_BTKH, here, self.numerics.attention)
            x_BTD = x_BTD + self.out(attended_BTNH.reshape(*qkv_BTO.shape[:2], -1), index)
        with jax.named_scope("mlp"):
            gate_up_BTO = self.gate_up(norm2(x_BTD), index)
            gate_up_BTP2F = gate_up_BTO.reshape(*gate_up_BTO.shape[:2], axis_size("mlp"), 2, -1)
            hidden_BTPF = jax.nn.silu(gate_up_BTP2F[..., 0, :]) * gate_up_BTP2F[..., 1, :]
            x_BTD = x_BTD + self.down(hidden_BTPF.reshape(*x_BTD.shape[:2], -1), index)
        return (constrain(x_BTD, "batch", "length", "act_embed"), cache), None


def serving_decoder(decoder: Qwen3, weights: Weights, *, donate: bool = False) -> Qwen3:
    """The decoder in the form that suits the platform and the mesh in scope.

    On TPU the kernels stay stacked, and without quantisation the decoder stays what it is: XLA reads a layer's kernels
    where they lie.

    Args:
        donate: delete the decoder's kernels as each is converted, so that memory does not double. The decoder cannot be
            used afterwards.
    """
    stacked = target_platform() == "tpu"
    if isinstance(decoder, ServingDecoder) or (stacked and weights is None):
        return decoder
    attention, mlp, num_layers = decoder.blocks.attention, decoder.blocks.mlp, decoder.config.num_layers

    def convert(layout: Callable, axes: tuple[str, str], *params: nnx.Param, layers: int = num_layers) -> Kernels:
        arrays = [param[...] for param in params]
        options = {"layout": layout, "axes": axes, "weights": weights}
        if not layers:
            pairs = [_convert(*arrays, **options)]
        elif stacked:
            pairs = _convert_stack(*arrays, **options)
        else:
            pairs = [_convert(*(array[layer] for array in arrays), **options) for layer in range(layers)]
        if donate:
            jax.block_until_ready(pairs)
            for array in arrays:
                array.delete()
        if stacked and layers:
            return Kernels(*(nnx.Param(x, axes=axes[: x.ndim - 1]) for x in pairs))
        return Kernels(*(nnx.List([nnx.Param(x, axes=axes[: x.ndim]) for x in xs]) for xs in zip(*pairs, strict=True)))

    kernels = {
        "qkv": convert(_qkv, ("kv_heads", "embed"), attention.q_kernel, attention.k_kernel, attention.v_kernel),
        "out": convert(_out, ("embed", "heads"), attention.out_kernel),
        "gate_up": convert(_gate_up, ("mlp", "embed"), mlp.gate_kernel, mlp.up_kernel),
        "down": convert(jnp.transpose, ("embed", "mlp"), mlp.down_kernel),
    }
    axes = "vocab", "embed"
    if decoder.head_kernel is not None:
        kernels["head"] = convert(jnp.transpose, axes, decoder.head_kernel, layers=0)
    elif weights is not None:
        kernels["head"] = convert(jnp.asarray, axes, decoder.embedding, layers=0)
    else:
        kernels["head"] = Kernels(nnx.List([decoder.embedding]))
    return ServingDecoder(decoder, kernels)


def serving_model(model: Model, weights: Weights, *, donate: bool = False) -> Model:
    """The same for a decoder, or for a model around one; other parts are shared."""
    if not isinstance(model, StepVL):
        return serving_decoder(model, weights, donate=donate)
    copy: Any = jax.tree.map(lambda leaf: leaf, model)
    copy.decoder = serving_decoder(model.decoder, weights, donate=donate)
    return copy


@partial(jax.jit, static_argnames=("layout", "axes", "weights"))
def _convert(*arrays: jax.Array, layout: Callable, axes: tuple[str, str], weights: Weights) -> tuple[jax.Array, ...]:
    """The values [O, I] and, if quantised, the scales [O] of a kernel."""
    kernel_OI = layout(*arrays)
    made = (kernel_OI,) if weights is None else quantise(kernel_OI)
    return tuple(constrain(x, *axes[: x.ndim]) for x in made)


@partial(jax.jit, static_argnames=("layout", "axes", "weights"))
def _convert_stack(*arrays: jax.Array, **options: Any) -> tuple[jax.Array, ...]:
    return jax.vmap(partial(_convert, **options))(*arrays)


def _qkv(q_DNH: jax.Array, k_DKH: jax.Array, v_DKH: jax.Array) -> jax.Array:
    """By key-value head, so that a device of a mesh has the queries of its keys and values."""
    width, num_kv_heads, head_dim = k_DKH.shape
    q_DKRH = q_DNH.reshape(width, num_kv_heads, -1, head_dim)
    return jnp.concatenate([q_DKRH, k_DKH[:, :, None], v_DKH[:, :, None]], axis=2).reshape(width, -1).T


def _out(out_NHD: jax.Array) -> jax.Array:
    return out_NHD.reshape(-1, out_NHD.shape[-1]).T


def _gate_up(gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    """By device, so that each has gate and up of the same part."""
    gate_up = [kernel_DF.reshape(len(kernel_DF), axis_size("mlp"), 1, -1) for kernel_DF in (gate_DF, up_DF)]
    return jnp.concatenate(gate_up, axis=2).reshape(len(gate_DF), -1).T
