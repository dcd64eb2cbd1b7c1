"""The backward kernel on a TPU core: the gradients of queries, keys and values in one pass over the tiles.

Legend: B rows, K key-value heads, N = R * K query heads, T queries, S keys, H head dim; in a tile Q queries, C keys;
P partial sums.

With s = q k^T in units of log2, the weights are p = exp2(s - lse): the forward pass already knows the log-sum-exp, so
no maximum is needed. For a cotangent do of the output and dlse of the log-sum-exp,

    dv = p^T do    dp = do v^T    ds = p (dp - delta)    dq = ds k    dk = ds^T q    delta = sum(do * out) - dlse

Tiles are visited key block by key block. The gradients of a key block stay in vector memory over all its queries, as
dk^T and dv^T: the matrix unit then holds the tiles of p and ds while the H rows of q^T and do^T stream past, half the
work on 256-wide units. The gradients of a chunk of queries stay too, so every tile is computed once and nothing is
accumulated in HBM. If the queries need several chunks (see `chunk_blocks`), each has its own partial sums of dk and dv.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.tiles import (
    MASKED,
    clear_tail,
    column,
    scores,
    strike_tail,
    take,
    visible,
    weighted,
    weighted_by_rows,
)
from pallas_kernels.flash_attention.tpu_forward import LOG2E, VMEM_LIMIT

_CHUNK_BYTES = 16 * 2**20  # vector memory for the gradients of a chunk of queries


def chunk_blocks(num_blocks: int, block_q: int, head_dim: int) -> int:
    """Query blocks per chunk: as many as fit, spread evenly."""
    block_bytes = 4 * (-(-block_q // 128) * 128) * head_dim
    chunks = -(-num_blocks // max(1, _CHUNK_BYTES // block_bytes))
    return -(-num_blocks // chunks)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse_BN1T: jax.Array,
    delta_BN1T: jax.Array,
    q_ids_B1T: jax.Array | None,
    kv_ids_B1S: jax.Array | None,
    q_offset_1: jax.Array,
    items: blocks.Items,
    geometry: blocks.Geometry,
    chunk: int,
    scale: float,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients with respect to the unscaled queries (q itself is in log2 units), the keys and the values.

    q is [B, N, T, H] or [B, N, H, T] depending on the geometry's order, all others likewise. dk and dv have a leading
    axis P to sum over, in float32 unless P is 1. `lse` is in log2 units, and 1e30 for queries that see nothing.
    """
    g, (B, N), K = geometry, q.shape[:2], k.shape[1]
    (T, H), S = g.order.sizes(q.shape), g.padded_keys
    R = N // K
    num_chunks = -(-(R * g.num_query_blocks) // chunk)

    def place(item, n):
        """Row, head and query block of an item; items number query blocks over the heads that share keys."""
        row, query_block = blocks.row_and_query(item)
        return row, n * R + query_block // g.num_query_blocks, query_block % g.num_query_blocks

    def at_query(n, m, where, what, done, offset):
        row, head, query_block = place(where[m], n)
        return row, head, *g.order.pair(query_block, 0)

    def at_query_lanes(n, m, where, what, done, offset):
        row, head, query_block = place(where[m], n)
        return row, head, 0, query_block

    def at_query_ids(n, m, where, what, done, offset):
        row, _, query_block = place(where[m], n)
        return row, 0, query_block

    def at_key(n, m, where, what, done, offset):
        return blocks.row_and_query(where[m])[0], n, *g.order.pair(blocks.key(what[m]), 0)

    def at_key_ids(n, m, where, what, done, offset):
        return blocks.row_and_query(where[m])[0], 0, blocks.key(what[m])

    def at_partial(n, m, where, what, done, offset):
        row, query_block = blocks.row_and_query(where[m])
        return query_block // chunk, row, n, *g.order.pair(blocks.key(what[m]), 0)

    def at_done(n, m, where, what, done, offset):
        row, head, query_block = place(done[m], n)
        return row, head, *g.order.pair(query_block, 0)

    q_shape, kv_shape = g.order.pair(g.block_q, H), g.order.pair(g.block_kv, H)
    q_spec = pl.BlockSpec((None, None, *q_shape), at_query)
    lanes_spec = pl.BlockSpec((None, None, 1, g.lanes_q), at_query_lanes)
    kv_spec = pl.BlockSpec((None, None, *kv_shape), at_key)
    in_specs = [q_spec, kv_spec, kv_spec, q_spec, lanes_spec, lanes_spec]
    inputs = [q, k, v, d_out, lse_BN1T, delta_BN1T]
    if q_ids_B1T is not None and kv_ids_B1S is not None:
        in_specs += [pl.BlockSpec((None, 1, g.block_q), at_query_ids), pl.BlockSpec((None, 1, g.block_kv), at_key_ids)]
        inputs += [q_ids_B1T, kv_ids_B1S]

    partial_dtype = k.dtype if num_chunks == 1 else jnp.float32
    partial_spec = pl.BlockSpec((None, None, None, *kv_shape), at_partial)
    partial_shape = jax.ShapeDtypeStruct((num_chunks, *k.shape), partial_dtype)
    pairs = B * N * T * S / (2 if g.causal else 1)
    return pl.pallas_call(
        partial(_kernel, geometry=g, chunk=chunk, scale=scale, segmented=len(inputs) > 6),
        name="flash_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K, items.count),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((None, None, *q_shape), at_done), partial_spec, partial_spec],
            scratch_shapes=[
                pltpu.VMEM((chunk, *q_shape), jnp.float32),  # gradients of the chunk's queries
                pltpu.VMEM((H, g.block_kv), jnp.float32),  # of the keys, transposed
                pltpu.VMEM((H, g.block_kv), jnp.float32),  # of the values, transposed
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), partial_shape, partial_shape],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(10 * pairs * H),
            transcendentals=int(pairs),
            bytes_accessed=int(2 * sum(x.size * x.dtype.itemsize for x in (q, d_out, k, v))),
        ),
        interpret=interpret,
    )(items.where_M, items.what_M, items.done_M, q_offset_1, *inputs)


