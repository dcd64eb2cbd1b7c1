"""Which tokens are allowed, one bit a token: word i // 32, bit i % 32 (the least significant first) of int32 words.

The layout of the masks that grammar engines (XGrammar, llguidance) write.
Legend: B rows, V vocabulary, W = ceil(V / 32).
"""

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32


def words_for(vocab_size: int) -> int:
    return -(-vocab_size // WORD)


def pack(allowed_BV: jax.Array | np.ndarray) -> jax.Array:
    """bool [B, V] (true: may be drawn) -> int32 [B, W]; the bits past V are zero."""
    allowed_BV = jnp.asarray(allowed_BV)
    rows, vocab_size = allowed_BV.shape
    words = words_for(vocab_size)
    bits = jnp.pad(allowed_BV.astype(jnp.uint32), ((0, 0), (0, words * WORD - vocab_size)))
    shifted = bits.reshape(rows, words, WORD) << jnp.arange(WORD, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(jnp.sum(shifted, axis=2, dtype=jnp.uint32), jnp.int32)


def unpack(allowed_BW: jax.Array, vocab_size: int) -> jax.Array:
    """int32 or uint32 [B, W] -> bool [B, V]."""
    rows, words = allowed_BW.shape
    bits = allowed_BW.astype(jnp.uint32)[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)
    return ((bits & 1) != 0).reshape(rows, words * WORD)[:, :vocab_size]
