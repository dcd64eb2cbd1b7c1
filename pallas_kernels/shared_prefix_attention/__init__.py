"""Decode attention for sequences that share prefixes: each step reads every shared prefix once.

    out_BNH = softmax(scale q [k_prefix; k_suffix]) [v_prefix; v_suffix]        for each sequence and head

Prefix attention takes all queries of a prefix group in one matrix product; suffix attention takes one sequence at a
time. Log-sum-exp merges the two (Hydragen, arXiv 2402.05099). If n sequences share a prefix of C tokens, a step reads C
keys and values instead of n C. Without groups this is plain paged decode attention.

The pool, kv_pages_S2KTW: page, keys or values, key/value head, token of the page, feature. Why this layout:
  - a page is contiguous, so one copy fetches its keys and values for all heads;
  - the matrix unit takes a head's [T, W] without transposition: T fills the sublanes, W the lanes;
  - the heads have their own axis: to shard them over devices, shard q's N and the pool's K alike in shard_map.
A TPU row has 128 lanes, so there W is H rounded up to a multiple of 128, with zeros past H: H = 96 and 64 take the
memory and time of 128 anyway, and XLA may store a narrower pool transposed and copy all of it at every step. Layers can
share one pool: let layer i own the pages from i S_layer on, and add i S_layer to the page numbers. (A pool with a layer
axis would be sliced, and so copied, at every layer of a scan.)

Axes: B sequences, P prefix groups, N query heads, K key/value heads (query head n reads n // (N / K)), H head width,
W pool width, S pages of the pool, T tokens of a page, M pages of a table's row.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.shared_prefix_attention import tpu, xla
from pallas_kernels.shared_prefix_attention.paged_kernel import LANES
from pallas_kernels.shared_prefix_attention.tables import PageTables
from pallas_kernels.shared_prefix_attention.tpu import Tiling

__all__ = ["PageTables", "Tiling", "shared_prefix_attention"]

PAGE_SIZES = (16, 32, 64, 128, 256)


def shared_prefix_attention(
    q_BNH: jax.Array,
    kv_pages_S2KTW: jax.Array,
    tables: PageTables,
    *,
    implementation: Literal["xla", "tpu"],
    scale: float | None = None,
    interpret: bool | Any = False,
    tiling: Tiling | None = None,
) -> jax.Array:
    """One step of decode attention over a paged cache; reads each group's prefix once for all its sequences.

    Only shapes are compiled in: B, P, the tables' widths and the pool size are maxima. Lengths, page numbers and
    groups may change at every step without recompilation. A sequence without tokens gets zeros. Unused places may hold
    any values, even NaN. Page numbers outside the pool and lengths beyond a row's are clamped, which makes the result
    wrong for that sequence only.

    Args:
      q_BNH: the new tokens' queries, float32 or bfloat16.
      kv_pages_S2KTW: the pool, in q's dtype; [:, 0] are keys and [:, 1] values. The suffixes already include the new
        tokens. T is 16, 32, 64, 128 or 256. W is at least H; features past H must be zero for every token. For the TPU
        W is a multiple of 128.
      tables: int32; see PageTables.
      implementation: "xla" for GPU and CPU, "tpu" for the Pallas kernel.
      scale: of the scores; 1 / sqrt(H) by default.
      interpret: run the TPU kernel in interpret mode: True, or a pltpu.InterpretParams.
      tiling: the TPU kernel's sizes; chosen for the target chip by default.

    Returns:
      out_BNH in q's dtype.

    Raises:
      ArgumentError: a shape, dtype or page size differs from the above; N is not a multiple of K; the tables do not fit
        a TPU's scalar memory, or the batch its vector memory.
    """
    check_choice("implementation", implementation, ("xla", "tpu"))
    check_shape("q_BNH", q_BNH, (None, None, None), "[B, N, H]")
    batch, num_heads, width = q_BNH.shape
    check_shape("kv_pages_S2KTW", kv_pages_S2KTW, (None, 2, None, None, None), "[S, 2, K, T, W]")
    num_pages, _, num_kv_heads, page_size, pool_width = kv_pages_S2KTW.shape
    check_dtype("q_BNH", q_BNH, jnp.float32, jnp.bfloat16)
    check_dtype("kv_pages_S2KTW", kv_pages_S2KTW, q_BNH.dtype)
    check(min(*q_BNH.shape, num_pages, num_kv_heads) > 0, "q_BNH and kv_pages_S2KTW must not be empty")
    check(
        num_heads % num_kv_heads == 0,
        f"q_BNH has {num_heads} heads and kv_pages_S2KTW {num_kv_heads}; the first must be a multiple of the second",
    )
    check_choice("the page size, kv_pages_S2KTW.shape[3],", page_size, PAGE_SIZES)
    check(
        pool_width >= width,
        f"kv_pages_S2KTW has width {pool_width}; q_BNH has {width}, and the pool must not be narrower",
    )
    check(
        implementation != "tpu" or pool_width % LANES == 0,
        f"kv_pages_S2KTW has width {pool_width}; for the TPU pad the pool with zeros to a multiple of {LANES}, "
        "which takes no more memory",
    )
    check_shape("tables.prefix_lengths_P", tables.prefix_lengths_P, (None,), "[P]")
    check_shape("tables.prefix_pages_PM", tables.prefix_pages_PM, (tables.prefix_lengths_P.shape[0], None), "[P, M]")
    check_shape("tables.group_of_B", tables.group_of_B, (batch,), "[B]")
    check_shape("tables.suffix_pages_BM", tables.suffix_pages_BM, (batch, None), "[B, M]")
    check_shape("tables.suffix_lengths_B", tables.suffix_lengths_B, (batch,), "[B]")
    for name, table in zip(PageTables._fields, tables, strict=True):
        check_dtype(f"tables.{name}", table, jnp.int32)
        check(table.size > 0, f"tables.{name} has shape {tuple(table.shape)}; give every axis a size of at least 1")
    for name, value, default in (("interpret", interpret, False), ("tiling", tiling, None)):
        check(
            implementation == "tpu" or value is default,
            f"{name} is {value!r}; it is only for implementation='tpu'",
        )

    factor = float(width**-0.5 if scale is None else scale)
    tables = PageTables(*map(jnp.asarray, tables))
    q_BNW = jnp.pad(q_BNH, ((0, 0), (0, 0), (0, pool_width - width)))
    if implementation == "tpu":
        options = {"scale": factor, "interpret": interpret, "tiling": tiling}
        out_BNW = tpu.shared_prefix_attention(q_BNW, kv_pages_S2KTW, tables, **options)
    else:
        out_BNW = xla.shared_prefix_attention(q_BNW, kv_pages_S2KTW, tables, scale=factor)
    return out_BNW[..., :width]