def _kernel(
    where_ref, what_ref, done_ref, offset_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *refs,
    geometry: blocks.Geometry, chunk: int, scale: float, segmented: bool,
):  # fmt: skip
    (q_ids_ref, kv_ids_ref), refs = (refs[:2], refs[2:]) if segmented else ((None, None), refs)
    dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref = refs
    g = geometry
    item = pl.program_id(1)
    what = what_ref[item]
    kind, key_block = blocks.kind(what), blocks.key(what)
    query_block = blocks.row_and_query(where_ref[item])[1]
    place = query_block % g.num_query_blocks  # within its head
    first_query = place * g.block_q + offset_ref[0]
    first_key = key_block * g.block_kv
    slot = query_block % chunk

    @pl.when((what & blocks.FIRST_OF_KEY) > 0)
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when((what & blocks.FIRST_OF_QUERY) > 0)
    def _():
        dq_acc_ref[slot] = jnp.zeros_like(dq_acc_ref[slot])

    def masked(scores_QC, queries, keys):
        """Masked scores of a part of the tile; `queries` and `keys` are (start, size)."""
        if not g.causal and not segmented:
            return strike_tail(scores_QC, g, axis=1)
        q_ids: jax.Array | None = None
        kv_ids: jax.Array | None = None
        if q_ids_ref is not None and kv_ids_ref is not None:
            q_ids = jnp.broadcast_to(column(q_ids_ref[:, pl.ds(*queries)], 128)[:, :1], scores_QC.shape)
            kv_ids = kv_ids_ref[:, pl.ds(*keys)]
        mask = visible(
            scores_QC.shape,
            q_axis=0,
            first_query=first_query + queries[0],
            first_key=first_key + keys[0],
            causal=g.causal,
            num_keys=g.num_keys if g.is_ragged else None,
            q_ids=q_ids,
            kv_ids=kv_ids,
        )
        return jnp.where(mask, scores_QC, MASKED)

    def differentiate(queries, keys, mask):
        """Add a part of the tile to the three gradients."""
        c = slice(keys[0], sum(keys))
        lanes = slice(queries[0], -(-sum(queries) // 128) * 128)
        q, d_out = (
            jax.lax.slice_in_dim(clear_tail(ref[...], g, place), queries[0], sum(queries), axis=g.order.axis)
            for ref in (q_ref, d_out_ref)
        )
        k, v = (take(ref, g.order, *keys) for ref in (k_ref, v_ref))
        scores_QC = mask(scores(q, k, g.order), queries, keys)
        d_weights_QC = scores(d_out, v, g.order)
        weights_QC = jnp.exp2(scores_QC - column(lse_ref[:, lanes], keys[1])[: queries[1]])
        dv_acc_ref[:, c] += weighted(d_out, weights_QC, g.order)
        delta_QC = column(delta_ref[:, lanes], keys[1])[: queries[1]]
        d_scores_QC = (weights_QC * (d_weights_QC - delta_QC)).astype(q_ref.dtype)
        dk_acc_ref[:, c] += weighted(q, d_scores_QC, g.order)
        dq_acc_ref[(slot, *g.order.pair(pl.ds(*queries), slice(None)))] += weighted_by_rows(k, d_scores_QC, g.order)

    @pl.when(kind == blocks.FULL)
    def _():
        differentiate((0, g.block_q), (0, g.block_kv), lambda scores_QC, queries, keys: scores_QC)

    if g.has_general or segmented:

        @pl.when(kind == blocks.GENERAL)
        def _():
            differentiate((0, g.block_q), (0, g.block_kv), masked)

    if g.has_triangles:

        @pl.when(kind == blocks.TRIANGLE)
        def _():
            step = g.diagonal
            for start in range(0, g.block_q, step):

                def mask_corner(scores_QC, queries, keys):
                    corner_CC = masked(scores_QC[: keys[1]], (queries[0], keys[1]), keys)
                    rest = [scores_QC[keys[1] :]] if queries[1] > keys[1] else []
                    return jnp.concatenate([corner_CC, *rest], axis=0)

                mask = masked if segmented else mask_corner
                differentiate((start, g.block_q - start), (start, step), mask)

    @pl.when((what & blocks.LAST_OF_QUERY) > 0)
    def _():
        dq_ref[...] = (dq_acc_ref[slot] * scale).astype(dq_ref.dtype)

    @pl.when((what & blocks.LAST_OF_KEY) > 0)
    def _():
        for ref, x_HC in ((dk_ref, dk_acc_ref[...] * (1 / LOG2E)), (dv_ref, dv_acc_ref[...])):
            ref[...] = (x_HC if g.order.tokens_in_lanes else x_HC.T).astype(ref.dtype)
