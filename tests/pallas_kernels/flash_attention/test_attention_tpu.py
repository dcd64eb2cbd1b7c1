"""What only the TPU kernel has: the optimistic softmax and its repair, triangles, chunks of queries, compilation for
every chip.

Legend: B rows, T query tokens, N query heads, K key-value heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import ArgumentError
from pallas_kernels.flash_attention import flash_attention, tpu_backward
from pallas_kernels.flash_attention.tpu import BlockSizes, choose_block_sizes
from tests.pallas_kernels.aot import compile_for, every_chip, needs_libtpu

BLOCKS = BlockSizes(256, 256, 256, 256, diagonal=128)
SMALL = BlockSizes(128, 128, 128, 128, diagonal=128)


def inputs(T=512, N=1, K=1, H=64, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((1, T, heads, H)), dtype) for heads in (N, K, K, N)]


def results(q, k, v, d_out, *, interpret=True, blocks=BLOCKS, **options):
    """Output, log-sum-exp and the three gradients of the kernel, and of the XLA form."""

    def pull(f):
        (out, lse), pull_back = jax.vjp(f, q, k, v)
        return [out, lse, *pull_back((d_out, jnp.zeros_like(lse)))]

    def kernel(q, k, v):
        return flash_attention(
            q, k, v, return_lse=True, implementation="tpu", interpret=interpret, block_sizes=blocks, **options
        )

    def xla(q, k, v):
        return flash_attention(q, k, v, return_lse=True, **options)

    with jax.default_matmul_precision("highest"):
        return pull(kernel), pull(xla)


def assert_close(mine, wanted, tolerance):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), mine, wanted, strict=True):
        scale = float(jnp.max(jnp.abs(jnp.where(jnp.isfinite(b), b, 0)))) + 1e-30
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def on_the_diagonal():
    return results(*inputs(), causal=True)


def test_triangles_on_the_diagonal(on_the_diagonal):
    assert_close(*on_the_diagonal, 2e-6)


def test_triangles_with_packed_segments():
    ids = jnp.asarray(np.repeat([[0, 1, 2, -1]], [100, 200, 180, 32], axis=1), jnp.int32)
    assert_close(*results(*inputs(), causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids), 2e-6)


@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0], ids=["spread", "all low", "all high"])
def test_logits_outside_the_optimistic_range_are_repaired(shift):
    """Weights of 2^+-400 neither overflow nor vanish: the tile is computed again against its true maximum."""
    q, k, v, d_out = inputs()
    q = 6 * q if shift == 0 else q.at[..., 0].set(10.0)
    k = 6 * k if shift == 0 else k.at[..., 0].set(shift * 8 / 10)  # adds `shift` nats to every score
    scores = np.einsum("btnh,bskh->bnts", q, k) / 8
    assert np.abs(scores).max() > 100
    assert_close(*results(q, k, v, d_out, causal=shift == 0), 3e-4)  # scores near 400 have errors of 3e-5


def test_a_row_that_strays_only_in_its_last_tile_is_repaired():
    q, k, v, d_out = inputs()
    k = k.at[:, 400].mul(60.0)
    assert_close(*results(q, k, v, d_out), 3e-4)


def test_nan_in_a_real_token_is_not_hidden():
    q, k, v, _ = inputs()
    out = flash_attention(
        q.at[0, 5].set(jnp.nan), k, v, causal=True, implementation="tpu", interpret=True, block_sizes=BLOCKS
    )
    assert jnp.all(jnp.isnan(out[0, 5])) and jnp.all(jnp.isfinite(out[0, jnp.arange(512) != 5]))


def test_gradients_do_not_depend_on_how_queries_are_chunked(monkeypatch):
    """Three chunks of one block each, the last chunk of padding included, against all queries in one."""
    arguments = inputs(T=384, N=4, K=2)
    blocks = SMALL
    whole, wanted = results(*arguments, causal=True, blocks=blocks)
    monkeypatch.setattr(tpu_backward, "_CHUNK_BYTES", 4 * 128 * 128 * 4)  # four query blocks of the six
    chunked, _ = results(*arguments, causal=True, blocks=blocks)
    assert_close(whole, wanted, 2e-6)
    assert_close(chunked, wanted, 2e-6)


@pytest.mark.parametrize("length", [1296, 400, 389])
def test_one_block_of_ragged_length(length):
    """All of a view in one tile, as in the encoder: a multiple of 16, whatever the registers."""
    blocks = choose_block_sizes(length, length, 96, causal=False, segmented=False, itemsize=2)
    assert {blocks.q, blocks.kv, blocks.q_backward, blocks.kv_backward} == {-(-length // 16) * 16}
    if length < 1000:
        assert_close(*results(*inputs(T=length, N=1, H=96), blocks=blocks), 2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length, heads", [(400, 1), (272, 2), pytest.param(1000, 1, marks=pytest.mark.slow)])
def test_queries_end_inside_a_block(length, heads, causal):
    """The kernels read the last block of queries past its end, where the simulation puts NaN."""
    blocks = SMALL if causal else BlockSizes(128, -(-length // 16) * 16, 256, -(-length // 16) * 16)
    mine, wanted = results(*inputs(T=length, N=2 * heads, K=heads, H=32), blocks=blocks, causal=causal)
    assert_close(mine, wanted, 2e-6)


def test_no_race_and_no_uninitialised_memory():
    """Pallas's simulated TPU: memory starts as NaN, and accesses that nothing orders are reported."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arguments = inputs(T=256, N=2, H=128)
    blocks = SMALL
    mine, wanted = results(*arguments, causal=True, blocks=blocks, interpret=params)
    assert_close(mine, wanted, 2e-6)
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    except ImportError:
        return  # newer JAX raises when it finds one
    races = getattr(interpret_pallas_call, "races", None)
    assert races is None or not races.races_found


