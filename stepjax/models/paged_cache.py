"""The paged key-value cache and attention over it: for chunks of prompts, or for one token of many sequences.

One pool holds all layers. Layer i owns pages i * P to (i + 1) * P - 1; a scan over the layers carries the pool, and
every layer writes its own part in place. Caches use page numbers within a layer, 0 to P - 1; writes to NO_PAGE are
dropped. A sequence's token t is stored at index t % T of its page t // T.

Legend: B sequences or rows, C tokens of a row (per row, in BCNH), N query heads, K key-value heads, H head dim, W width
of the pool (H, rounded up to the lane count on TPU), P pages per layer, S of all layers, T tokens per page (per row, in
BTNH), M pages per row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.shared_prefix_attention import PageTables, shared_prefix_attention
from pallas_kernels.shared_prefix_attention.xla import attend_pages
from stepjax.config import AttentionImplementation, DecoderConfig
from stepjax.models.attention import resolve
from stepjax.sharding import spec, target_platform

LANES = 128
NO_PAGE = -1


class Chunks(NamedTuple):
    """A chunk of a prompt in each row. Its tokens see all earlier tokens of the prompt, including those of the chunk
    and of other rows with the same pages.
    """

    pages_BM: Any  # pages of the prompt, including those of this chunk
    start_B: Any  # position of the first token
    length_B: Any  # tokens in use; the rest is padding


class PagedCache(NamedTuple):
    """The pool, and the part of it that this call's tokens see."""

    pool_S2KTW: jax.Array
    reads: PageTables | Chunks  # one token per sequence (lengths include it), or chunks of sequences
    first_page: jax.Array | int = 0  # of the current layer

    def at_layer(self, layer: jax.Array | int, num_layers: int) -> "PagedCache":
        return self._replace(first_page=layer * (self.pool_S2KTW.shape[0] // num_layers))


def make_pool(
    config: DecoderConfig,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    platform: str,
    layout: NamedSharding | None = None,
) -> jax.Array:
    """An empty pool [layers * num_pages, 2, K, page_size, W]."""
    width = -(-config.head_dim // LANES) * LANES if platform == "tpu" else config.head_dim
    shape = (config.num_layers * num_pages, 2, config.num_kv_heads, page_size, width)
    return jnp.zeros(shape, dtype, device=layout)


def pool_layout(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, _pool_spec())


def _pool_spec() -> PartitionSpec:
    return spec(None, None, "kv_heads", None, None)


def append_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: PagedCache,
    implementation: AttentionImplementation,
) -> tuple[jax.Array, PagedCache]:
    """Writes keys and values into the current layer's pages, then attends as `reads` specifies; [B, T, N, H].

    With a mesh in scope, heads of the queries and of the pool are sharded over its devices.
    """
    platform = target_platform()
    # Only TPUs have a paged kernel; GPUs run the same algorithm in XLA.
    chosen = "tpu" if resolve(implementation, platform) == "tpu" else "xla"

    def of_device(q_BTNH, k_BTKH, v_BTKH, pool_S2KTW, reads, first_page):
        kv_BT2KW = _paired(k_BTKH, v_BTKH, pool_S2KTW)
        if isinstance(reads, Chunks):
            pool_S2KTW = _append_chunks(pool_S2KTW, kv_BT2KW, reads, first_page)
            return _attend_chunks(q_BTNH, pool_S2KTW, reads, first_page, chosen), pool_S2KTW
        pool_S2KTW = _append_tokens(pool_S2KTW, kv_BT2KW, reads, first_page)
        return _attend_all(q_BTNH, pool_S2KTW, reads, first_page, chosen), pool_S2KTW

    if not jax.sharding.get_abstract_mesh().empty:
        q_spec, kv_spec = spec(None, None, "heads", None), spec(None, None, "kv_heads", None)
        in_specs = (q_spec, kv_spec, kv_spec, _pool_spec(), spec(), spec())
        of_device = jax.shard_map(of_device, in_specs=in_specs, out_specs=(q_spec, _pool_spec()), check_vma=False)
    out_BTNH, pool_S2KTW = of_device(q_BTNH, k_BTKH, v_BTKH, *cache)
    return out_BTNH, cache._replace(pool_S2KTW=pool_S2KTW)


def _paired(k_BTKH: jax.Array, v_BTKH: jax.Array, pool_S2KTW: jax.Array) -> jax.Array:
    kv_BT2KH = jnp.stack([k_BTKH, v_BTKH], axis=2).astype(pool_S2KTW.dtype)
    return jnp.pad(kv_BT2KH, ((0, 0),) * 4 + ((0, pool_S2KTW.shape[-1] - k_BTKH.shape[-1]),))


def _write(pool_S2KTW, kv_X2KW, page_X, place_X, first_page):
    # Out of range, so that the write is dropped: a negative index would wrap around.
    page_X = jnp.where(page_X == NO_PAGE, pool_S2KTW.shape[0], first_page + page_X)
    # Scatter rows of W: for a scatter of whole [2, K, W], XLA on TPU would transpose the pool back and forth.
    which_21, head_K = jnp.arange(2)[:, None], jnp.arange(pool_S2KTW.shape[2])
    return pool_S2KTW.at[page_X[:, None, None], which_21, head_K, place_X[:, None, None]].set(kv_X2KW, mode="drop")


def _append_tokens(pool_S2KTW, kv_BT2KW, tables: PageTables, first_page):
    page_size = pool_S2KTW.shape[3]
    place_B = tables.suffix_lengths_B - 1
    column_B = jnp.clip(place_B // page_size, 0, tables.suffix_pages_BM.shape[1] - 1)
    page_B = jnp.take_along_axis(tables.suffix_pages_BM, column_B[:, None], axis=1)[:, 0]
    page_B = jnp.where((place_B >= 0) & (place_B // page_size == column_B), page_B, NO_PAGE)
    return _write(pool_S2KTW, kv_BT2KW[:, 0], page_B, place_B % page_size, first_page)


def _append_chunks(pool_S2KTW, kv_BC2KW, chunks: Chunks, first_page):
    page_size = pool_S2KTW.shape[3]
    offset_C = jnp.arange(kv_BC2KW.shape[1])
    position_BC = chunks.start_B[:, None] + offset_C
    page_BC = jnp.take_along_axis(chunks.pages_BM, position_BC // page_size, axis=1, mode="fill", fill_value=NO_PAGE)
    page_BC = jnp.where(offset_C < chunks.length_B[:, None], page_BC, NO_PAGE)
    kv_X2KW = kv_BC2KW.reshape(-1, *kv_BC2KW.shape[2:])
    return _write(pool_S2KTW, kv_X2KW, page_BC.reshape(-1), position_BC.reshape(-1) % page_size, first_page)


def _attend_all(q_BTNH, pool_S2KTW, tables: PageTables, first_page, implementation):
    here = tables._replace(
        prefix_pages_PM=tables.prefix_pages_PM + first_page, suffix_pages_BM=tables.suffix_pages_BM + first_page
    )
    return shared_prefix_attention(q_BTNH[:, 0], pool_S2KTW, here, implementation=implementation)[:, None]


def _attend_chunks(q_BCNH, pool_S2KTW, chunks: Chunks, first_page, implementation):
    rows, num_tokens, num_heads, head_dim = q_BCNH.shape
    num_kv_heads, page_size, width = pool_S2KTW.shape[2:]
    pages_BM = chunks.pages_BM + first_page
    if implementation == "tpu":

        def attend_row(q_CNH, pages_M, start):
            # Copy the prompt's pages into one contiguous array; the kernel skips blocks past the diagonal.
            kv_M2KTW = pool_S2KTW.at[pages_M].get(mode="clip")[..., :head_dim]
            k_1SKH, v_1SKH = (
                kv_M2KTW[:, i].transpose(0, 2, 1, 3).reshape(1, -1, num_kv_heads, head_dim) for i in range(2)
            )
            return flash_attention(q_CNH[None], k_1SKH, v_1SKH, causal=True, q_offset=start, implementation="tpu")[0]

        if rows == 1:
            return attend_row(q_BCNH[0], pages_BM[0], chunks.start_B[0])[None]
        # One row at a time: each has its own offset, and only one row's copy is in memory.
        return jax.lax.map(lambda row: attend_row(*row), (q_BCNH, pages_BM, chunks.start_B))
    q_BCKRW = jnp.pad(q_BCNH, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
    q_BCKRW = q_BCKRW.reshape(rows, num_tokens, num_kv_heads, num_heads // num_kv_heads, width)
    out_BCKRW, _ = attend_pages(
        q_BCKRW,
        pool_S2KTW,
        pages_BM,
        chunks.start_B + chunks.length_B,
        scale=head_dim**-0.5,
        visible_GI=chunks.start_B[:, None] + 1 + jnp.arange(num_tokens),
    )
    return out_BCKRW.reshape(rows, num_tokens, num_heads, width)[..., :head_dim].astype(q_BCNH.dtype)
