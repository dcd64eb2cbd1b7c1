"""Decoding steps to test on: problems with ragged lengths in a pool of scattered pages.

Every place of the pool that holds no token is NaN, and every table entry that names no page is out of range: whoever
looks there is found out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.shared_prefix_attention import (
    PagedTokens,
    PageTables,
    Problem,
    Tiling,
    check_tables,
    pack_tables,
    reference,
)

Lengths = list[tuple[int, list[int]]]  # of a problem's prefix and its trajectories' suffixes


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


def make_problems(shape: Shape, lengths: Lengths, seed: int = 0) -> list[Problem]:
    """The problems, on pages drawn at random from the pool."""
    free = np.random.default_rng(seed).permutation(shape.pool_pages).tolist()

    def tokens(length: int) -> PagedTokens:
        return PagedTokens([free.pop() for _ in range(-(-length // shape.T))], length)

    return [Problem([tokens(n) for n in suffixes], tokens(prefix)) for prefix, suffixes in lengths]


def make_step(shape: Shape, problems: list[Problem], seed: int = 0) -> tuple[jax.Array, jax.Array, PageTables]:
    """(q_BNH, kv_pages_S2KTW, tables) for `shared_prefix_attention`."""
    rng = np.random.default_rng(seed)
    S, T = shape.pool_pages, shape.T
    tables = pack_tables(
        problems,
        page_size=T,
        num_pages=S,
        max_trajectories=shape.B,
        max_problems=shape.P,
        max_prefix_pages=shape.prefix_pages,
        max_suffix_pages=shape.suffix_pages,
    )
    check_tables(tables, page_size=T, num_pages=S)
    used_ST = np.zeros((S, T), bool)
    for pages_XM, lengths_X in ((tables[0], tables[1]), (tables[3], tables[4])):
        for pages_M, length in zip(pages_XM, lengths_X, strict=True):
            for i in range(length):
                used_ST[pages_M[i // T], i % T] = True
            pages_M[-(-length // T) :] = 10**9
    kv_S2KTW = rng.standard_normal((S, 2, shape.K, T, shape.W)) * (np.arange(shape.W) < shape.H)
    kv_S2KTW = np.where(used_ST[:, None, None, :, None], kv_S2KTW, np.nan)
    q_BNH = 2 * rng.standard_normal((shape.B, shape.N, shape.H))
    return jnp.asarray(q_BNH, shape.dtype), jnp.asarray(kv_S2KTW, shape.dtype), PageTables(*map(jnp.asarray, tables))


_reference = jax.jit(reference.shared_prefix_attention, static_argnames="scale")


def check_against_reference(
    got: tuple[jax.Array, jax.Array], q_BNH: jax.Array, kv_pages_S2KTW: jax.Array, tables: PageTables
) -> None:
    """Output and log-sum-exp agree with the reference on the very same bits of q and the pool."""
    want_BNH, want_lse_BN = _reference(
        q_BNH.astype(jnp.float32), kv_pages_S2KTW.astype(jnp.float32), tables, scale=q_BNH.shape[-1] ** -0.5
    )
    assert got[0].dtype == q_BNH.dtype and got[1].dtype == jnp.float32
    # bfloat16 keeps 8 bits: of the weights, and of the result; the scores are float32 either way.
    tolerance = 1e-5 if q_BNH.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got[0].astype(jnp.float32), want_BNH, atol=tolerance, rtol=0)
    np.testing.assert_allclose(got[1], want_lse_BN, atol=1e-5, rtol=0)
