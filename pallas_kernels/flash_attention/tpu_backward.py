"""The backward kernel on a TPU core: the gradients of queries, keys and values in one pass over the tiles.

Legend: B rows, K key-value heads, R query heads a key-value head, T queries, S keys, H head dim, G = R * T queries of
all heads that share a key-value head; in a tile Q queries, C keys; P partial sums.

With s = q k^T in units of log2, the weights are p = exp2(s - lse): the forward pass already knows the log-sum-exp, so
no maximum is needed. For a cotangent do of the output and dlse of the log-sum-exp,

    dv = p^T do    dp = do v^T    ds = p (dp - delta)    dq = ds k    dk = ds^T q    delta = sum(do * out) - dlse

Tiles are visited key block by key block. The gradients of a key block stay in vector memory over its queries, as dk^T
and dv^T: then the tiles of p and ds are what the matrix unit holds while the H rows of q^T and do^T stream past, which
is half the work on 256-wide units. The gradients of a chunk of queries stay too, so that every tile is made once and
nothing is added up in HBM; what exceeds the chunk (see `chunk_blocks`) costs a partial sum of dk and dv a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.tiles import MASKED, column, dot_nn, dot_nt, dot_tn, dot_tt, strike_tail, visible
from pallas_kernels.flash_attention.tpu_forward import LOG2E, VMEM_LIMIT

_CHUNK_BYTES = 16 * 2**20  # of vector memory for the gradients of a chunk of queries


def chunk_blocks(num_blocks: int, block_q: int, head_dim: int) -> int:
    """Query blocks of a chunk: as many as fit, spread evenly."""
    block_bytes = 4 * block_q * (-(-head_dim // 128) * 128)
    chunks = -(-num_blocks // max(1, _CHUNK_BYTES // block_bytes))
    return -(-num_blocks // chunks)


def backward(
    q_BKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    d_out_BKGH: jax.Array,
    lse_BK1G: jax.Array,
    delta_BK1G: jax.Array,
    q_ids_B1T: jax.Array | None,
    kv_ids_B1S: jax.Array | None,
    q_offset_1: jax.Array,
    items: blocks.Items,
    geometry: blocks.Geometry,
    chunk: int,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients with respect to the scaled queries (in units of log2), the keys and the values.

    `lse` is in units of log2, +inf-like (1e30) for queries that see nothing. dk and dv come as [P, B, K, S, H]: to be
    summed over P, in float32 unless P is 1.
    """
    B, K, G, H = q_BKGH.shape
    S = k_BKSH.shape[2]
    g = geometry
    num_chunks = -(-(G // g.block_q) // chunk)

    def query(m, where):
        return blocks.row_and_query(where[m])

    def at_query(n, m, where, what, done, offset):
        row, query_block = query(m, where)
        return row, n, query_block, 0

    def at_query_lanes(n, m, where, what, done, offset):
        row, query_block = query(m, where)
        return row, n, 0, query_block

    def at_query_ids(n, m, where, what, done, offset):
        row, query_block = query(m, where)
        return row, 0, query_block % g.num_query_blocks

    def at_key(n, m, where, what, done, offset):
        return query(m, where)[0], n, blocks.key(what[m]), 0

    def at_key_ids(n, m, where, what, done, offset):
        return query(m, where)[0], 0, blocks.key(what[m])

    def at_partial(n, m, where, what, done, offset):
        row, query_block = query(m, where)
        return query_block // chunk, row, n, blocks.key(what[m]), 0

    def at_done(n, m, where, what, done, offset):
        row, query_block = query(m, done)
        return row, n, query_block, 0

    q_spec = pl.BlockSpec((None, None, g.block_q, H), at_query)
    lanes_spec = pl.BlockSpec((None, None, 1, g.block_q), at_query_lanes)
    kv_spec = pl.BlockSpec((None, None, g.block_kv, H), at_key)
    in_specs = [q_spec, kv_spec, kv_spec, q_spec, lanes_spec, lanes_spec]
    inputs = [q_BKGH, k_BKSH, v_BKSH, d_out_BKGH, lse_BK1G, delta_BK1G]
    if q_ids_B1T is not None and kv_ids_B1S is not None:
        in_specs += [pl.BlockSpec((None, 1, g.block_q), at_query_ids), pl.BlockSpec((None, 1, g.block_kv), at_key_ids)]
        inputs += [q_ids_B1T, kv_ids_B1S]

    partial_dtype = k_BKSH.dtype if num_chunks == 1 else jnp.float32
    partial_spec = pl.BlockSpec((None, None, None, g.block_kv, H), at_partial)
    partial_shape = jax.ShapeDtypeStruct((num_chunks, B, K, S, H), partial_dtype)
    pairs = B * K * G * S / (2 if g.causal else 1)
    return pl.pallas_call(
        partial(_kernel, geometry=g, chunk=chunk, segmented=len(inputs) > 6),
        name="flash_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K, items.count),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((None, None, g.block_q, H), at_done), partial_spec, partial_spec],
            scratch_shapes=[
                pltpu.VMEM((chunk, *_d_query_shape(g.block_q, H)), jnp.float32),  # gradients of the chunk's queries
                pltpu.VMEM((H, g.block_kv), jnp.float32),  # of the keys, transposed
                pltpu.VMEM((H, g.block_kv), jnp.float32),  # of the values, transposed
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q_BKGH.shape, q_BKGH.dtype), partial_shape, partial_shape],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(10 * pairs * H),
            transcendentals=int(pairs),
            bytes_accessed=int(2 * sum(x.size * x.dtype.itemsize for x in (q_BKGH, d_out_BKGH, k_BKSH, v_BKSH))),
        ),
        interpret=interpret,
    )(items.where_M, items.what_M, items.done_M, q_offset_1, *inputs)


