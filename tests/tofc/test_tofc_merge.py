"""Density-peaks clustering against loops over NumPy; ties, masks and views of few features.

Legend: M views, N features, K clusters, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import ConfigError
from stepjax.tofc.merge import cluster, merge, uniform


def expected(x_NC, count, neighbours=5, mask_N=None):
    """Centres, assignment, sizes and means, feature by feature, in float64."""
    total = len(x_NC)
    real = [i for i in range(total) if mask_N is None or mask_N[i]]
    x = np.asarray(x_NC, np.float64)
    squared = {(i, j): np.sum((x[i] - x[j]) ** 2) for i in real for j in real}
    mean = sum(squared.values()) / max(len(real), 1) ** 2 or 1.0
    squared = {pair: value / mean for pair, value in squared.items()}
    density = {i: -np.mean(sorted(squared[i, j] for j in real)[:neighbours]) for i in real}

    def score(i):
        denser = [squared[i, j] for j in real if (density[j], -j) > (density[i], -i)]
        delta = min(denser) if denser else max(squared[i, j] for j in real)
        return density[i] + np.log(max(delta, 1e-30)) / 2

    centres = sorted(sorted(real, key=lambda i: (-score(i), i))[:count])
    assignment = np.full(total, count)
    for i in real:
        assignment[i] = centres.index(i) if i in centres else np.argmin([squared[i, j] for j in centres])
    means = np.zeros((count, x.shape[1]))
    for k in range(len(centres)):
        means[k] = x[assignment == k].mean(axis=0)
    sizes = np.bincount(assignment, minlength=count + 1)[:count]
    return np.array(centres + [total] * (count - len(centres))), assignment, sizes, means


def check(x_NC, count, **options):
    found = jax.jit(lambda x: cluster(x, count, **options))(jnp.asarray(x_NC))
    centres, assignment, sizes, means = expected(x_NC, count, **options)
    np.testing.assert_array_equal(found.centres_K, centres)
    np.testing.assert_array_equal(found.assignment_N, assignment)
    np.testing.assert_array_equal(found.sizes_K, sizes)
    np.testing.assert_allclose(found.means_KC, means, rtol=1e-5, atol=1e-5)
    return found


def features(count, channels=24, seed=0):
    return np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)


@pytest.mark.parametrize("shape, count", [((81, 24), 16), ((49, 8), 5), ((169, 64), 32), ((16, 4), 1)], ids=str)
def test_clusters_are_those_of_the_formula(shape, count):
    check(features(*shape), count)


@pytest.mark.parametrize("scale, offset", [(1e3, 0.0), (1e-4, 0.0), (2.0**8, 2.0**14)], ids=str)
def test_neither_scale_nor_offset_of_the_features_matters(scale, offset):
    """exp(-d^2 / C) alone would be 0 everywhere at the first, and 1 at the second."""
    x_NC = np.round(features(49) * 64) / 64  # exact even when moved
    run = jax.jit(lambda x: cluster(x, 8))
    found, moved = run(x_NC), run(np.float32(offset + scale * x_NC))
    np.testing.assert_array_equal(found.assignment_N, moved.assignment_N)


def test_ties_are_broken_by_index():
    """Integers: every distance is exact, and many are equal."""
    x_NC = np.random.default_rng(1).integers(0, 2, (64, 4)).astype(np.float32)
    check(x_NC, 8)
    check(np.repeat(np.eye(4, dtype=np.float32), 5, axis=0), 4)


def test_a_block_of_identical_features_has_one_centre():
    """Without the rule for ties all 16 centres fall into the block."""
    x_NC = features(169)
    x_NC[:100] = x_NC[0]
    found = check(x_NC, 16)
    assert np.sum(np.asarray(found.centres_K) < 100) == 1 and found.sizes_K[0] >= 100


def test_features_that_do_not_exist_take_no_part():
    x_NC, mask_N = features(81), np.random.default_rng(2).random(81) < 0.6
    found = check(x_NC, 12, mask_N=mask_N)
    x_NC[~mask_N] = np.nan
    again = jax.jit(lambda x, mask: cluster(x, 12, mask_N=mask))(x_NC, mask_N)
    np.testing.assert_array_equal(found.assignment_N, again.assignment_N)
    np.testing.assert_allclose(found.means_KC, again.means_KC, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("real", [0, 1, 3, 4])
def test_fewer_features_than_clusters_leave_empty_ones_at_the_end(real):
    mask_N = np.arange(9) % 2 == 0
    mask_N &= np.cumsum(mask_N) <= real
    found = check(features(9), 6, mask_N=mask_N)
    assert np.asarray(found.sizes_K).tolist() == [1] * real + [0] * (6 - real)
    assert not np.asarray(found.means_KC[real:]).any()


def test_every_feature_is_a_cluster_if_there_are_enough():
    x_NC = features(9)
    for count in (9, 12):
        found = check(x_NC, count)
        np.testing.assert_allclose(found.means_KC[:9], x_NC, rtol=1e-6)


def test_identical_features_are_one_cluster_and_its_rest():
    found = check(np.full((25, 8), 3.0, np.float32), 4)
    assert np.asarray(found.sizes_K).tolist() == [22, 1, 1, 1]
    np.testing.assert_array_equal(found.means_KC, np.full((4, 8), 3.0))


def test_views_are_merged_each_for_itself():
    x_MNC = features(3 * 49).reshape(3, 49, -1)
    together = jax.jit(lambda x: merge(x, 8))(x_MNC)
    one = jax.jit(lambda x: cluster(x, 8))
    for view in range(3):
        alone = one(x_MNC[view])
        np.testing.assert_array_equal(together.assignment_N[view], alone.assignment_N)
        np.testing.assert_allclose(together.means_KC[view], alone.means_KC, rtol=1e-6)


def test_the_means_have_the_features_type():
    x_NC = jnp.asarray(features(49), jnp.bfloat16)
    assert jax.eval_shape(lambda x: cluster(x, 8), x_NC).means_KC.dtype == jnp.bfloat16


def test_gradients_are_those_of_the_means():
    x_NC = features(49)
    x_NC[:20] = x_NC[0]

    @jax.jit
    def gradient(x_NC):
        def total(x_NC):
            found = cluster(x_NC, 8)
            return jnp.sum(found.means_KC), found

        return jax.grad(total, has_aux=True)(x_NC)

    gradient_NC, found = gradient(x_NC)
    sizes = np.asarray(found.sizes_K)[np.asarray(found.assignment_N)]
    np.testing.assert_allclose(gradient_NC, np.repeat(1 / sizes[:, None], 24, axis=1), rtol=1e-6)


@pytest.mark.parametrize("side, count", [(13, 32), (13, 16), (9, 16), (4, 16), (5, 7)])
def test_rectangles_of_the_grid(side, count):
    x_NC = features(side * side)
    if count == 7:
        with pytest.raises(ConfigError, match="clusters=7"):
            uniform(jnp.asarray(x_NC), count)
        return
    found = jax.jit(lambda x: uniform(x, count))(x_NC)
    assignment, sizes = np.asarray(found.assignment_N), np.asarray(found.sizes_K)
    assert sizes.sum() == side * side and sizes.min() > 0 and sizes.max() <= 4 * sizes.min()
    np.testing.assert_array_equal(assignment[np.asarray(found.centres_K)], np.arange(count))
    for k in range(count):
        np.testing.assert_allclose(found.means_KC[k], x_NC[assignment == k].mean(axis=0), rtol=1e-5, atol=1e-6)
