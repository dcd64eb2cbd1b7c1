"""Attention of the models against a softmax written out in float64 numpy, on one device and spread over a mesh.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import flash_attention
from stepjax.config import MeshConfig
from stepjax.models import attention
from stepjax.models.attention import attend, resolve
from stepjax.sharding import make_mesh, target_platform

SEGMENTS_BT = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
B, T, H = *SEGMENTS_BT.shape, 4


def qkv(heads, kv_heads, *, rows=B, keys=T, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, T, heads, H), (rows, keys, kv_heads, H), (rows, keys, kv_heads, H)
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def visibility(*, causal=False, segments=False):
    visible = np.ones((B, T, T), bool)
    for b, t, s in np.ndindex(visible.shape):
        visible[b, t, s] &= not causal or s <= t
        visible[b, t, s] &= not segments or SEGMENTS_BT[b, t] == SEGMENTS_BT[b, s] != 0
    return visible


def naive(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    """One query and one head at a time; a query that sees no key gives zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible_BTS[b, t])
        if len(seen):
            scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_equals_naive_softmax(heads, kv_heads, causal, segments):
    """Padding gives zero."""
    q, k, v = qkv(heads, kv_heads)
    out = attend(q, k, v, causal=causal, segment_ids_BT=jnp.asarray(SEGMENTS_BT) if segments else None)
    expected = naive(q, k, v, visibility(causal=causal, segments=segments))
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def test_bfloat16_rounds_inputs_and_output_but_not_the_softmax():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(4, 2, scale=3.0))
    out = attend(q, k, v, causal=True)
    assert out.dtype == jnp.bfloat16
    # Weights and output have 8 bits of mantissa: 2^-8 of the largest value each.
    atol = 2 * 2**-8 * np.abs(np.asarray(v, np.float64)).max()
    np.testing.assert_allclose(np.asarray(out, np.float64), naive(q, k, v, visibility(causal=True)), rtol=0, atol=atol)


def test_large_scores_do_not_overflow():
    q, k, v = qkv(4, 2, scale=300.0)  # scores of some 1e5
    np.testing.assert_allclose(
        attend(q, k, v, causal=True), naive(q, k, v, visibility(causal=True)), rtol=1e-4, atol=1e-3
    )


def test_gradients_equal_those_of_the_textbook_formula_and_padding_has_none():
    q, k, v = qkv(4, 2)
    padding_BT = SEGMENTS_BT == 0
    weight_BTNH = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    visible_BTS = visibility(causal=True, segments=True)

    def ours(q, k, v):
        out = attend(q, k, v, causal=True, segment_ids_BT=jnp.asarray(SEGMENTS_BT))
        return jnp.sum(weight_BTNH * out)

    def textbook(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
        scores = jnp.where(visible_BTS[:, None] | padding_BT[:, None, :, None], scores, -np.inf)
        weights = jax.nn.softmax(scores, axis=-1) * ~padding_BT[:, None, :, None]
        return jnp.sum(weight_BTNH * jnp.einsum("BNTS,BSNH->BTNH", weights, v))

    for mine, reference in zip(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(textbook, (0, 1, 2))(q, k, v), strict=True):
        assert not np.asarray(mine)[padding_BT].any() and np.asarray(mine)[~padding_BT].any()
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-5)


# Which implementation ------------------------------------------------------------------------------------------------


def test_automatic_choice_goes_by_the_platform_and_an_explicit_one_stands():
    assert [resolve("auto", platform) for platform in ("cpu", "gpu", "tpu")] == ["xla", "gpu", "tpu"]
    # cuDNN takes 16-bit types, and head dims that are multiples of 8 up to 256.
    for dtype, head_dim in ((jnp.float32, 128), (jnp.bfloat16, 12), (jnp.bfloat16, 264)):
        assert resolve("auto", "gpu", dtype, head_dim) == "xla"
    assert [resolve(name, platform) for name in ("xla", "gpu") for platform in ("cpu", "tpu")] == ["xla"] * 2 + [
        "gpu"
    ] * 2


def test_platform_is_that_of_the_mesh_in_scope():
    abstract = jax.sharding.AbstractMesh(
        (1,), ("data",), abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu")
    )
    assert target_platform() == "cpu"
    with jax.sharding.use_abstract_mesh(abstract):
        assert target_platform() == "tpu"


# Over a mesh ---------------------------------------------------------------------------------------------------------


MESHES = [
    MeshConfig(data=2, fsdp=1, context=2, tensor=2),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, fsdp=2, context=4),
]