def _kernel(
    where_ref, what_ref, done_ref, offset_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *refs,
    geometry: blocks.Geometry, chunk: int, segmented: bool,
):  # fmt: skip
    (q_ids_ref, kv_ids_ref), refs = (refs[:2], refs[2:]) if segmented else ((None, None), refs)
    dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref = refs
    g = geometry
    item = pl.program_id(1)
    what = what_ref[item]
    kind, key_block = blocks.kind(what), blocks.key(what)
    query_block = blocks.row_and_query(where_ref[item])[1]
    first_query = query_block % g.num_query_blocks * g.block_q + offset_ref[0]
    first_key = key_block * g.block_kv
    slot = query_block % chunk
    dq_is_transposed = q_ref.shape[1] % 128 != 0

    @pl.when((what & blocks.FIRST_OF_KEY) > 0)
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when((what & blocks.FIRST_OF_QUERY) > 0)
    def _():
        dq_acc_ref[slot] = jnp.zeros_like(dq_acc_ref[slot])

    def masked(scores_QC, queries, keys):
        """Scores of a part of the tile with what no query sees struck out; `queries` and `keys` are (start, size)."""
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
        """Add what a part of the tile contributes to the three gradients."""
        q, c = slice(queries[0], sum(queries)), slice(keys[0], sum(keys))
        scores_QC = mask(dot_nt(q_ref[q, :], k_ref[c, :]), queries, keys)
        d_weights_QC = dot_nt(d_out_ref[q, :], v_ref[c, :])
        weights_QC = jnp.exp2(scores_QC - _columns(lse_ref[:, q], keys[1]))
        dv_acc_ref[:, c] += dot_tn(d_out_ref[q, :], weights_QC.astype(v_ref.dtype))
        d_scores_QC = (weights_QC * (d_weights_QC - _columns(delta_ref[:, q], keys[1]))).astype(q_ref.dtype)
        dk_acc_ref[:, c] += dot_tn(q_ref[q, :], d_scores_QC)
        if dq_is_transposed:
            dq_acc_ref[slot, :, q] += dot_tt(k_ref[c, :], d_scores_QC)
        else:
            dq_acc_ref[slot, q, :] += dot_nn(d_scores_QC, k_ref[c, :])

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
        dq = dq_acc_ref[slot]
        dq_ref[...] = (dq.T if dq_is_transposed else dq).astype(dq_ref.dtype)

    @pl.when((what & blocks.LAST_OF_KEY) > 0)
    def _():
        dk_ref[...] = (dk_acc_ref[...] * (1 / LOG2E)).T.astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].T.astype(dv_ref.dtype)


def _d_query_shape(block_q: int, head_dim: int) -> tuple[int, int]:
    """Query gradients are kept transposed where a head does not fill the lanes: 96 rows cost what 96 rows cost, and 96
    lanes what 128 do. (At 128 the two orders cost the same.)"""
    return (block_q, head_dim) if head_dim % 128 == 0 else (head_dim, block_q)


def _columns(row_1Q: jax.Array, width: int) -> jax.Array:
    """A number a query, next to each of `width` keys."""
    if width % 128 == 0:
        return column(row_1Q, width)
    return jnp.broadcast_to(column(row_1Q, 128)[:, :1], (row_1Q.shape[1], width))
