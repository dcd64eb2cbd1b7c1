"""Attention against a softmax written out in float64 numpy.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.models.attention import attend

SEGMENTS_BT = np.array([[1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 0, 0]])
B, T, H = *SEGMENTS_BT.shape, 4


def qkv(heads, kv_heads, *, keys=T, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, heads, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def visibility(*, causal=False, segments=False, mask_BTS=None, keys=T):
    visible = np.ones((B, T, keys), bool) if mask_BTS is None else mask_BTS.copy()
    for b, t, s in np.ndindex(visible.shape):
        visible[b, t, s] &= not causal or s <= t
        visible[b, t, s] &= not segments or SEGMENTS_BT[b, t] == SEGMENTS_BT[b, s]
    return visible


def naive(q_BTNH, k_BSKH, v_BSKH, visible_BTS):
    """One query and one head at a time; a query that sees no key is left at NaN."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = np.full(q.shape, np.nan)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible_BTS[b, t])
        if len(seen):
            scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal, segments, masked", list(itertools.product([False, True], repeat=3)))
def test_equals_naive_softmax(heads, kv_heads, causal, segments, masked):
    q, k, v = qkv(heads, kv_heads)
    mask_BTS = np.random.default_rng(1).random((B, T, T)) < 0.7 if masked else None
    out = attend(
        q, k, v, causal=causal, segment_ids_BT=jnp.asarray(SEGMENTS_BT) if segments else None, mask_BTS=mask_BTS
    )
    expected = naive(q, k, v, visibility(causal=causal, segments=segments, mask_BTS=mask_BTS))
    seen = ~np.isnan(expected)
    np.testing.assert_allclose(np.asarray(out)[seen], expected[seen], rtol=0, atol=2e-6)


def test_keys_may_be_longer_than_queries():
    q, k, v = qkv(4, 2, keys=11)
    mask_BTS = np.arange(11) <= np.array([[3], [10], [0], [5], [7], [2], [9]]) + np.zeros((B, 1, 1), int)
    np.testing.assert_allclose(attend(q, k, v, mask_BTS=mask_BTS), naive(q, k, v, mask_BTS), rtol=0, atol=2e-6)


def test_bfloat16_rounds_inputs_and_output_but_not_the_softmax():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(4, 2, scale=3.0))
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


def test_row_that_sees_nothing_is_finite_and_changes_no_other():
    q, k, v = qkv(4, 2)
    mask_BTS = np.ones((B, T, T), bool)
    mask_BTS[0, 2] = False
    out = np.asarray(attend(q, k, v, mask_BTS=mask_BTS))
    assert np.isfinite(out).all()
    expected = naive(q, k, v, mask_BTS)
    others = ~np.isnan(expected)
    assert not others[0, 2].any() and others.sum() == others.size - 4 * H
    np.testing.assert_allclose(out[others], expected[others], rtol=0, atol=2e-6)


@pytest.mark.parametrize("blind_rows", [False, True])
def test_gradients_equal_those_of_the_textbook_formula_and_are_finite(blind_rows):
    q, k, v = qkv(4, 2)
    visible_BTS = visibility(causal=True, segments=True)
    mask_BTS = np.ones((B, T, T), bool)
    if blind_rows:
        mask_BTS[:, 3] = False
    weight_BTNH = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    weight_BTNH[:, 3] *= not blind_rows  # the loss does not count rows that see nothing

    def ours(q, k, v):
        out = attend(q, k, v, causal=True, segment_ids_BT=jnp.asarray(SEGMENTS_BT), mask_BTS=mask_BTS)
        return jnp.sum(weight_BTNH * out)

    def textbook(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
        weights = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores, -np.inf), axis=-1)
        return jnp.sum(weight_BTNH * jnp.einsum("BNTS,BSNH->BTNH", weights, v))

    for mine, reference in zip(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(textbook, (0, 1, 2))(q, k, v), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-5)