@pytest.mark.parametrize("mesh", MESHES, ids=["all but fsdp", "fsdp", "fsdp and context"])
@pytest.mark.parametrize(
    "causal, segments, length_axis", [(True, True, "length"), (True, False, "length"), (False, True, None)]
)
def test_kernel_is_given_the_part_of_each_device_and_the_results_are_those_of_one(
    mesh, causal, segments, length_axis, monkeypatch
):
    """Rows, heads and queries are divided, with all the keys of a row. XLA's form stands in for the kernel."""
    shapes = []

    def kernel(q_BTNH, k_BSKH, v_BSKH, *, implementation, **options):
        shapes.append((implementation, q_BTNH.shape, k_BSKH.shape))
        return flash_attention(q_BTNH, k_BSKH, v_BSKH, implementation="xla", **options)

    segments_BT = jnp.asarray(np.tile(SEGMENTS_BT, (4, 1))) if segments else None

    def value_and_gradients(implementation):
        def attended(q, k, v):
            return attend(
                q,
                k,
                v,
                causal=causal,
                segment_ids_BT=segments_BT,
                length_axis=length_axis,
                implementation=implementation,
            )

        @jax.jit
        def run(q, k, v):
            out, pullback = jax.vjp(attended, q, k, v)
            return out, *pullback(jnp.cos(out))

        return run(*qkv(4, 2, rows=8))

    expected = value_and_gradients("xla")
    monkeypatch.setattr(attention, "flash_attention", kernel)
    with jax.set_mesh(make_mesh(mesh)):
        results = value_and_gradients("tpu")

    # Two halves of a device's queries attend apart, an early and a late one (models/context_parallel.py).
    divided = length_axis is not None and mesh.context > 1
    rows, queries = 8 // (mesh.data * mesh.fsdp), T // (2 * mesh.context) if divided else T
    assert set(shapes) == {("tpu", (rows, queries, 4 // mesh.tensor, H), (rows, T, 2 // mesh.tensor, H))}
    for mine, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-6)


def test_tpu_kernel_over_a_mesh_gives_what_one_device_gives():
    """The kernel itself, interpreted on eight simulated devices: rows, heads and queries divided."""
    segments_BT = jnp.asarray(np.tile(SEGMENTS_BT, (4, 1)))

    @functools.partial(jax.jit, static_argnames="implementation")
    def value_and_gradients(q, k, v, implementation):
        out, pullback = jax.vjp(
            lambda *qkv: attend(
                *qkv, causal=True, segment_ids_BT=segments_BT, length_axis="length", implementation=implementation
            ),
            q,
            k,
            v,
        )
        return out, *pullback(jnp.cos(out))

    inputs = qkv(4, 2, rows=8)
    expected = value_and_gradients(*inputs, "xla")
    with jax.set_mesh(make_mesh(MESHES[0])), pltpu.force_tpu_interpret_mode(True):
        results = value_and_gradients(*inputs, "tpu")
    for mine, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-6)


# Shared prefixes -----------------------------------------------------------------------------------------------------

# A prompt (1) with two answers (2, 3), and a segment of its own (4); a prompt (1) with one answer (2) and padding.
TREE_BT = np.array([[1, 1, 2, 2, 3, 3, 4, 4], [1, 1, 1, 2, 2, 0, 0, 0]])
PREFIX_BT = np.array([[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]])


def of_tree(q, k, v, *, rows=1, implementation="xla"):
    """The output and the gradients of attention over prompts with several answers."""
    tree_BT, prefix_BT = (jnp.asarray(np.tile(ids, (rows, 1))) for ids in (TREE_BT, PREFIX_BT))
    out, pullback = jax.vjp(
        lambda *qkv: attend(
            *qkv,
            causal=True,
            segment_ids_BT=tree_BT,
            prefix_ids_BT=prefix_BT,
            length_axis="length",
            implementation=implementation,
        ),
        q,
        k,
        v,
    )
    return out, *pullback(jnp.cos(out))


@pytest.mark.parametrize("queries", [128, 4, 3])
def test_answers_see_their_prompt_and_not_each_other(queries, monkeypatch):
    """However many queries a call has."""
    monkeypatch.setattr(attention, "_QUERIES", queries)
    inputs = qkv(4, 2)
    visible = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(visible.shape):
        of_prompt = PREFIX_BT[b, t] == TREE_BT[b, s] != 0
        visible[b, t, s] = of_prompt or (s <= t and TREE_BT[b, t] == TREE_BT[b, s] != 0)
    out, *gradients = of_tree(*inputs)
    np.testing.assert_allclose(out, naive(*inputs, visible), rtol=0, atol=2e-6)

    def textbook(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
        padding_BT = TREE_BT == 0
        weights = jax.nn.softmax(jnp.where((visible | padding_BT[..., None])[:, None], scores, -np.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights * ~padding_BT[:, None, :, None], v)

    wanted, pullback = jax.vjp(textbook, *inputs)
    for mine, reference in zip(gradients, pullback(jnp.cos(out)), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-5)


def test_xla_computes_scores_once_for_a_token_and_its_prefix():
    """Two products forward and four backward, as without prefixes."""
    program = str(jax.make_jaxpr(of_tree)(*qkv(4, 2)))
    assert program.count("dot_general") == 6


@pytest.mark.parametrize("mesh", [None, MESHES[0], MESHES[2]], ids=["one device", "all but fsdp", "fsdp and context"])
def test_tpu_kernel_shares_prefixes_as_xla_does(mesh):
    inputs = qkv(4, 2, rows=8)
    expected = of_tree(*inputs, rows=4)
    run = jax.jit(functools.partial(of_tree, rows=4, implementation="tpu"))
    with jax.set_mesh(make_mesh(mesh or MeshConfig(), None if mesh else jax.devices()[:1])):
        with pltpu.force_tpu_interpret_mode(True):
            results = run(*inputs)
    for mine, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-6)
