"""Flash attention on TPUs: block sizes, conversion between the public and the kernels' layout, and the gradient.

Legend: B rows, T queries, S keys, N query heads, K key-value heads, R = N / K, H head dim.

The block size limits come from static schedules of all powers of two from 512 to 2048:

    python benchmarks/attention_schedules.py --tune

Larger tiles spend a smaller share of time on filling and draining the matrix unit, but more on masked parts of a tile.
Packed rows therefore get smaller tiles.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.checks import check
from pallas_kernels.chips import current_chip
from pallas_kernels.flash_attention import blocks, tpu_backward, tpu_forward
from pallas_kernels.flash_attention.reference import LSE_NAME, OUT_NAME
from pallas_kernels.flash_attention.tpu_forward import LOG2E

# By chip: the longest tile side in the forward and backward pass, and the sub-block on the diagonal.
CAUSAL_LIMITS = {
    "v5e": (2048, 1024, 256),
    "v5p": (2048, 1024, 256),
    "v6e": (2048, 2048, 512),
    "tpu7x": (2048, 2048, 512),
}
SEGMENTED_LIMIT = 1024
# Without a mask, all keys of an image view fit one tile: only its queries are split.
FULL_LIMIT = 1408
WHOLE_KEYS = 3072
_UNSEEN = 1e30  # log-sum-exp of a query that sees nothing: exp2(score - _UNSEEN) is always 0


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens per tile of scores: queries and keys, in the forward and the backward pass.

    Multiples of 128, except that without a mask one block may hold the whole length.
    """

    q: int
    kv: int
    q_backward: int
    kv_backward: int
    diagonal: int = 256  # keys per sub-block of a tile on the diagonal; parts above the diagonal are skipped


