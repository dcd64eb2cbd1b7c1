"""The Qwen3 decoder: grouped-query attention with per-head query and key norms, rotary halves, SwiGLU.

Legend: B rows, T tokens, D width, N query heads, K key-value heads, H head dim, F MLP width, V
vocabulary, L layers.

With `qk_norm=False` and `tie_embeddings=True` it is a plain Llama-like decoder.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stepjax.config import DecoderConfig, NumericsConfig
from stepjax.models.attention import attend
from stepjax.models.layers import RMSNorm, matrix, project, rotary_1d, rotate_halves
from stepjax.models.paged_cache import PagedCache, append_and_attend
from stepjax.models.remat import run_layers
from stepjax.sharding import constrain


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

    def __call__(self, x_BTD, rotary, ids, cache, numerics: NumericsConfig):
        dtype = x_BTD.dtype
        q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.q_kernel.astype(dtype))
        k_BTKH = project("BTD,DKH->BTKH", x_BTD, self.k_kernel.astype(dtype))
        v_BTKH = project("BTD,DKH->BTKH", x_BTD, self.v_kernel.astype(dtype))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate_halves(q_BTNH, *rotary), rotate_halves(k_BTKH, *rotary)

        if cache is None:
            attended_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                causal=True,
                segment_ids_BT=ids[0],
                prefix_ids_BT=ids[1],
                length_axis="length",
                implementation=numerics.attention,
            )
        else:
            attended_BTNH, cache = append_and_attend(q_BTNH, k_BTKH, v_BTKH, cache, numerics.attention)
        return project("BTNH,NHD->BTD", attended_BTNH, self.out_kernel.astype(dtype)), cache


class DecoderMLP(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_dim
        self.gate_kernel = matrix(rngs, (D, F), ("embed", "mlp"), fan_in=D)
        self.up_kernel = matrix(rngs, (D, F), ("embed", "mlp"), fan_in=D)
        self.down_kernel = matrix(rngs, (F, D), ("mlp", "embed"), fan_in=F, scale=1 / math.sqrt(2 * config.num_layers))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate_kernel.astype(dtype))
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up_kernel.astype(dtype))
        return project("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_kernel.astype(dtype))


class DecoderBlock(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attention = DecoderAttention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = DecoderMLP(config, rngs=rngs)

    def __call__(self, x_BTD, rotary, ids, cache, numerics: NumericsConfig):
        with jax.named_scope("attention"):
            attended_BTD, cache = self.attention(self.norm1(x_BTD), rotary, ids, cache, numerics)
            x_BTD = x_BTD + attended_BTD
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + self.mlp(self.norm2(x_BTD))
        return constrain(x_BTD, "batch", "length", "act_embed"), cache


class Qwen3(nnx.Module):
    """Embeddings in, final hidden states out. `embed` and `logits` are separate so that losses can be chunked."""

    def __init__(self, config: DecoderConfig, numerics: NumericsConfig, *, init_range: float = 0.02, rngs: nnx.Rngs):
        self.config, self.numerics = config, numerics
        V, D = config.vocab_size, config.width
        self.embedding = matrix(rngs, (V, D), ("vocab", "embed"), fan_in=1, scale=init_range)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: DecoderBlock(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(D, config.norm_eps)
        self.head_kernel = None if config.tie_embeddings else matrix(rngs, (D, V), ("embed", "vocab"), fan_in=D)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings [B, T, D] in the compute dtype.

        The table is all-gathered over its width axes, for any number of tokens. The cast follows the look-up, so that
        gradients of frequent tokens accumulate in the parameters' dtype.
        """
        table_VD = constrain(self.embedding[...], "vocab", None)
        return table_VD[tokens_BT].astype(jnp.dtype(self.numerics.compute_dtype))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        cache: PagedCache | None = None,
        prefix_ids_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PagedCache | None]:
        """Hidden states after the final norm, and the cache with these tokens' keys and values added.

        Without a cache, tokens attend causally within their segment (`segment_ids_BT`; None: one segment per row) and
        to all of the segment that `prefix_ids_BT` names (see `attend`). With a cache, its `reads` decide what they see.
        Positions count from 0 within a segment, or go on from the end of its prefix.
        """
        rotary = rotary_1d(positions_BT, self.config)
        if cache is not None:
            return self._with_cache(x_BTD, rotary, positions_BT, cache)

        def layer(x_BTD, block):
            return block(x_BTD, rotary, (segment_ids_BT, prefix_ids_BT), None, self.numerics)[0]

        return self.norm(run_layers(layer, x_BTD, self.blocks, self.numerics.remat)), None

    def _with_cache(self, x_BTD, rotary, positions_BT, cache: PagedCache) -> tuple[jax.Array, PagedCache]:
        # Carry the pool through the scan so that each layer writes its own pages in place.
        def layer(carry, block_and_index):
            x_BTD, cache = carry
            block, index = block_and_index
            at_layer = cache.at_layer(index, self.config.num_layers)
            return block(x_BTD, rotary, None, at_layer, self.numerics), None

        layers = jnp.arange(self.config.num_layers)
        (x_BTD, cache), _ = jax.lax.scan(layer, (x_BTD, cache), (self.blocks, layers))
        return self.norm(x_BTD), cache

    def head(self) -> Float[Array, "D V"]:
        """The output projection [D, V] in the parameters' dtype."""
        return self.embedding[...].T if self.head_kernel is None else self.head_kernel[...]

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits [B, T, V]. For training use `training.losses`, which never materialises them all."""
        head_DV = self.head().astype(jnp.dtype(self.numerics.compute_dtype))
        return jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
