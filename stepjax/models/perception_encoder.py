"""The Perception Encoder of STEP3-VL: Meta's PE-lang G/14 with quick_gelu and a 52 x 52 position table.

Legend: M views, P patches of a view, E encoder width, N heads, H head dim, F MLP width, C channels.

Differences from a plain ViT:
- no class token, pooling or final norm: the projector reads the features of the last layer;
- learned absolute positions on the global grid, interpolated for crops; rotary positions are not rescaled;
- rotary rotation of adjacent pairs, column half of the head first (layers.rotary_2d);
- LayerScale on both residual branches, quick_gelu in the MLP (`VisionConfig.activation`).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.flash_attention import LOG2_UNITS
from stepjax.config import NumericsConfig, VisionConfig
from stepjax.models.attention import attend
from stepjax.models.layers import LayerNorm, constant, halves_of_pairs, matrix, project, rotary_2d, rotate
from stepjax.models.remat import run_layers
from stepjax.sharding import constrain


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": partial(jax.nn.gelu, approximate=False)}


def scaled(weight: nnx.Param, scale_E: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Folds the LayerScale of the output into the weight: equivalent and cheaper.

    Scaling the branch's output instead would need that output for the scale's gradient, so rematerialisation would
    recompute both residual branches just for it.
    """
    return (weight.astype(jnp.float32) * scale_E.astype(jnp.float32)).astype(dtype)


class EncoderAttention(nnx.Module):
    """Full bidirectional self-attention within a view."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        E, N, H = config.width, config.num_heads, config.head_dim
        self.qkv_kernel = matrix(rngs, (E, 3, N, H), ("embed", "qkv", "heads", "head_dim"), fan_in=E)
        self.qkv_bias = constant(0.0, (3, N, H), ("qkv", "heads", "head_dim"))
        residual_scale = 1 / math.sqrt(2 * config.num_layers)
        self.out_kernel = matrix(rngs, (N, H, E), ("heads", "head_dim", "embed"), fan_in=E, scale=residual_scale)
        self.out_bias = constant(0.0, (E,), ("norm",))

    def __call__(
        self, x_MPE: jax.Array, cos_PH: jax.Array, sin_PH: jax.Array, scale_E: jax.Array, numerics: NumericsConfig
    ) -> jax.Array:
        """`scale_E` is the LayerScale of the output."""
        dtype = x_MPE.dtype
        kernel, bias = self.qkv_kernel.astype(dtype), self.qkv_bias.astype(dtype)
        # Q: both halves of the queries, both of the keys. (Two axes instead of one would double the product's time.)
        qk_kernel, qk_bias = halves_of_pairs(kernel[:, :2], axis=1), halves_of_pairs(bias[:2], axis=0)
        halves_QMPNH = project("MPE,EQNH->QMPNH", x_MPE, qk_kernel) + qk_bias[:, None, None]
        # Folding the score scale into the queries' angles saves a pass over the queries.
        scale = (2 * cos_PH.shape[-1]) ** -0.5 / LOG2_UNITS
        q_MPNH = rotate(halves_QMPNH[0], halves_QMPNH[1], scale * cos_PH[None], scale * sin_PH[None])
        k_MPNH = rotate(halves_QMPNH[2], halves_QMPNH[3], cos_PH[None], sin_PH[None])
        v_MPNH = project("MPE,ENH->MPNH", x_MPE, kernel[:, 2]) + bias[2]
        attended_MPNH = attend(
            q_MPNH, k_MPNH, v_MPNH, scale=LOG2_UNITS, rows_axis="views", implementation=numerics.attention
        )
        kernel, bias = scaled(self.out_kernel, scale_E, dtype), scaled(self.out_bias, scale_E, dtype)
        return project("MPNH,NHE->MPE", attended_MPNH, kernel) + bias


class EncoderMLP(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        E, F = config.width, config.mlp_dim
        self.activation = config.activation
        self.up_kernel = matrix(rngs, (E, F), ("embed", "mlp"), fan_in=E)
        self.up_bias = constant(0.0, (F,), ("norm",))
        self.down_kernel = matrix(rngs, (F, E), ("mlp", "embed"), fan_in=F, scale=1 / math.sqrt(2 * config.num_layers))
        self.down_bias = constant(0.0, (E,), ("norm",))

    def __call__(self, x_MPE: jax.Array, scale_E: jax.Array) -> jax.Array:
        """`scale_E` is the LayerScale of the output."""
        dtype = x_MPE.dtype
        activation = ACTIVATIONS[self.activation]
        hidden_MPF = project("MPE,EF->MPF", x_MPE, self.up_kernel.astype(dtype)) + self.up_bias.astype(dtype)
        kernel, bias = scaled(self.down_kernel, scale_E, dtype), scaled(self.down_bias, scale_E, dtype)
        return project("MPF,FE->MPE", activation(hidden_MPF), kernel) + bias


class EncoderBlock(nnx.Module):
    """Pre-norm residual block with LayerScale."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attention = EncoderAttention(config, rngs=rngs)
        self.scale1 = constant(config.layer_scale_init, (config.width,), ("norm",))
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = EncoderMLP(config, rngs=rngs)
        self.scale2 = constant(config.layer_scale_init, (config.width,), ("norm",))

    def __call__(self, x_MPE: jax.Array, cos_PH: jax.Array, sin_PH: jax.Array, numerics: NumericsConfig) -> jax.Array:
        with jax.named_scope("attention"):
            x_MPE = x_MPE + self.attention(self.norm1(x_MPE), cos_PH, sin_PH, self.scale1[...], numerics)
        with jax.named_scope("mlp"):
            x_MPE = x_MPE + self.mlp(self.norm2(x_MPE), self.scale2[...])
        return constrain(x_MPE, "views", None, "act_embed")


