"""Merges the features of a view into few: density-peaks clustering (TOFC, eqs. 1-2), or rectangles of the grid.

Legend: M views, N features of a view, K clusters, C channels.

With d the Euclidean distance in units of the root of the view's mean squared distance, k the number of neighbours and
KNN(i) the k nearest, i included:

    log rho_i = -mean over KNN(i) of d(i, j)^2
    delta_i   = min of d(i, j) over all j denser than i; of the densest feature, max of d(i, j)
    centres   = the K features of largest log rho + log delta
    cluster   = the features nearest to its centre; a centre belongs to itself

TOFC takes exp and leaves distances as they are: at C = 1152 each density of unit-variance features would be 0 in
float32. Others divide by sqrt(C); in our unit the scale of the features does not matter either. Ties are open in TOFC.
Here, of two equally dense features the one of lower index is the denser, so that of identical features (flat
background, padding) one is a peak and not all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stepjax.config import Merging
from stepjax.errors import ConfigError

_NEVER = -jnp.inf
_ROUNDING = 1e-5  # of the squared lengths of two features, about their mean: a smaller squared distance is 0
_IDENTICAL = 1e-30  # stands for a distance of 0 in logarithms: the last choice, but before features that do not exist


class Clusters(NamedTuple):
    """Merged features, in raster order of their centres; those without a feature of their own are 0 and come last."""

    means_KC: jax.Array  # in the dtype of the features
    assignment_N: jax.Array  # int32, the cluster of every feature; K where the feature does not exist
    sizes_K: jax.Array  # int32, features of every cluster
    centres_K: jax.Array  # int32, the index of every centre; N without one


def cluster(
    x_NC: Float[Array, "N C"], count: int, *, neighbours: int = 5, mask_N: Bool[Array, " N"] | None = None
) -> Clusters:
    """Density-peaks clustering of one view into `count` clusters; `jax.vmap` makes it that of many views.

    Gradients reach the features through the means alone. On a TPU all but the choice of centres are matrix products.

    Args:
        mask_N: which features exist; None: all of them.
    """
    num_features = len(x_NC)
    mask_N = jnp.ones(num_features, bool) if mask_N is None else mask_N
    padding = max(count - num_features, 0)  # there cannot be more centres than features
    x_NC, mask_N = jnp.pad(x_NC, ((0, padding), (0, 0))), jnp.pad(mask_N, (0, padding))
    total = num_features + padding

    squared_NN = _squared_distances(jax.lax.stop_gradient(x_NC), mask_N)
    nearest_NK = -jax.lax.top_k(-squared_NN, min(neighbours, total))[0]
    # A view of fewer features than neighbours has infinite distances among them: those do not count.
    is_real_NK = jnp.isfinite(nearest_NK)
    sums_N = jnp.sum(jnp.where(is_real_NK, nearest_NK, 0.0), axis=1)
    density_N = jnp.where(mask_N, -sums_N / jnp.maximum(jnp.sum(is_real_NK, axis=1), 1), _NEVER)

    index_N = jnp.arange(total)
    is_denser_NN = (density_N[None, :] > density_N[:, None]) | (
        (density_N[None, :] == density_N[:, None]) & (index_N[None, :] < index_N[:, None])
    )
    to_denser_N = jnp.min(jnp.where(is_denser_NN, squared_NN, jnp.inf), axis=1)
    farthest_N = jnp.max(jnp.where(jnp.isfinite(squared_NN), squared_NN, 0.0), axis=1)
    delta_N = jnp.where(jnp.isfinite(to_denser_N), to_denser_N, farthest_N)
    # The square root is outside the logarithm: log d = log(d^2) / 2.
    score_N = jnp.where(mask_N, density_N + jnp.log(jnp.maximum(delta_N, _IDENTICAL)) / 2, _NEVER)

    chosen_K = jax.lax.top_k(score_N, count)[1]
    centres_K = jnp.sort(jnp.where(mask_N[chosen_K], chosen_K, total))
    exists_K = centres_K < total
    to_centre_NK = jnp.where(exists_K, squared_NN[:, jnp.minimum(centres_K, total - 1)], jnp.inf)
    is_centre_NK = index_N[:, None] == centres_K[None, :]
    assignment_N = jnp.argmin(jnp.where(is_centre_NK, -1.0, to_centre_NK), axis=1)
    assignment_N = jnp.where(mask_N, assignment_N, count)[:num_features].astype(jnp.int32)
    centres_K = jnp.where(exists_K, centres_K, num_features).astype(jnp.int32)
    return _means(x_NC[:num_features], assignment_N, centres_K, count)


def uniform(x_NC: Float[Array, "N C"], count: int) -> Clusters:
    """The means of `count` rectangles of a square grid of features, row-major: the baseline.

    Raises:
        ConfigError: the features are no square, or it cannot be divided so.
    """
    side = round(len(x_NC) ** 0.5)
    rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
    columns = count // rows
    if side * side != len(x_NC) or columns > side:
        raise ConfigError(f"clusters={count}: cannot divide {len(x_NC)} features into {rows} x {columns} rectangles")
    row_N, column_N = jnp.divmod(jnp.arange(side * side), side)
    assignment_N = row_N * rows // side * columns + column_N * columns // side
    row_K, column_K = jnp.divmod(jnp.arange(count), columns)
    corner_K = -(-row_K * side // rows) * side + -(-column_K * side // columns)
    return _means(x_NC, assignment_N.astype(jnp.int32), corner_K.astype(jnp.int32), count)


def merge(x_MNC: Float[Array, "M N C"], count: int, *, merging: Merging = "density", neighbours: int = 5) -> Clusters:
    """The clusters of every view, with a leading axis M. If there are no more features than clusters, each is one."""
    if merging == "uniform":
        return jax.vmap(lambda x_NC: uniform(x_NC, count))(x_MNC)
    return jax.vmap(lambda x_NC: cluster(x_NC, count, neighbours=neighbours))(x_MNC)


def _squared_distances(x_NC: jax.Array, mask_N: jax.Array) -> jax.Array:
    """Squared distances [N, N] in float32, of mean 1; infinite from and to features that do not exist."""
    count = jnp.maximum(jnp.sum(mask_N), 1)
    x_NC = jnp.where(mask_N[:, None], x_NC.astype(jnp.float32), 0.0)
    # Distances do not change by this, but less is lost where products cancel: features have large means.
    x_NC = jnp.where(mask_N[:, None], x_NC - jnp.sum(x_NC, axis=0) / count, 0.0)
    products_NN = jnp.matmul(x_NC, x_NC.T, precision=jax.lax.Precision.HIGHEST)
    lengths_N = jnp.diagonal(products_NN)
    lengths_NN = lengths_N[:, None] + lengths_N[None, :]
    squared_NN = lengths_NN - 2 * products_NN
    # What rounding leaves of a distance of 0 must not tell identical features apart.
    squared_NN = jnp.where(squared_NN <= _ROUNDING * lengths_NN, 0.0, squared_NN)
    mean = jnp.sum(squared_NN * (mask_N[:, None] & mask_N[None, :])) / jnp.square(count)
    squared_NN = squared_NN / jnp.where(mean > 0, mean, 1.0)
    return jnp.where(mask_N[:, None] & mask_N[None, :], squared_NN, jnp.inf)


def _means(x_NC: jax.Array, assignment_N: Int[Array, " N"], centres_K: jax.Array, count: int) -> Clusters:
    is_member_NK = assignment_N[:, None] == jnp.arange(count)
    sizes_K = jnp.sum(is_member_NK, axis=0, dtype=jnp.int32)
    x32_NC = jnp.where(assignment_N[:, None] < count, x_NC.astype(jnp.float32), 0.0)
    sums_KC = jnp.matmul(is_member_NK.T.astype(jnp.float32), x32_NC, precision=jax.lax.Precision.HIGHEST)
    means_KC = sums_KC / jnp.maximum(sizes_K, 1)[:, None]
    return Clusters(means_KC.astype(x_NC.dtype), assignment_N, sizes_K, centres_K)
