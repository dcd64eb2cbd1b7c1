"""Packed rows on cuDNN without a GPU: tables, selects and passes with a stand-in for cuDNN; then the lowered program.

Legend: B rows, T tokens, N query heads, K key-value heads, H head dim, M slots.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels.flash_attention import RESIDUAL_NAMES, flash_attention, gpu_packed
from stepjax.config import MeshConfig
from stepjax.models.attention import attend
from stepjax.sharding import make_mesh
from tests.pallas_kernels import cudnn

ROWS = {  # lengths of the segments of each row, negative for padding
    "one": ((64,), (40, -24)),
    "uneven, padding at the end": ((1, 30, 2, 20, -11), (60, 4), (-64,)),
    "padding within": ((-3, 10, -5, 20, -20, 6), (16, 16, 16, 16)),
    "many": ((4,) * 16, (2,) * 31 + (-2,)),
    "odd": ((7, 30, 20, -6), (63,)),
}


def make_ids(rows: tuple[tuple[int, ...], ...]) -> jnp.ndarray:
    ids = [np.repeat([3 * i if n > 0 else -1 - i for i, n in enumerate(row)], np.abs(row)) for row in rows]
    return jnp.asarray(np.stack(ids), jnp.int32)


def make_qkv(B: int, T: int, N: int = 4, K: int = 2, H: int = 16) -> list[jax.Array]:
    rng = np.random.default_rng(T)
    return [jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K)]


def values_and_gradients(implementation, q, k, v, ids, causal):
    def loss(q, k, v):
        out = flash_attention(q, k, v, causal=causal, q_segment_ids_BT=ids, implementation=implementation)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_starts_and_lengths_of_segments(rows):
    ids = make_ids(rows)
    found = jax.jit(gpu_packed.find_segments)(ids)
    for b, row in enumerate(rows):
        stops = np.cumsum(np.abs(row))
        real = [i for i, n in enumerate(row) if n > 0]
        assert found.counts_B[b] == len(real)
        for i, segment in enumerate(real):
            start, length = stops[segment] - row[segment], row[segment]
            assert (found.starts_BT[b, i], found.lengths_BT[b, i]) == (start, length)
            assert (found.indices_BT[b, start : start + length] == i).all()
        assert not found.lengths_BT[b, len(real) :].any()
        assert (np.asarray(found.indices_BT[b]) == -1).sum() == -sum(n for n in row if n < 0)


@pytest.mark.parametrize(
    "rows, most, causal",
    [
        ("one", 2, True),
        ("uneven, padding at the end", 3, True),
        ("padding within", 2, False),
        ("many", 8, True),
        ("many", 16, False),
        ("odd", 2, True),
    ],
)
def test_every_number_of_passes_gives_the_values_of_the_reference(monkeypatch, rows, most, causal):
    """What cuDNN leaves arbitrary is NaN in the stand-in."""
    rows = ROWS[rows]
    cudnn.stand_in(monkeypatch)
    monkeypatch.setattr(gpu_packed, "SLOTS", most)
    ids = make_ids(rows)
    inputs = make_qkv(*ids.shape)
    expected = values_and_gradients("xla", *inputs, ids, causal)
    for name, ours, wanted in zip(
        ("out", "dq", "dk", "dv"), values_and_gradients("gpu", *inputs, ids, causal), expected, strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=0.02 * np.abs(wanted).max(), err_msg=name)
        assert not ours[np.asarray(ids) < 0].any(), name


def test_an_id_that_returns_makes_its_row_nan_and_no_other(monkeypatch):
    cudnn.stand_in(monkeypatch)
    rows = ([5] * 4 + [7] * 4 + [5] * 4, [5] * 4 + [-1] * 4 + [5] * 4, [5] * 4 + [-1] * 4 + [7] * 4, [-1, -2] * 6)
    ids = jnp.asarray(rows, jnp.int32)
    out, *_ = values_and_gradients("gpu", *make_qkv(*ids.shape), ids, True)
    real = np.asarray(ids) >= 0
    assert [bool(np.isnan(out[b][real[b]]).all()) for b in (0, 1)] == [True, True]
    assert np.isfinite(out[2:]).all()


def test_long_rows_have_fewer_slots():
    def slots(*shape):
        return gpu_packed.slots(jax.ShapeDtypeStruct(shape, jnp.bfloat16))

    assert [slots(2, 64, 4, 16), slots(4, 8192, 32, 128), slots(1, 131_072, 32, 128)] == [8, 8, 2]


# The program lowered for CUDA ----------------------------------------------------------------------------------------


def lowered_calls(f, *args) -> list[tuple[str, str, int]]:
    """Name, mask type and slots of every call of cuDNN."""
    text = jax.jit(lambda *args: f(*args)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    pattern = r"@__cudnn\$(\w+).*?mask_type\\22: \\22(\w+)\\22.*?max_seg_per_batch\\22: (\d+)"
    return [(name, mask, int(slots)) for name, mask, slots in re.findall(pattern, text)]


def shapes(N: int = 4, K: int = 4, T: int = 130) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((2, T, heads, 64), jnp.bfloat16) for heads in (N, K, K)]


def layer(q, k, v, causal=True):
    ids = jnp.zeros(q.shape[:2], jnp.int32)
    return jnp.sin(flash_attention(jnp.sin(q), k, v, causal=causal, q_segment_ids_BT=ids, implementation="gpu"))


def gradient(f):
    return jax.value_and_grad(lambda *qkv: jnp.sum(f(*qkv).astype(jnp.float32)), (0, 1, 2))


@pytest.mark.parametrize("causal, mask", [(True, "PADDING_CAUSAL"), (False, "PADDING")])
@pytest.mark.parametrize("T", [130, 131])
def test_packed_rows_lower_to_the_packed_layout(monkeypatch, T, causal, mask):
    """One call for the first pass and one in the loop over further ones, which the backward pass recomputes."""
    cudnn.present(monkeypatch, hopper=True)
    forward, backward = ("fmhaSoftmax", mask, 8), ("fmhaSoftmaxBackward", mask, 8)
    f = functools.partial(layer, causal=causal)
    assert lowered_calls(f, *shapes(T=T)) == [forward, forward]
    assert lowered_calls(gradient(f), *shapes(T=T)) == [forward, forward, backward, forward, backward]


def test_grouped_queries_need_a_jax_that_strides_their_keys(monkeypatch):
    """Before 0.11.1, JAX multiplied the keys' offsets by the number of query heads."""
    cudnn.present(monkeypatch, hopper=True)
    monkeypatch.setattr(gpu_packed, "GROUPED", True)
    assert {mask for _, mask, _ in lowered_calls(layer, *shapes(N=8, K=2))} == {"PADDING_CAUSAL"}
    monkeypatch.setattr(gpu_packed, "GROUPED", False)
    assert lowered_calls(layer, *shapes(N=8, K=2)) == [("fmhaScaleBiasSoftmax", "CAUSAL", 1)]


