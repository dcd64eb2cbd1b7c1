"""Reference shared-prefix decode attention: gather every page, one softmax per sequence.

Axes: B sequences, P prefix groups, N query heads, K key/value heads, R = N / K, H head width, W pool width,
S pages of the pool, T tokens of a page, M pages of a table's row, C context: a prefix's tokens, then a suffix's.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention.tables import PageTables


def shared_prefix_attention(
    q_BNH: jax.Array, kv_pages_S2KTW: jax.Array, tables: PageTables, *, scale: float
) -> jax.Array:
    """softmax(scale q k) v over prefix and suffix in float32; zeros without tokens."""
    num_pages, _, num_kv_heads, page_size, _ = kv_pages_S2KTW.shape
    batch, num_heads, width = q_BNH.shape
    num_groups = tables.prefix_lengths_P.shape[0]
    q_BKRH = q_BNH.astype(jnp.float32).reshape(batch, num_kv_heads, num_heads // num_kv_heads, width)

    has_group_B = (tables.group_of_B >= 0) & (tables.group_of_B < num_groups)
    group_B = jnp.where(has_group_B, tables.group_of_B, 0)
    pages_BM = jnp.concatenate([tables.prefix_pages_PM[group_B], tables.suffix_pages_BM], axis=1)
    prefix_size = tables.prefix_pages_PM.shape[1] * page_size
    prefix_lengths_B = jnp.where(has_group_B, tables.prefix_lengths_P[group_B], 0)
    position_C = jnp.arange(pages_BM.shape[1] * page_size)
    valid_BC = jnp.where(
        position_C < prefix_size,
        position_C < prefix_lengths_B[:, None],
        position_C - prefix_size < tables.suffix_lengths_B[:, None],
    )

    kv_BM2KTH = kv_pages_S2KTW[jnp.clip(pages_BM, 0, num_pages - 1), ..., :width].astype(jnp.float32)
    kv_2BKCH = kv_BM2KTH.transpose(2, 0, 3, 1, 4, 5).reshape(2, batch, num_kv_heads, -1, width)
    k_BKCH, v_BKCH = jnp.where(valid_BC[:, None, :, None], kv_2BKCH, 0)  # unused places may hold NaN
    scores_BKRC = scale * jnp.einsum("BKRH,BKCH->BKRC", q_BKRH, k_BKCH, precision="highest")
    scores_BKRC = jnp.where(valid_BC[:, None, None], scores_BKRC, -jnp.inf)
    lse_BKR = jax.nn.logsumexp(scores_BKRC, axis=-1)
    weights_BKRC = jnp.where(valid_BC[:, None, None], jnp.exp(scores_BKRC - lse_BKR[..., None]), 0)
    out_BKRH = jnp.einsum("BKRC,BKCH->BKRH", weights_BKRC, v_BKCH, precision="highest")
    return out_BKRH.reshape(q_BNH.shape).astype(q_BNH.dtype)
