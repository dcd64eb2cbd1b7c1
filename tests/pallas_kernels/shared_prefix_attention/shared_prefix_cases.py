"""Decoding steps to test on: prefix groups with ragged lengths in a pool of scattered pages.

Every place of the pool that holds no token is NaN, and every table entry that names no page is out of range: whoever
looks there is found out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.shared_prefix_attention import PageTables, Tiling, reference

Lengths = list[tuple[int, list[int]]]  # of a group's prefix and its sequences' suffixes


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is compiled into a step."""

    B: int = 8
    P: int = 2
    N: int = 8
    K: int = 2
    H: int = 128
    W: int = 128
    T: int = 16
    dtype: Any = jnp.float32
    prefix_pages: int = 20
    suffix_pages: int = 10
    tiling: Tiling = Tiling(block=128, chunk=128, split=1, fold=1)

    @property
    def pool_pages(self) -> int:
        return self.P * self.prefix_pages + self.B * self.suffix_pages


def make_tables(shape: Shape, lengths: Lengths, seed: int = 0) -> PageTables:
    """Tables of NumPy arrays on pages drawn at random from the pool, rows group after group.

    A group without a prefix takes no row of P. Entries that name no page are out of range.
    """
    free = np.random.default_rng(seed).permutation(shape.pool_pages).tolist()
    tables = PageTables(
        prefix_pages_PM=np.full((shape.P, shape.prefix_pages), 10**9, np.int32),
        prefix_lengths_P=np.zeros(shape.P, np.int32),
        group_of_B=np.full(shape.B, -1, np.int32),
        suffix_pages_BM=np.full((shape.B, shape.suffix_pages), 10**9, np.int32),
        suffix_lengths_B=np.zeros(shape.B, np.int32),
    )

    def fill(pages_M: np.ndarray, length: int) -> None:
        needed = -(-length // shape.T)
        pages_M[:needed] = [free.pop() for _ in range(needed)]

    row = group = 0
    for prefix, suffixes in lengths:
        rows = slice(row, row + len(suffixes))
        for pages_M, length in zip(tables.suffix_pages_BM[rows], suffixes, strict=True):
            fill(pages_M, length)
        tables.suffix_lengths_B[rows] = suffixes
        if prefix:
            fill(tables.prefix_pages_PM[group], prefix)
            tables.prefix_lengths_P[group], tables.group_of_B[rows] = prefix, group
            group += 1
        row += len(suffixes)
    return tables


def make_step(shape: Shape, lengths: Lengths, seed: int = 0) -> tuple[jax.Array, jax.Array, PageTables]:
    """(q_BNH, kv_pages_S2KTW, tables) for `shared_prefix_attention`."""
    rng = np.random.default_rng(seed)
    S, T = shape.pool_pages, shape.T
    tables = make_tables(shape, lengths, seed)
    used_ST = np.zeros((S, T), bool)
    for pages_XM, lengths_X in ((tables[0], tables[1]), (tables[3], tables[4])):
        for pages_M, length in zip(pages_XM, lengths_X, strict=True):
            for i in range(length):
                used_ST[pages_M[i // T], i % T] = True
    kv_S2KTW = rng.standard_normal((S, 2, shape.K, T, shape.W)) * (np.arange(shape.W) < shape.H)
    kv_S2KTW = np.where(used_ST[:, None, None, :, None], kv_S2KTW, np.nan)
    q_BNH = 2 * rng.standard_normal((shape.B, shape.N, shape.H))
    return jnp.asarray(q_BNH, shape.dtype), jnp.asarray(kv_S2KTW, shape.dtype), PageTables(*map(jnp.asarray, tables))


_reference = jax.jit(reference.shared_prefix_attention, static_argnames="scale")


def check_against_reference(
    got_BNH: jax.Array, q_BNH: jax.Array, kv_pages_S2KTW: jax.Array, tables: PageTables
) -> None:
    """The output agrees with the reference on the very same bits of q and the pool."""
    want_BNH = _reference(
        q_BNH.astype(jnp.float32), kv_pages_S2KTW.astype(jnp.float32), tables, scale=q_BNH.shape[-1] ** -0.5
    )
    assert got_BNH.dtype == q_BNH.dtype
    # bfloat16 keeps 8 bits: of the weights, and of the result; the scores are float32 either way.
    tolerance = 1e-5 if q_BNH.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got_BNH.astype(jnp.float32), want_BNH, atol=tolerance, rtol=0)
