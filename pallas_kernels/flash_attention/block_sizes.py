"""Block sizes of the TPU kernels, by chip and shape.

The limits below come from the static schedules, over all powers of two from 512 to 2048:

    python benchmarks/attention_schedules.py --tune

Larger tiles spend a smaller share on filling and draining the matrix unit, and more on the part of a tile that the mask
leaves empty; packed rows therefore get smaller ones.
"""

import dataclasses

from pallas_kernels.chips import current_chip


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens of a tile of scores: queries times keys, in the forward and in the backward pass.

    Multiples of 128, except that without a mask one block may hold the whole length.
    """

    q: int
    kv: int
    q_backward: int
    kv_backward: int
    diagonal: int = 256  # keys of a sub-block of a tile on the diagonal; its parts above the diagonal are left out


# Chip: the longest side of a tile forward and backward, and the sub-block on the diagonal.
CAUSAL_LIMITS = {
    "v5e": (2048, 1024, 256),
    "v5p": (2048, 1024, 256),
    "v6e": (2048, 2048, 512),
    "tpu7x": (2048, 2048, 512),
}
SEGMENTED_LIMIT = 1024
# Without a mask, all keys of a view of an image fit a tile: its queries are divided, its keys are not.
FULL_LIMIT = 1408
WHOLE_KEYS = 3072


def choose(
    num_queries: int, num_keys: int, head_dim: int, *, causal: bool, segmented: bool, itemsize: int
) -> BlockSizes:
    """The block sizes for a shape on the chip being compiled for. `itemsize` is bytes of an element of the queries."""
    chip = current_chip()
    forward, backward, diagonal = CAUSAL_LIMITS[chip.name]
    # Wide heads and float32 fill the vector memory with fewer tokens.
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
    """The block that covers `length` in as few blocks as `limit` allows, all of a size, in whole registers."""
    blocks = -(-length // max(limit, 128))
    return -(-length // (blocks * 128)) * 128