class PerceptionEncoder(nnx.Module):
    """Maps pixels of square views to one feature per patch. Source: PE-lang (Bolya et al. 2025), as in STEP3-VL."""

    def __init__(self, config: VisionConfig, numerics: NumericsConfig, *, rngs: nnx.Rngs):
        self.config, self.numerics = config, numerics
        p, E, grid = config.patch_size, config.width, config.position_grid
        self.patch_kernel = matrix(rngs, (p, p, 3, E), ("pixels", "pixels", "pixels", "embed"), fan_in=p * p * 3)
        self.positions = matrix(rngs, (grid, grid, E), ("positions", "positions", "embed"), fan_in=E)
        self.norm_pre = LayerNorm(E, config.norm_eps)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: EncoderBlock(config, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, views_MHWC: Float[Array, "M H H 3"]) -> Float[Array, "M P E"]:
        """Normalised pixels [M, side, side, 3] to features [M, grid^2, E], patches row-major."""
        config, dtype = self.config, jnp.dtype(self.numerics.compute_dtype)
        num_views, side, width, _ = views_MHWC.shape
        assert side == width and side % config.patch_size == 0, views_MHWC.shape
        p, grid = config.patch_size, side // config.patch_size

        with jax.named_scope("patches"):
            # A convolution with stride equal to its kernel size is a matrix product over patches.
            patches = views_MHWC.astype(dtype).reshape(num_views, grid, p, grid, p * 3).transpose(0, 1, 3, 2, 4)
            patches = patches.reshape(num_views, grid * grid, p * p * 3)
            kernel = self.patch_kernel.astype(dtype).reshape(p * p * 3, config.width)
            x_MPE = project("MPC,CE->MPE", patches, kernel)
            x_MPE = x_MPE + self._positions(grid).astype(dtype).reshape(grid * grid, config.width)
            x_MPE = constrain(self.norm_pre(x_MPE), "views", None, "act_embed")

        cos_PH, sin_PH = rotary_2d(grid, config.head_dim, config.rope_theta)

        def layer(x_MPE, block):
            return block(x_MPE, cos_PH, sin_PH, self.numerics)

        return run_layers(layer, x_MPE, self.blocks, self.numerics.policy_of_encoder)

    def _positions(self, grid: int) -> jax.Array:
        table = self.positions[...].astype(jnp.float32)
        if grid == self.config.position_grid:
            return table
        # Half-pixel centres, no antialiasing, like torch's interpolate(align_corners=False).
        return jax.image.resize(table, (grid, grid, table.shape[-1]), "bilinear", antialias=False)
