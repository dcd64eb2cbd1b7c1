"""Shared-prefix decode attention in plain XLA, for GPU and CPU.

The same algebra as the TPU kernel: gather each subgroup's prefix once for all its queries, in one batched matrix
product; gather each sequence's suffix once; merge the two by log-sum-exp. An online softmax gathers pages one chunk at
a time, so memory does not grow with the context, and time depends on the longest row in use, not on the tables' width.
XLA cannot skip a short row while a longer one continues, or read pages without copying them.

Axes: B sequences, P prefix groups, G subgroups, I the sequences of a subgroup, N query heads, K key/value heads,
R = N / K, H head width (of the pool), S pages, T tokens of a page, M pages of a table's row, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention.tables import SUBGROUP_SIZE, PageTables, make_subgroups, merge_by_lse

MAX_CHUNK = 1024  # tokens of a row


def shared_prefix_attention(
    q_BNH: jax.Array, kv_pages_S2KTH: jax.Array, tables: PageTables, *, scale: float
) -> jax.Array:
    """out_BNH in q's dtype."""
    num_kv_heads = kv_pages_S2KTH.shape[2]
    batch, num_heads, width = q_BNH.shape
    q_BKRH = q_BNH.reshape(batch, num_kv_heads, num_heads // num_kv_heads, width)

    subgroups = make_subgroups(tables.group_of_B, tables.prefix_lengths_P.shape[0])
    slots = (subgroups.count_G.shape[0], min(batch, SUBGROUP_SIZE))
    who_GI = jnp.full(slots, batch, jnp.int32)
    who_GI = who_GI.at[subgroups.subgroup_of_B, subgroups.member_of_B].set(jnp.arange(batch), mode="drop")
    prefix_GIKRH, prefix_lse_GIKR = attend_pages(
        q_BKRH.at[who_GI].get(mode="fill", fill_value=0),
        kv_pages_S2KTH,
        tables.prefix_pages_PM[subgroups.group_of_G],
        jnp.where(subgroups.count_G > 0, tables.prefix_lengths_P[subgroups.group_of_G], 0),
        scale=scale,
    )
    suffix_BIKRH, suffix_lse_BIKR = attend_pages(
        q_BKRH[:, None], kv_pages_S2KTH, tables.suffix_pages_BM, tables.suffix_lengths_B, scale=scale
    )
    where_B = (subgroups.subgroup_of_B, subgroups.member_of_B)
    out_BKRH = merge_by_lse(
        prefix_GIKRH.at[where_B].get(mode="fill", fill_value=0),
        prefix_lse_GIKR.at[where_B].get(mode="fill", fill_value=-jnp.inf),
        suffix_BIKRH[:, 0],
        suffix_lse_BIKR[:, 0],
    )
    return out_BKRH.reshape(q_BNH.shape).astype(q_BNH.dtype)


def attend_pages(
    q_GIKRH: jax.Array,
    kv_pages_S2KTH: jax.Array,
    pages_GM: jax.Array,
    lengths_G: jax.Array,
    *,
    scale: float,
    visible_GI: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of all queries of a subgroup over its pages: (out_GIKRH, lse_GIKR), float32.

    Args:
      visible_GI: each query sees this many of the subgroup's first tokens; all of them by default.
    """
    num_pages, _, num_kv_heads, page_size, width = kv_pages_S2KTH.shape
    num_groups, members, _, repeats, _ = q_GIKRH.shape
    # Gathering past the end of a row is wasted, so chunks of many rows are short, down to a page; but limit the loop to
    # 64 iterations.
    most = pages_GM.shape[1] * page_size
    chunk_tokens = min(max(512 // num_groups, most // 64), MAX_CHUNK)
    step = min(max(1, chunk_tokens // page_size), pages_GM.shape[1])
    lengths_G = jnp.clip(lengths_G, 0, pages_GM.shape[1] * page_size)
    pages_GM = jnp.clip(pages_GM, 0, num_pages - 1)
    pages_GM = jnp.pad(pages_GM, ((0, 0), (0, -pages_GM.shape[1] % step)))
    q_GKXH = q_GIKRH.transpose(0, 2, 1, 3, 4).reshape(num_groups, num_kv_heads, members * repeats, width)
    head_K1 = jnp.arange(num_kv_heads)[:, None]
    precision = "highest" if q_GIKRH.dtype == jnp.float32 else None

    def attend_chunk(carry):
        chunk, max_GKX, sum_GKX, acc_GKXH = carry
        chunk_pages = jax.lax.dynamic_slice_in_dim(pages_GM, chunk * step, step, axis=1)
        # Gather head by head: a head's pages are then contiguous, as the products need them.
        k_GKCH, v_GKCH = (
            kv_pages_S2KTH[chunk_pages[:, None], i, head_K1].reshape(num_groups, num_kv_heads, -1, width)
            for i in range(2)
        )
        valid_GC = chunk * step * page_size + jnp.arange(step * page_size) < lengths_G[:, None]
        scores_GKXC = scale * jnp.einsum(
            "GKXH,GKCH->GKXC", q_GKXH, k_GKCH, precision=precision, preferred_element_type=jnp.float32
        )
        seen_GXC = valid_GC[:, None]
        if visible_GI is not None:
            visible_GX = jnp.repeat(visible_GI, repeats, axis=1)
            seen_GXC = seen_GXC & (chunk * step * page_size + jnp.arange(step * page_size) < visible_GX[..., None])
        scores_GKXC = jnp.where(seen_GXC[:, None], scores_GKXC, -jnp.inf)
        new_max_GKX = jnp.maximum(max_GKX, scores_GKXC.max(axis=-1))
        shift_GKX = jnp.where(new_max_GKX == -jnp.inf, 0, new_max_GKX)
        weights_GKXC = jnp.exp(scores_GKXC - shift_GKX[..., None])
        decay_GKX = jnp.exp(max_GKX - shift_GKX)
        v_GKCH = jnp.where(valid_GC[:, None, :, None], v_GKCH, 0)  # unused places may hold NaN, and 0 x NaN is NaN
        update_GKXH = jnp.einsum(
            "GKXC,GKCH->GKXH",
            weights_GKXC.astype(v_GKCH.dtype),
            v_GKCH,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        sum_GKX = decay_GKX * sum_GKX + weights_GKXC.sum(axis=-1)
        return chunk + 1, new_max_GKX, sum_GKX, decay_GKX[..., None] * acc_GKXH + update_GKXH

    rows = q_GKXH.shape[:3]
    start = jnp.int32(0), jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(q_GKXH.shape, jnp.float32)
    longest = jnp.max(lengths_G)
    _, max_GKX, sum_GKX, acc_GKXH = jax.lax.while_loop(
        lambda carry: carry[0] * step * page_size < longest, attend_chunk, start
    )
    empty_GKX = sum_GKX == 0
    out_GKXH = acc_GKXH / jnp.where(empty_GKX, 1, sum_GKX)[..., None]
    lse_GKX = jnp.where(empty_GKX, -jnp.inf, max_GKX + jnp.log(jnp.where(empty_GKX, 1, sum_GKX)))

    def ungroup(x_GKX):
        return x_GKX.reshape(num_groups, num_kv_heads, members, repeats, *x_GKX.shape[3:]).swapaxes(1, 2)

    return ungroup(out_GKXH), ungroup(lse_GKX)
