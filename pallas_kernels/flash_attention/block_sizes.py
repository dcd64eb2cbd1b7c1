"""Block sizes of the TPU kernels, by chip and shape."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens of a tile of scores: queries times keys, in the forward and in the backward pass.

    Multiples of 128, except that one block of keys may hold the whole length.
    """

    q: int
    kv: int
    q_backward: int
    kv_backward: int
    diagonal: int = 256  # keys of a sub-block of a tile on the diagonal; its parts above the diagonal are left out


def choose(num_queries: int, num_keys: int, head_dim: int, *, causal: bool, segmented: bool, itemsize: int) -> BlockSizes:
    """The block sizes for a shape on the chip being compiled for."""
    return BlockSizes(1024, 1024, 1024, 1024)