def test_gpus_before_hopper_and_an_unknown_jax_take_a_dense_mask(monkeypatch):
    cudnn.present(monkeypatch)
    dense = [("fmhaScaleBiasSoftmax", "CAUSAL", 1)]
    assert lowered_calls(layer, *shapes()) == dense
    cudnn.present(monkeypatch, hopper=True)
    original = fused_attention_stablehlo.dot_product_attention

    def without_offsets(*args, **kwargs):
        if "q_offsets" in kwargs:
            raise TypeError("unexpected keyword argument 'q_offsets'")
        return original(*args, **kwargs)

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", without_offsets)
    assert lowered_calls(layer, *shapes()) == dense


def test_policy_that_keeps_the_residuals_runs_the_forward_once(monkeypatch):
    cudnn.present(monkeypatch, hopper=True)

    def names_and_kept(policy):
        f = jax.checkpoint(layer, policy=policy)
        kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(f, *qkv)[1], *shapes()))
        return [name for name, *_ in lowered_calls(gradient(f), *shapes())], sum(x.size for x in kept)

    again, kept_least = names_and_kept(jax.checkpoint_policies.nothing_saveable)
    names, kept = names_and_kept(jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES))
    assert again.count("fmhaSoftmax") == names.count("fmhaSoftmax") + 2
    B, T, N, H = shapes()[0].shape
    assert kept - kept_least == B * T * N * H + B * 8 * N * T, "the output, and the statistics of every slot"


def test_a_mesh_of_one_device_keeps_rows_packed(monkeypatch):
    """Its keys are not gathered, so queries and keys have the same ids."""
    cudnn.present(monkeypatch, hopper=True)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def f(q, k, v):
        ids = jnp.ones(q.shape[:2], jnp.int32)
        return attend(q, k, v, causal=True, segment_ids_BT=ids, length_axis="length", implementation="gpu")

    with jax.set_mesh(mesh):
        assert {mask for _, mask, _ in lowered_calls(f, *shapes())} == {"PADDING_CAUSAL"}
