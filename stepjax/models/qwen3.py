"""The Qwen3 decoder: grouped-query attention with per-head query and key norms, rotary halves, SwiGLU.

Legend: B rows, T tokens, S cache slots, D width, N query heads, K key-value heads, H head dim, F MLP width, V
vocabulary, L layers.

`qk_norm=False` and `tie_embeddings=True` make it a plain Llama-like decoder.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from stepjax.config import DecoderConfig, NumericsConfig
from stepjax.models.attention import attend, attend_to_cache
from stepjax.models.layers import RMSNorm, matrix, rotary_1d, rotate_halves
from stepjax.models.remat import remat
from stepjax.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of every layer, one slot a position."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array


def make_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `rows` sequences of up to `slots` tokens."""
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class DecoderAttention(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_kernel = matrix(rngs, (D, N, H), ("embed", "heads", "head_dim"), fan_in=D)
        self.k_kernel = matrix(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.v_kernel = matrix(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        residual_scale = 1 / math.sqrt(2 * config.num_layers)
        self.out_kernel = matrix(rngs, (N, H, D), ("heads", "head_dim", "embed"), fan_in=N * H, scale=residual_scale)
        self.q_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None

    def __call__(self, x_BTD, rotary, positions_BT, segment_ids_BT, cache, numerics: NumericsConfig):
        dtype = x_BTD.dtype
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.q_kernel.astype(dtype))
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.k_kernel.astype(dtype))
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.v_kernel.astype(dtype))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate_halves(q_BTNH, *rotary), rotate_halves(k_BTKH, *rotary)

        if cache is None:
            attended_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                causal=True,
                segment_ids_BT=segment_ids_BT,
                length_axis="length",
                implementation=numerics.attention,
            )
        else:
            rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]
            k_BSKH = cache.k_LBSKH.at[rows_B1, positions_BT].set(k_BTKH)
            v_BSKH = cache.v_LBSKH.at[rows_B1, positions_BT].set(v_BTKH)
            cache = Cache(k_BSKH, v_BSKH)
            attended_BTNH = attend_to_cache(q_BTNH, k_BSKH, v_BSKH, positions_BT)
        return jnp.einsum("BTNH,NHD->BTD", attended_BTNH, self.out_kernel.astype(dtype)), cache


class DecoderMLP(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_dim
        self.gate_kernel = matrix(rngs, (D, F), ("embed", "mlp"), fan_in=D)
        self.up_kernel = matrix(rngs, (D, F), ("embed", "mlp"), fan_in=D)
        self.down_kernel = matrix(rngs, (F, D), ("mlp", "embed"), fan_in=F, scale=1 / math.sqrt(2 * config.num_layers))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_BTF, up_BTF = x_BTD @ self.gate_kernel.astype(dtype), x_BTD @ self.up_kernel.astype(dtype)
        return (jax.nn.silu(gate_BTF) * up_BTF) @ self.down_kernel.astype(dtype)


class DecoderBlock(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attention = DecoderAttention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = DecoderMLP(config, rngs=rngs)

    def __call__(self, x_BTD, rotary, positions_BT, segment_ids_BT, cache, numerics: NumericsConfig):
        with jax.named_scope("attention"):
            attended_BTD, cache = self.attention(
                self.norm1(x_BTD), rotary, positions_BT, segment_ids_BT, cache, numerics
            )
            x_BTD = x_BTD + attended_BTD
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + self.mlp(self.norm2(x_BTD))
        return constrain(x_BTD, "batch", "length", "act_embed"), cache


class Qwen3(nnx.Module):
    """Embeddings in, final hidden states out; `embed` and `logits` are the two ends, apart so that losses can be
    chunked.
    """

    def __init__(self, config: DecoderConfig, numerics: NumericsConfig, *, init_range: float = 0.02, rngs: nnx.Rngs):
        self.config, self.numerics = config, numerics
        V, D = config.vocab_size, config.width
        self.embedding = matrix(rngs, (V, D), ("vocab", "embed"), fan_in=1, scale=init_range)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: DecoderBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(D, config.norm_eps)
        self.head_kernel = None if config.tie_embeddings else matrix(rngs, (D, V), ("embed", "vocab"), fan_in=D)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Token embeddings [B, T, D] in the compute dtype.

        The table is gathered over the axes of its width, whatever the number of tokens. Casting comes after the
        look-up, so that the gradients of a frequent token are added up in the parameters' dtype.
        """
        table_VD = constrain(self.embedding[...], "vocab", None)
        return table_VD[tokens_BT].astype(jnp.dtype(self.numerics.compute_dtype))

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, and the cache with these tokens written at their positions.

        Without a cache, tokens attend causally within their segment (`segment_ids_BT`; None: one segment a row). With
        one, they attend to every slot up to their own position. Positions count from 0 within a segment.
        """
        config, numerics = self.config, self.numerics
        rotary = rotary_1d(positions_BT, config.head_dim, config.rope_theta)

        def layer(x_BTD, block_and_cache):
            block, cache = block_and_cache
            return block(x_BTD, rotary, positions_BT, segment_ids_BT, cache, numerics)

        x_BTD, cache = jax.lax.scan(remat(layer, numerics.remat), x_BTD, (self.blocks, cache))
        return self.norm(x_BTD), cache

    def head(self) -> jax.Array:
        """The output projection [D, V] in the parameters' dtype."""
        return self.embedding[...].T if self.head_kernel is None else self.head_kernel[...]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V]. For training use `training.losses`, which never holds them all."""
        head_DV = self.head().astype(jnp.dtype(self.numerics.compute_dtype))
        return jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