class _Static(NamedTuple):
    """What a compiled program depends on besides shapes."""

    causal: bool
    static_offset: int | None
    scale: float
    block_sizes: BlockSizes
    interpret: Any


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool,
    q_offset: int | jax.Array,
    q_segment_ids_BT: jax.Array | None,
    kv_segment_ids_BS: jax.Array | None,
    scale: float,
    interpret: Any = False,
    block_sizes: BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and log-sum-exp [B, T, N], differentiable in q, k and v. See the public function.

    Raises:
        ArgumentError: the block sizes do not fit the register tiling, or give too many blocks.
    """
    (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    segmented = q_segment_ids_BT is not None
    if block_sizes is None:
        block_sizes = choose_block_sizes(T, S, H, causal=causal, segmented=segmented, itemsize=q_BTNH.dtype.itemsize)
    for side, length, what in (("q", T, "queries"), ("kv", S, "keys")):
        for name in (side, f"{side}_backward"):
            size = getattr(block_sizes, name)
            whole = not segmented and not causal and size >= length and size % 16 == 0
            check(
                size > 0 and (size % 128 == 0 or whole),
                f"block_sizes.{name} is {size}; it must be a multiple of 128, or without a mask a multiple of 16 that "
                f"covers all {length} {what}",
            )
    static = _Static(causal, q_offset if isinstance(q_offset, int) else None, scale, block_sizes, interpret)
    return _attention(
        static, q_BTNH, k_BSKH, v_BSKH, jnp.asarray(q_offset, jnp.int32), q_segment_ids_BT, kv_segment_ids_BS
    )


def choose_block_sizes(
    num_queries: int, num_keys: int, head_dim: int, *, causal: bool, segmented: bool, itemsize: int
) -> BlockSizes:
    """The block sizes for a shape on the target chip. `itemsize`: bytes per element of the queries."""
    chip = current_chip()
    forward, backward, diagonal = CAUSAL_LIMITS[chip.name]
    # With wide heads or float32, fewer tokens fill the vector memory.
    narrow = 2 if head_dim > 128 or itemsize > 2 else 1
    if segmented:
        forward, backward, diagonal = min(SEGMENTED_LIMIT, forward), min(SEGMENTED_LIMIT, backward), 256
    if causal:
        q, q_backward = _even(num_queries, forward // narrow), _even(num_queries, backward // narrow)
        if num_queries == num_keys:
            diagonal = next(size for size in (diagonal, 256, 128) if q % size == q_backward % size == 0)
            return BlockSizes(q, q, q_backward, q_backward, diagonal)
        return BlockSizes(q, _even(num_keys, forward // narrow), q_backward, _even(num_keys, backward // narrow), 128)
    if segmented or num_keys > WHOLE_KEYS // narrow:
        q = _even(num_queries, FULL_LIMIT // narrow)
        kv = _even(num_keys, min(FULL_LIMIT, forward) // narrow)
        return BlockSizes(q, kv, q, kv)
    q, kv = _whole_or_even(num_queries, FULL_LIMIT // narrow), _whole_or_even(num_keys, WHOLE_KEYS)
    return BlockSizes(q, kv, q, kv)


def _whole_or_even(length: int, limit: int) -> int:
    return -(-length // 16) * 16 if length <= limit else _even(length, limit)


def _even(length: int, limit: int) -> int:
    """The size of equal blocks, in whole registers, that cover `length` with as few blocks as `limit` allows."""
    blocks = -(-length // max(limit, 128))
    return -(-length // (blocks * 128)) * 128


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS):
    return _forward(static, q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS)


def _forward(static: _Static, q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS):
    geometry = _geometry(static, q_BTNH.shape, k_BSKH.shape[1], "forward")
    B, T = q_BTNH.shape[:2]

    def plan(ids_BT, ids_BS):
        visited_BIJ, kind_BIJ = blocks.structure(geometry, B, q_offset, ids_BT, ids_BS)
        return blocks.forward_items(visited_BIJ, kind_BIJ, blocks.max_visits(geometry))

    ids = _padded_ids(q_ids_BT, kv_ids_BS, geometry)
    q_ids_B1T, kv_ids_B1S = (None if x is None else x[:, None] for x in ids)
    out, lse_BN1T = tpu_forward.forward(
        _heads_first(_scaled(static, q_BTNH), geometry.num_queries, geometry.order),
        _heads_first(k_BSKH, geometry.padded_keys, geometry.order),
        _heads_first(v_BSKH, geometry.padded_keys, geometry.order),
        q_ids_B1T,
        kv_ids_B1S,
        q_offset[None],
        plan(*ids),
        geometry,
        static.interpret,
    )
    return _tokens_first(out, T, geometry.order), lse_BN1T[:, :, 0, :T].swapaxes(1, 2)


def _forward_rule(static, q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS):
    out_BTNH, lse_BTN = _forward(static, q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS)
    # Name them here, where they become residuals: a policy that keeps the names need not rerun the kernel.
    out_BTNH, lse_BTN = checkpoint_name(out_BTNH, OUT_NAME), checkpoint_name(lse_BTN, LSE_NAME)
    return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS, out_BTNH, lse_BTN)


def _backward_rule(static: _Static, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, q_offset, q_ids_BT, kv_ids_BS, out_BTNH, lse_BTN = residuals
    d_out_BTNH, d_lse_BTN = cotangents
    geometry = _geometry(static, q_BTNH.shape, k_BSKH.shape[1], "backward")
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    R = N // K
    chunk = tpu_backward.chunk_blocks(R * geometry.num_query_blocks, geometry.block_q, H)

    def plan(ids_BT, ids_BS):
        visited_BIJ, kind_BIJ = blocks.structure(geometry, B, q_offset, ids_BT, ids_BS)
        limit = blocks.max_visits(geometry)
        return blocks.backward_items(visited_BIJ, kind_BIJ, R, chunk, limit)

    def lanes(x_BTN, fill):
        """[B, T, N] to [B, N, 1, T], with a block's tail padded to whole registers."""
        length = geometry.num_query_blocks * geometry.lanes_q
        return jnp.pad(
            x_BTN.swapaxes(1, 2)[:, :, None], ((0, 0), (0, 0), (0, 0), (0, length - T)), constant_values=fill
        )

    delta_BTN = jnp.sum(d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1) - d_lse_BTN
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, _UNSEEN, lse_BTN * LOG2E)
    # A query that sees nothing passes no gradient, for any cotangent of its log-sum-exp.
    delta_BTN = jnp.where(lse_BTN == _UNSEEN, 0.0, delta_BTN)
    ids = _padded_ids(q_ids_BT, kv_ids_BS, geometry)
    q_ids_B1T, kv_ids_B1S = (None if x is None else x[:, None] for x in ids)
    dq, dk, dv = tpu_backward.backward(
        _heads_first(_scaled(static, q_BTNH), geometry.num_queries, geometry.order),
        _heads_first(k_BSKH, geometry.padded_keys, geometry.order),
        _heads_first(v_BSKH, geometry.padded_keys, geometry.order),
        _heads_first(d_out_BTNH, geometry.num_queries, geometry.order),
        lanes(lse_BTN, _UNSEEN),
        lanes(delta_BTN, 0.0),
        q_ids_B1T,
        kv_ids_B1S,
        q_offset[None],
        plan(*ids),
        geometry,
        chunk,
        static.scale,
        static.interpret,
    )
    dq_BTNH = _tokens_first(dq, T, geometry.order)
    dk_BSKH, dv_BSKH = (
        _tokens_first(jnp.sum(partials, axis=0), S, geometry.order).astype(k_BSKH.dtype) for partials in (dk, dv)
    )
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None, None


