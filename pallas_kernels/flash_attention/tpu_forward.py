"""The forward kernel on a TPU core.

Legend: B rows, N query heads, K key-value heads, T queries, S keys, H head dim; in a tile Q queries, C keys.

Scores are computed transposed, S_CQ = k q^T, with one query per lane: maxima and sums over keys combine whole
registers, and the tile of weights goes into the matrix unit directly while only the H rows of v^T stream past it. On
the 256-wide units of v6e and later this halves the cost of the second product.

The softmax is optimistic. Textbook online softmax needs the maximum of a tile before it can exponentiate the first
score, so all scores go to memory and back, and the matrix unit waits. But softmax is the same for any reference r in
exp2(s - r) that neither overflows nor makes everything underflow. So we compute a tile against its queries' current
reference (initially 0), and the sums show afterwards whether that was safe:

    2^-60 <= sum <= 2^100    for every query that sees a key

If it was unsafe for any query, we discard the tile's result and recompute the tile with online softmax. That takes
logits beyond about +-41 nats and mostly happens once per query block, because the repair makes the true maximum the new
reference. Nothing is approximated: the weights' relative precision does not depend on the reference.
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
)

LOG2E = 1.4426950408889634
_LOW, _HIGH = 2.0**-60, 2.0**100
_REPAIR_KEYS = 256  # keys per repair step; small, because its code rarely runs but is always stored
VMEM_LIMIT = 60 * 2**20  # v5p and tpu7x have 64 MiB


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids_B1T: jax.Array | None,
    kv_ids_B1S: jax.Array | None,
    q_offset_1: jax.Array,
    items: blocks.Items,
    geometry: blocks.Geometry,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """Output like q and natural log-sum-exp [B, N, 1, T] of queries already scaled by scale * log2(e).

    q is [B, N, T, H] or [B, N, H, T] depending on the geometry's order, k and v likewise; keys fill whole blocks. A
    query that sees no key gives 0 and -inf.
    """
    g, (B, N) = geometry, q.shape[:2]
    (T, H), S = g.order.sizes(q.shape), g.padded_keys
    R = N // k.shape[1]

    def at_query(n, m, where, what, offset):
        row, query = blocks.row_and_query(where[m])
        return row, n, *g.order.pair(query, 0)

    def at_query_lanes(n, m, where, what, offset):
        row, query = blocks.row_and_query(where[m])
        return row, n, 0, query

    def at_key(n, m, where, what, offset):
        return blocks.row_and_query(where[m])[0], n // R, *g.order.pair(blocks.key(what[m]), 0)

    def at_query_ids(n, m, where, what, offset):
        row, query = blocks.row_and_query(where[m])
        return row, 0, query

    def at_key_ids(n, m, where, what, offset):
        return blocks.row_and_query(where[m])[0], 0, blocks.key(what[m])

    q_spec = pl.BlockSpec((None, None, *g.order.pair(g.block_q, H)), at_query)
    kv_spec = pl.BlockSpec((None, None, *g.order.pair(g.block_kv, H)), at_key)
    in_specs, inputs = [q_spec, kv_spec, kv_spec], [q, k, v]
    if q_ids_B1T is not None and kv_ids_B1S is not None:
        in_specs += [pl.BlockSpec((None, 1, g.block_q), at_query_ids), pl.BlockSpec((None, 1, g.block_kv), at_key_ids)]
        inputs += [q_ids_B1T, kv_ids_B1S]

    pairs = B * N * T * S / (2 if g.causal else 1)
    return pl.pallas_call(
        partial(_kernel, geometry=g, segmented=len(inputs) > 3),
        name="flash_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(N, items.count),
            in_specs=in_specs,
            out_specs=[q_spec, pl.BlockSpec((None, None, 1, g.block_q), at_query_lanes)],
            scratch_shapes=[
                pltpu.VMEM((1, g.block_q), jnp.float32),  # reference
                pltpu.VMEM((2, 1, g.block_q), jnp.float32),  # sum of weights; two slots: before and after a tile
                pltpu.VMEM((2, H, g.block_q), jnp.float32),  # weighted values
                pltpu.VMEM((1, g.block_q), jnp.float32),  # highest visible score of each query
                pltpu.SMEM((1,), jnp.int32),  # current slot
                pltpu.SMEM((1,), jnp.int32),  # whether the tile must be repaired
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(4 * pairs * H),
            transcendentals=int(pairs),
            bytes_accessed=int(sum(x.size * x.dtype.itemsize for x in (q, q, k, v))),
        ),
        interpret=interpret,
    )(items.where_M, items.what_M, q_offset_1, *inputs)


def _kernel(where_ref, what_ref, offset_ref, q_ref, k_ref, v_ref, *refs, geometry: blocks.Geometry, segmented: bool):
    (q_ids_ref, kv_ids_ref), refs = (refs[:2], refs[2:]) if segmented else ((None, None), refs)
    out_ref, lse_ref, reference_ref, sum_ref, acc_ref, seen_ref, slot_ref, repairs_ref = refs
    g = geometry
    item = pl.program_id(1)
    what = what_ref[item]
    kind, key_block = blocks.kind(what), blocks.key(what)
    query_block = blocks.row_and_query(where_ref[item])[1]
    first_query, first_key = query_block * g.block_q + offset_ref[0], key_block * g.block_kv

    @pl.when((what & blocks.FIRST_OF_QUERY) > 0)
    def _():
        slot_ref[0] = 0
        reference_ref[...] = jnp.zeros_like(reference_ref)
        sum_ref[0] = jnp.zeros_like(sum_ref[0])
        acc_ref[0] = jnp.zeros_like(acc_ref[0])

    old, new = slot_ref[0], 1 - slot_ref[0]

    whole_keys, whole_queries = (0, g.block_kv), (0, g.block_q)

    def tile_scores(keys, queries):
        """Scores [C, Q] of a part of the tile; `keys` and `queries` are (start, size)."""
        q = clear_tail(q_ref[...], g, query_block)
        q = jax.lax.slice_in_dim(q, queries[0], sum(queries), axis=g.order.axis)
        return scores(take(k_ref, g.order, *keys), q, g.order)

    def masked(scores_CQ, keys, queries, causal=g.causal):
        """Masked scores of a part of the tile; `keys` and `queries` are (start, size)."""
        if not causal and not segmented and keys is whole_keys:
            return strike_tail(scores_CQ, g, axis=0)
        q_ids: jax.Array | None = None
        kv_ids: jax.Array | None = None
        if q_ids_ref is not None and kv_ids_ref is not None:
            q_ids = q_ids_ref[:, pl.ds(*queries)]
            kv_ids = jnp.broadcast_to(column(kv_ids_ref[:, pl.ds(*keys)], 128)[:, :1], scores_CQ.shape)
        mask = visible(
            scores_CQ.shape,
            q_axis=1,
            first_query=first_query + queries[0],
            first_key=first_key + keys[0],
            causal=causal,
            num_keys=g.num_keys if g.is_ragged else None,
            q_ids=q_ids,
            kv_ids=kv_ids,
        )
        return jnp.where(mask, scores_CQ, MASKED)

    def weigh(scores_CQ, keys, queries):
        """Sums of the weights [1, Q] and of the weighted values [H, Q] of a part of the tile."""
        weights_CQ = jnp.exp2(scores_CQ - reference_ref[:, pl.ds(*queries)])
        weighted_HQ = weighted(take(v_ref, g.order, *keys), weights_CQ, g.order)
        return jnp.sum(weights_CQ, axis=0, keepdims=True), weighted_HQ

    def judge(sees_1Q):
        """Switch to the new slot, or request a repair if a query that sees a key left the safe range."""
        sums_1Q = sum_ref[new]
        safe_1Q = (sums_1Q >= _LOW) & (sums_1Q <= _HIGH)
        if sees_1Q is not None:
            safe_1Q |= ~(sees_1Q | (sum_ref[old] > 0))
        unsafe = jnp.max(jnp.where(safe_1Q, 0.0, 1.0)) > 0
        slot_ref[0] = jnp.where(unsafe, old, new)
        repairs_ref[0] = unsafe.astype(jnp.int32)

    @pl.when(kind == blocks.FULL)
    def _():
        sum_1Q, weighted_HQ = weigh(tile_scores(whole_keys, whole_queries), whole_keys, whole_queries)
        sum_ref[new] = sum_ref[old] + sum_1Q
        acc_ref[new] = acc_ref[old] + weighted_HQ
        judge(None)

    if g.has_general or segmented:

        @pl.when(kind == blocks.GENERAL)
        def _():
            scores_CQ = masked(tile_scores(whole_keys, whole_queries), whole_keys, whole_queries)
            sum_1Q, weighted_HQ = weigh(scores_CQ, whole_keys, whole_queries)
            sum_ref[new] = sum_ref[old] + sum_1Q
            acc_ref[new] = acc_ref[old] + weighted_HQ
            judge(jnp.max(scores_CQ, axis=0, keepdims=True) > MASKED)

    if g.has_triangles:

        @pl.when(kind == blocks.TRIANGLE)
        def _():
            step = g.diagonal
            seen_ref[...] = jnp.full_like(seen_ref, MASKED)
            sum_ref[new], acc_ref[new] = sum_ref[old], acc_ref[old]
            for start in range(0, g.block_q, step):
                # Queries from `start` on see these keys; the first `step` of them see only some.
                keys, queries = (start, step), (start, g.block_q - start)
                q = slice(start, g.block_q)
                scores_CQ = tile_scores(keys, queries)
                if segmented:
                    scores_CQ = masked(scores_CQ, keys, queries)
                    seen_ref[:, q] = jnp.maximum(seen_ref[:, q], jnp.max(scores_CQ, axis=0, keepdims=True))
                else:
                    corner_CC = masked(scores_CQ[:, :step], keys, (start, step))
                    rest = [scores_CQ[:, step:]] if queries[1] > step else []
                    scores_CQ = jnp.concatenate([corner_CC, *rest], axis=1)
                sum_1Q, weighted_HQ = weigh(scores_CQ, keys, queries)
                sum_ref[new, :, q] += sum_1Q
                acc_ref[new, :, q] += weighted_HQ
            judge(seen_ref[...] > MASKED if segmented else None)

    # A loop of zero or one iteration: a branch would compile to predicated code, which always takes its full time.
    @partial(_repeat, repairs_ref[0])
    def _():
        step = next((size for size in (_REPAIR_KEYS, 128) if g.block_kv % size == 0), g.block_kv)

        @partial(_repeat, g.block_kv // step)
        def _(i):
            keys = (0 if step == g.block_kv else pl.multiple_of(i * step, step)), step
            scores_CQ = masked(tile_scores(keys, whole_queries), keys, whole_queries)
            max_1Q = jnp.max(scores_CQ, axis=0, keepdims=True)
            before_1Q, any_1Q = reference_ref[...], sum_ref[old] > 0
            first_1Q = jnp.where(max_1Q > MASKED, max_1Q, before_1Q)
            reference_ref[...] = jnp.where(any_1Q, jnp.maximum(before_1Q, max_1Q), first_1Q)
            decay_1Q = jnp.where(any_1Q, jnp.exp2(before_1Q - reference_ref[...]), 0.0)
            sum_1Q, weighted_HQ = weigh(scores_CQ, keys, whole_queries)
            sum_ref[old] = sum_ref[old] * decay_1Q + sum_1Q
            acc_ref[old] = acc_ref[old] * decay_1Q + weighted_HQ

    @pl.when((what & blocks.LAST_OF_QUERY) > 0)
    def _():
        slot = slot_ref[0]
        sum_1Q = sum_ref[slot]
        sees_1Q = sum_1Q != 0  # NaN stays NaN
        out_HQ = acc_ref[slot] * jnp.where(sees_1Q, 1.0 / sum_1Q, 0.0)
        out_ref[...] = (out_HQ if g.order.tokens_in_lanes else out_HQ.T).astype(out_ref.dtype)
        lse_1Q = (reference_ref[...] + jnp.log2(sum_1Q)) / LOG2E
        lse_ref[...] = jnp.where(sees_1Q, lse_1Q, -jnp.inf)


def _repeat(times, body):
    takes_index = body.__code__.co_argcount == 1

    def turn(i, carry):
        body(i) if takes_index else body()
        return carry

    jax.lax.fori_loop(0, times, turn, 0)
