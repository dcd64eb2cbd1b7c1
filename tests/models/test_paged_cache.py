"""The paged cache: chunks and single tokens of scattered pages are what an uncached forward pass computes.

Legend: B rows, T tokens.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shared_prefix_attention import PageTables
from stepjax.config import DecoderConfig, NumericsConfig
from stepjax.models.paged_cache import NO_PAGE, Chunks, PagedCache, make_pool
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import abstract_model

CONFIG = DecoderConfig(vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)
PAGE, PAGES = 16, 9
TOKENS_BT = np.random.default_rng(0).integers(0, 50, (2, 44))
PAGES_OF = ([7, 2, 5], [0, 8, 3])  # of each row, wherever they lie


@pytest.fixture(scope="module")
def decoder(small_config, randomized):
    numerics = NumericsConfig(compute_dtype="float32", remat="none")
    return randomized(abstract_model(dataclasses.replace(small_config, decoder=CONFIG), numerics).decoder)


@partial(jax.jit, static_argnames="attention")
def read(decoder: Qwen3, tokens_BT, positions_BT, pool_S2KTW, reads, attention):
    numerics = dataclasses.replace(decoder.numerics, attention=attention)
    decoder = jax.tree.map(lambda leaf: leaf, decoder)
    decoder.numerics = numerics
    cache = PagedCache(pool_S2KTW, reads)
    hidden_BTD, cache = decoder(decoder.embed(tokens_BT), positions_BT, None, cache)
    return decoder.logits(hidden_BTD), cache.pool_S2KTW


def chunk(decoder, pool_S2KTW, row, start, end, size, attention):
    """Tokens from `start` to `end` of a row, padded to `size`; their logits, and the pool."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : end - start] = TOKENS_BT[row, start:end]
    positions = (start + np.arange(size))[None]
    reads = Chunks(np.array([PAGES_OF[row]], np.int32), np.array([start]), np.array([end - start]))
    logits_BTV, pool_S2KTW = read(decoder, tokens, positions, pool_S2KTW, reads, attention)
    return logits_BTV[0, : end - start], pool_S2KTW


@pytest.mark.parametrize("attention", ["xla", "tpu"])
def test_chunks_and_tokens_equal_the_uncached_forward(decoder, attention):
    """For the TPU, its kernels emulated: padded heads, pages gathered in order, queries at an offset."""
    expected_BTV = np.asarray(
        jax.jit(lambda d: d.logits(d(d.embed(TOKENS_BT), np.broadcast_to(np.arange(44), (2, 44)))[0]))(decoder)
    )
    # What no token was written to may hold anything.
    pool_S2KTW = jnp.full_like(make_pool(CONFIG, PAGES, PAGE, jnp.float32, "tpu" if attention == "tpu" else "cpu"), 7.0)
    if attention == "tpu":
        pool_S2KTW = pool_S2KTW.at[..., CONFIG.head_dim :].set(0)
    with pltpu.force_tpu_interpret_mode():
        for row, ends in ((0, (20, 40)), (1, (16, 31))):
            for start, end in zip((0, *ends), ends, strict=False):
                logits_TV, pool_S2KTW = chunk(decoder, pool_S2KTW, row, start, end, 24, attention)
                np.testing.assert_allclose(logits_TV, expected_BTV[row, start:end], atol=2e-5)
        for step in range(3):
            positions_B = np.array([40, 31]) + step
            tables = PageTables(
                prefix_pages_PM=np.array([PAGES_OF[1][:1]], np.int32),  # row 1 reads its first page as a prefix
                prefix_lengths_P=np.array([PAGE], np.int32),
                group_of_B=np.array([-1, 0], np.int32),
                suffix_pages_BM=np.array([PAGES_OF[0], [*PAGES_OF[1][1:], NO_PAGE]], np.int32),
                suffix_lengths_B=(positions_B + 1 - np.array([0, PAGE])).astype(np.int32),
            )
            tokens_B1 = TOKENS_BT[np.arange(2), positions_B][:, None]
            logits_B1V, pool_S2KTW = read(decoder, tokens_B1, positions_B[:, None], pool_S2KTW, tables, attention)
            np.testing.assert_allclose(logits_B1V[:, 0], expected_BTV[np.arange(2), positions_B], atol=2e-5)


@pytest.mark.parametrize("attention", ["xla", "tpu"])
def test_rows_of_several_prompts_equal_the_uncached_forward(decoder, attention):
    """In one call: a prompt in two rows, another after its first 5 tokens, and an unused row."""
    expected_BTV = np.asarray(
        jax.jit(lambda d: d.logits(d(d.embed(TOKENS_BT), np.broadcast_to(np.arange(44), (2, 44)))[0]))(decoder)
    )
    pool_S2KTW = jnp.full_like(make_pool(CONFIG, PAGES, PAGE, jnp.float32, "tpu" if attention == "tpu" else "cpu"), 7.0)
    if attention == "tpu":
        pool_S2KTW = pool_S2KTW.at[..., CONFIG.head_dim :].set(0)
    rows = [(0, 0, 16), (0, 16, 27), (1, 5, 21)]  # which prompt, from, to
    tokens_BT, start_B, length_B = np.zeros((4, 16), np.int32), np.zeros(4, np.int32), np.zeros(4, np.int32)
    pages_BM = np.full((4, 3), NO_PAGE, np.int32)
    for row, (prompt, start, end) in enumerate(rows):
        tokens_BT[row, : end - start], pages_BM[row] = TOKENS_BT[prompt, start:end], PAGES_OF[prompt]
        start_B[row], length_B[row] = start, end - start
    with pltpu.force_tpu_interpret_mode():
        _, pool_S2KTW = chunk(decoder, pool_S2KTW, 1, 0, 5, 24, attention)
        before = np.asarray(pool_S2KTW)
        positions_BT = start_B[:, None] + np.arange(16)
        reads = Chunks(pages_BM, start_B, length_B)
        logits_BTV, pool_S2KTW = read(decoder, tokens_BT, positions_BT, pool_S2KTW, reads, attention)
    for row, (prompt, start, end) in enumerate(rows):
        np.testing.assert_allclose(logits_BTV[row, : end - start], expected_BTV[prompt, start:end], atol=2e-5)
    free = sorted(set(range(PAGES)) - {*PAGES_OF[0][:2], *PAGES_OF[1][:2]})
    for page in [*free, *(PAGES + page for page in free)]:  # of both layers
        np.testing.assert_array_equal(np.asarray(pool_S2KTW)[page], before[page])


def test_nothing_is_written_where_no_page_is(decoder):
    pool_S2KTW = make_pool(CONFIG, PAGES, PAGE, jnp.float32, "cpu")
    tables = PageTables(
        prefix_pages_PM=np.zeros((1, 1), np.int32),
        prefix_lengths_P=np.zeros(1, np.int32),
        group_of_B=np.full(3, -1, np.int32),
        # An unused row, a row whose next page is missing, and one that is longer than its table.
        suffix_pages_BM=np.array([[0, 0], [4, NO_PAGE], [1, 2]], np.int32),
        suffix_lengths_B=np.array([0, PAGE + 1, 2 * PAGE + 1], np.int32),
    )
    _, after = read(decoder, np.ones((3, 1), np.int32), np.ones((3, 1), np.int32), pool_S2KTW, tables, "xla")
    assert not np.asarray(after).any()