_attention.defvjp(_forward_rule, _backward_rule)


def _geometry(static: _Static, shape: tuple[int, ...], S: int, which: str) -> blocks.Geometry:
    """The block structure of a pass."""
    _, T, _, H = shape
    sizes = static.block_sizes
    block_q, block_kv = (sizes.q, sizes.kv) if which == "forward" else (sizes.q_backward, sizes.kv_backward)
    num_q, num_kv = -(-T // block_q), -(-S // block_kv)
    # With several query blocks, the kernels read the last one past its end: padding would copy all queries.
    num_queries = block_q if num_q == 1 else -(-T // 16) * 16
    return blocks.Geometry(
        num_q,
        num_kv,
        block_q,
        block_kv,
        num_queries,
        S,
        static.causal,
        static.static_offset,
        sizes.diagonal,
        blocks.Order.of(H),
    )


def _padded_ids(q_ids_BT, kv_ids_BS, geometry: blocks.Geometry):
    if q_ids_BT is None:
        return None, None
    lengths = geometry.num_query_blocks * geometry.block_q, geometry.padded_keys
    return tuple(
        jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=-1)
        for ids, length in zip((q_ids_BT, kv_ids_BS), lengths, strict=True)
    )


def _heads_first(x_BTNH: jax.Array, length: int, order: blocks.Order) -> jax.Array:
    """[B, N, T, H] or [B, N, H, T], with T padded by zeros."""
    x = x_BTNH.transpose(0, 2, *order.pair(1, 3))
    return jnp.pad(x, ((0, 0), (0, 0), *order.pair((0, length - x_BTNH.shape[1]), (0, 0))))


def _tokens_first(x: jax.Array, length: int, order: blocks.Order) -> jax.Array:
    """Back to [B, T, N, H], without the padding."""
    x = jax.lax.slice_in_dim(x, 0, length, axis=2 + order.axis)
    return x.transpose(0, 2 + order.axis, 1, 3 - order.axis)


def _scaled(static: _Static, q_BTNH: jax.Array) -> jax.Array:
    """Queries scaled to scores in log2 units, so that the kernels can use the hardware's exp2."""
    if math.isclose(static.scale * LOG2E, 1.0, rel_tol=1e-9):
        return q_BTNH
    return (q_BTNH.astype(jnp.float32) * (static.scale * LOG2E)).astype(q_BTNH.dtype)