def test_results_are_the_same_bits_again(on_the_diagonal):
    again, _ = results(*inputs(), causal=True)
    jax.tree.map(np.testing.assert_array_equal, again, on_the_diagonal[0])


@pytest.mark.parametrize("length", [1, 127, 128, 1296, 2704, 4096, 5000, 32768, 131072])
@pytest.mark.parametrize("causal, segmented", [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize("head_dim, itemsize", [(96, 2), (128, 2), (128, 4), (256, 2)])
def test_chosen_blocks_suit_the_registers(length, causal, segmented, head_dim, itemsize):
    blocks = choose_block_sizes(length, length, head_dim, causal=causal, segmented=segmented, itemsize=itemsize)
    for size in (blocks.q, blocks.q_backward):
        assert size - 128 < max(length, 1)
    for size in (blocks.q, blocks.q_backward, blocks.kv, blocks.kv_backward):
        assert size % 128 == 0 or (size >= length and size % 16 == 0 and not segmented and not causal)
    if causal:
        assert blocks.q == blocks.kv and blocks.q % blocks.diagonal == 0


@pytest.mark.parametrize(
    "blocks, named",
    [(BlockSizes(100, 128, 128, 128), "block_sizes.q "), (BlockSizes(128, 100, 128, 128), "block_sizes.kv "),
     (BlockSizes(128, 128, 0, 128), "block_sizes.q_backward"), (BlockSizes(128, 128, 128, -128), "block_sizes.kv_b")],
)  # fmt: skip
def test_blocks_that_do_not_suit_are_refused(blocks, named):
    q, k, v, _ = inputs()
    with pytest.raises(ArgumentError, match=named):
        flash_attention(q, k, v, implementation="tpu", block_sizes=blocks)


def test_too_many_blocks_are_refused():
    x = jax.ShapeDtypeStruct((1, 2**16, 1, 128), jnp.bfloat16)
    blocks = SMALL
    with pytest.raises(ArgumentError, match="block_sizes give 131,328 blocks"):
        jax.eval_shape(lambda q: flash_attention(q, q, q, causal=True, implementation="tpu", block_sizes=blocks), x)


@needs_libtpu
@every_chip
@pytest.mark.parametrize("head_dim, causal", [(128, True), (96, False)])
def test_forward_and_backward_compile(chip, head_dim, causal):
    """Segments, a traced offset and ragged lengths: every body of both kernels, by the real compiler."""
    q = jax.ShapeDtypeStruct((1, 500, 4, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 500, 2, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 500), jnp.int32)

    def gradient(q, k, v, ids, d_out):
        def f(q, k, v):
            segments = {"q_segment_ids_BT": ids} if causal else {}
            return flash_attention(q, k, v, causal=causal, implementation="tpu", block_sizes=SMALL, **segments)

        return jax.vjp(f, q, k, v)[1](d_out)

    compiled = compile_for(chip, gradient, q, k, k, ids, q)
    assert compiled.as_text().count("tpu_custom_call") >= 2


@needs_libtpu
@pytest.mark.slow
@every_chip
@pytest.mark.parametrize("length, head_dim, causal", [(32768, 128, True), (131072, 128, True), (2704, 96, False)])
def test_the_chosen_blocks_fit_the_chip(chip, length, head_dim, causal):
    """At the lengths of the model, with the blocks that the table gives: the compiler checks the vector memory."""
    x = jax.ShapeDtypeStruct((1, length, 4, head_dim), jnp.bfloat16)

    def gradient(q, k, v, d_out):
        return jax.vjp(lambda *qkv: flash_attention(*qkv, causal=causal, implementation="tpu"), q, k, v)[1](d_out)

    compile_for(chip, gradient, x, x, x, x)
