"""The entropy model in training: a router and several hyperprior experts (TOFC, eqs. 15-18), rate and reconstruction.

Legend: N features, C channels, E experts, Z latents, V values of a latent, H hidden, I in, O out, M views, K clusters,
F width, B rows.

    y       = (x - offset) / step                         a learned step per expert and channel
    latents = analysis(x), rounded                        side information, coded by a learned histogram each
    m, b    = synthesis(latents)                          mean and Laplace scale of every channel
    r       = round(y - m)                                coded by the Laplace distribution of scale b
    x'      = offset + step (m + r)

    training    weights w = softmax(scores / T) of the router; x' = sum of w x', bits = sum of w bits over experts
    inference   the expert of the largest score, whose number is sent
    balance     sum over experts of (mean of w - 1 / E)^2, the mean over the features of a row

The networks compute with integers (see `stepjax.tofc.tables`) in training too, carried in float32, where they are
exact; gradients pass rounding straight through. So the rate in training is that of the stream, up to the 16 bits of its
tables. TOFC's widths are not known, nor whether its transforms or its step are learned. Its mean is over the batch;
that of a row (as in DeepSeek-V3, arXiv 2412.19437) does not depend on how a batch is cut into micro-batches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from stepjax.config import TofcConfig
from stepjax.errors import ConfigError
from stepjax.models.layers import constant, matrix
from stepjax.tofc import tables as fixed
from stepjax.tofc.merge import Clusters, merge
from stepjax.tofc.tables import LATENT_UNIT, LIMIT, MAX_LATENT, MAX_MEAN, NUM_SCALES, SCALES, UNIT, WEIGHT_UNIT, Tables

_LOG_RATIO = math.log(SCALES[1] / SCALES[0])
_MAX_BIAS = 1 << 22  # in the units of a layer's sums


class Rate(NamedTuple):
    """What coding features would give and cost."""

    features_NC: jax.Array  # as the receiver would have them
    bits_N: jax.Array  # of every feature: residuals, latents and the expert's number; 0 where there is no feature
    weights_NE: jax.Array  # of every feature's experts; 0 where there is no feature

    @property
    def experts_E(self) -> jax.Array:
        """The mean weight of every expert."""
        return jnp.sum(self.weights_NE, axis=0) / jnp.maximum(jnp.sum(self.weights_NE), 1)


def balance_sum(weights_BNE: Float[Array, "B N E"]) -> jax.Array:
    """The balance loss of every row, times its features, summed: divide by all features for the mean."""
    count_B = jnp.sum(weights_BNE, axis=(1, 2))
    mean_BE = jnp.sum(weights_BNE, axis=1) / jnp.maximum(count_B, 1)[:, None]
    return jnp.sum(count_B * jnp.sum(jnp.square(mean_BE - 1 / weights_BNE.shape[-1]), axis=1))


@jax.custom_jvp
def rounded(x: jax.Array) -> jax.Array:
    return jnp.round(x)


@jax.custom_jvp
def floored(x: jax.Array) -> jax.Array:
    return jnp.floor(x)


# Straight through. (x + stop_gradient(floor(x) - x) would have this gradient too, but not always an integer's value.)
for function in (rounded, floored):
    function.defjvps(lambda tangent, out, x: tangent)


def clipped(x: jax.Array, low: float, high: float) -> jax.Array:
    """A clip that the gradient passes: what is beyond a bound can come back."""
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)


class IntegerNetwork(nnx.Module):
    """Two layers of 8-bit weights and activations with a ReLU between, trained as floats of variance 1."""

    def __init__(self, name: str, fan_in: int, hidden: int, fan_out: int, *, rngs: nnx.Rngs, scale: float = 1.0):
        self.shifts = fixed.shifts_of(name, fan_in, hidden)
        self.units = (UNIT, LATENT_UNIT if name == "analysis" else UNIT)
        # Of the sizes only the channels' is sure to be divisible by the devices.
        of_in, of_out = ("norm" if name == "synthesis" else "embed"), ("embed" if name == "synthesis" else "norm")
        self.weights1 = matrix(rngs, (fan_in, hidden), (of_in, "norm"), fan_in=1)
        self.bias1 = constant(0.0, (hidden,), ("norm",))
        self.weights2 = matrix(rngs, (hidden, fan_out), ("norm", of_out), fan_in=1, scale=scale)
        self.bias2 = constant(0.0, (fan_out,), ("norm",))

    def integers(self) -> list[jax.Array]:
        """The weights and biases of both layers, as integers in floats."""
        out = []
        parts = ((self.weights1, self.bias1), (self.weights2, self.bias2))
        for (weights, bias), shift, unit in zip(parts, self.shifts, self.units, strict=True):
            out.append(jnp.clip(rounded(weights[...] * WEIGHT_UNIT), -LIMIT, LIMIT))
            out.append(jnp.clip(rounded(bias[...] * (unit << shift)), -_MAX_BIAS, _MAX_BIAS))
        return out

    def __call__(self, x_NI: jax.Array) -> jax.Array:
        """Integers [N, I] to integers [N, O], in float32."""
        weights1_IH, bias1_H, weights2_HO, bias2_O = self.integers()
        hidden_NH = jnp.clip(_layer(x_NI, weights1_IH, bias1_H, self.shifts[0]), 0, LIMIT)
        return _layer(hidden_NH, weights2_HO, bias2_O, self.shifts[1])


def _layer(x_NI: jax.Array, weights_IO: jax.Array, bias_O: jax.Array, shift: int) -> jax.Array:
    # Integers below 256 are exact in bfloat16, too, and products are summed in float32: any precision gives the same.
    return floored((x_NI @ weights_IO + bias_O) * 2.0**-shift + 0.5)


class Expert(nnx.Module):
    """One hyperprior model."""

    def __init__(self, config: TofcConfig, *, rngs: nnx.Rngs):
        self.has_latents = config.num_latents > 0
        # A checkpoint holds no empty arrays: without latents there is one, which is always 0.
        C, Z, H = config.channels, max(config.num_latents, 1), config.hidden
        self.analysis = IntegerNetwork("analysis", C, H, Z, rngs=rngs)
        self.synthesis = IntegerNetwork("synthesis", Z, H, 2 * C, rngs=rngs, scale=0.25)
        middle = math.log(1 / SCALES[0]) / _LOG_RATIO / UNIT  # the index of a scale of one step
        self.synthesis.bias2[...] = jnp.concatenate([jnp.full(C, middle), jnp.zeros(C)])
        # Of a Laplace distribution at the start: a flat one would not pull latents anywhere.
        logits_V = -jnp.abs(jnp.arange(-MAX_LATENT, MAX_LATENT + 1)) / 3.0
        # One vector a latent, stacked: weight decay is for matrices.
        self.histogram = nnx.Param(jnp.tile(logits_V, (Z, 1)), axes=("norm",))
        self.log_step = constant(math.log(config.initial_step), (C,), ("norm",))

    def __call__(self, x_NC: jax.Array, noise_NC: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The reconstruction [N, C] of standardised features, and the bits [N] of their latents and residuals."""
        channels = x_NC.shape[1]
        latents_NZ = clipped(self.analysis(_network_input(x_NC)), -MAX_LATENT, MAX_LATENT)
        if not self.has_latents:
            latents_NZ = jnp.zeros_like(latents_NZ)
        out_NO = self.synthesis(latents_NZ)
        scale_NC = SCALES[0] * jnp.exp(_LOG_RATIO * clipped(out_NO[:, :channels], 0, NUM_SCALES - 1))
        mean_NC = clipped(out_NO[:, channels:], -MAX_MEAN, MAX_MEAN) / UNIT
        step_C = jnp.exp(self.log_step[...])
        offset_NC = x_NC / step_C - mean_NC
        residual_NC = rounded(offset_NC) if noise_NC is None else offset_NC + noise_NC
        bits_N = jnp.sum(laplace_bits(residual_NC, scale_NC), axis=1)
        if self.has_latents:
            bits_N += jnp.sum(histogram_bits(latents_NZ, self.histogram[...]), axis=1)
        return step_C * (mean_NC + residual_NC), bits_N


def laplace_bits(residual: jax.Array, scale: jax.Array) -> jax.Array:
    """-log2 of the mass of a Laplace distribution within half a step of the residual.

    Either formula uses the tail that is small, so that nothing cancels: v = |r|, and for v below and above 1/2

        1 - exp(-1 / 2b) cosh(v / b)        exp(-(v - 1/2) / b) (1 - exp(-1 / b)) / 2
    """
    distance = jnp.abs(residual)
    near = jnp.minimum(distance, 0.5)  # so that the branch not taken has a finite gradient
    mass = -0.5 * (jnp.expm1((near - 0.5) / scale) + jnp.expm1(-(near + 0.5) / scale))
    far = (distance - 0.5) / scale - jnp.log(-0.5 * jnp.expm1(-1 / scale))
    return jnp.where(distance < 0.5, -jnp.log(mass), far) / math.log(2)


def histogram_bits(latents_NZ: jax.Array, logits_ZV: jax.Array) -> jax.Array:
    """-log2 of the histograms' probabilities; between integers it is as if linear, which is what latents learn from."""
    log_probs_ZV = jax.nn.log_softmax(logits_ZV, axis=-1)
    index_ZN = (jax.lax.stop_gradient(latents_NZ).astype(jnp.int32) + MAX_LATENT).T

    def at(index_ZN):
        return jnp.take_along_axis(log_probs_ZV, jnp.clip(index_ZN, 0, 2 * MAX_LATENT), axis=1).T

    slope_NZ = jax.lax.stop_gradient(at(index_ZN + 1) - at(index_ZN - 1)) / 2
    moved_NZ = latents_NZ - jax.lax.stop_gradient(latents_NZ)  # 0, with a gradient
    return -(at(index_ZN) + slope_NZ * moved_NZ) / math.log(2)


def _network_input(x_NC: jax.Array) -> jax.Array:
    return jnp.clip(rounded(x_NC * UNIT), -LIMIT, LIMIT)


class Hyperprior(nnx.Module):
    """The router and the experts, which are stacked along their parameters' first axis.

    `offset` and `spread` standardise the channels. They have no gradient: `calibrate` sets them.
    """

    def __init__(self, config: TofcConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.offset = constant(0.0, (config.channels,), ("norm",))
        self.spread = constant(1.0, (config.channels,), ("norm",))
        self.router = IntegerNetwork("router", config.channels, config.hidden, config.experts, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.experts)
        self.experts = jax.vmap(lambda key: Expert(config, rngs=nnx.Rngs(key)))(keys)

    def calibrate(self, x_NC: Float[Array, "N C"], mask_N: Bool[Array, " N"] | None = None) -> None:
        """Sets the channels' offset and spread to the mean and the standard deviation of features, in place."""
        where_N1 = None if mask_N is None else mask_N[:, None]
        x_NC = x_NC.astype(jnp.float32)
        mean_C, deviation_C = jnp.mean(x_NC, axis=0, where=where_N1), jnp.std(x_NC, axis=0, where=where_N1)
        # A channel that hardly varies must not have steps so small that noise is worth bits.
        smallest = jnp.maximum(1e-2 * jnp.sqrt(jnp.mean(jnp.square(deviation_C))), 1e-6)
        self.offset[...] = mean_C.astype(self.offset.dtype)
        self.spread[...] = jnp.maximum(deviation_C, smallest).astype(self.spread.dtype)

    def __call__(
        self,
        x_NC: Float[Array, "N C"],
        *,
        mask_N: Bool[Array, " N"] | None = None,
        temperature: float | jax.Array | None = None,
        hard: bool = False,
        noise_key: jax.Array | None = None,
    ) -> Rate:
        """The rate and the reconstruction of features, in float32.

        Args:
            mask_N: which features exist; None: all.
            temperature: of the router; None: the configuration's. Lowered in training, it brings the mixture near to
                the choice of one.
            hard: one expert a feature, as at inference.
            noise_key: adds uniform noise to y - m instead of rounding it; the latents are rounded all the same.
        """
        config = self.config
        mask_N = jnp.ones(len(x_NC), bool) if mask_N is None else mask_N
        offset_C, spread_C = jax.lax.stop_gradient((self.offset[...], self.spread[...]))
        x_NC = jnp.where(mask_N[:, None], (x_NC.astype(jnp.float32) - offset_C) / spread_C, 0.0)
        scores_NE = self.router(_network_input(x_NC)) / UNIT
        if hard:
            weights_NE = jax.nn.one_hot(jnp.argmax(scores_NE, axis=1), config.experts)
        else:
            weights_NE = jax.nn.softmax(scores_NE / (config.temperature if temperature is None else temperature))
        weights_NE = weights_NE * mask_N[:, None]
        noise_NC = None if noise_key is None else jax.random.uniform(noise_key, x_NC.shape, minval=-0.5, maxval=0.5)

        # One expert at a time, and again in the backward pass: all at once would need E times the memory.
        @jax.checkpoint
        def add(total, part):
            expert, weights_N = part
            features_NC, bits_N = expert(x_NC, noise_NC)
            return (total[0] + weights_N[:, None] * features_NC, total[1] + weights_N * bits_N), None

        zero = jnp.zeros(x_NC.shape, jnp.float32), jnp.zeros(len(x_NC), jnp.float32)
        (features_NC, bits_N), _ = jax.lax.scan(add, zero, (self.experts, weights_NE.T))
        bits_N = bits_N + math.log2(config.experts) * mask_N
        features_NC = jnp.where(mask_N[:, None], offset_C + spread_C * features_NC, 0.0)
        return Rate(features_NC, bits_N, weights_NE)


class Tofc(nnx.Module):
    """All that is trained between the encoder's down-samplers and the projector's matrix: bottleneck and entropy model.

    Source: TOFC merges and codes before the projector. The bottleneck is our own: the features of STEP3-VL are wider
    (6144) than its decoder.
    """

    def __init__(self, config: TofcConfig, *, rngs: nnx.Rngs):
        self.config = config
        F, C = config.width, config.channels
        has_map = config.bottleneck is not None
        self.down = matrix(rngs, (F, C), ("embed", "mlp"), fan_in=F) if has_map else None
        self.up = matrix(rngs, (C, F), ("mlp", "embed"), fan_in=C) if has_map else None
        self.hyperprior = Hyperprior(config, rngs=rngs)

    def merged(self, x_MNF: Float[Array, "M N F"], count: int) -> Float[Array, "M K C"]:
        """The device's part: down-sampled features [M, N, width] to at most `count` of `config.channels` channels."""
        return self.clusters(x_MNF, count).means_KC

    def clusters(self, x_MNF: Float[Array, "M N F"], count: int) -> Clusters:
        """The same, and which features each is the mean of, with a leading axis M."""
        if self.down is not None:
            x_MNF = x_MNF @ self.down.astype(x_MNF.dtype)
        views, features = x_MNF.shape[:2]
        if count >= features:
            each_MN = jnp.tile(jnp.arange(features, dtype=jnp.int32), (views, 1))
            return Clusters(x_MNF, each_MN, jnp.ones_like(each_MN), each_MN)
        with jax.named_scope("merge"):
            return merge(x_MNF, count, merging=self.config.merging, neighbours=self.config.neighbours)

    def expanded(self, x_BNC: Float[Array, "B N C"]) -> Float[Array, "B N F"]:
        """The server's part: decoded features as the projector's matrix takes them, [B, N, width]."""
        return x_BNC if self.up is None else x_BNC @ self.up.astype(x_BNC.dtype)

    def calibrate(self, kinds: Sequence[tuple[jax.Array, int, jax.Array]]) -> jax.Array:
        """Fits what must suit the features from the start, in place: the bottleneck and the channels' scales.

        The bottleneck becomes the features' principal components (of their products, not their covariances, so that
        the mean passes).

        Args:
            kinds: of the views of each size: features [M, N, width], the `count` of `merged`, and which are real [M].

        Returns:
            The number of real features; without any, parameters are not finite.
        """
        if self.down is not None and self.up is not None:
            products_FF = jnp.zeros((self.config.width, self.config.width), jnp.float32)
            for x_MNF, _, views_M in kinds:
                x_NF = jnp.where(views_M[:, None, None], x_MNF.astype(jnp.float32), 0.0).reshape(-1, x_MNF.shape[-1])
                products_FF += jnp.matmul(x_NF.T, x_NF, precision=jax.lax.Precision.HIGHEST)
            basis_FC = jnp.linalg.eigh(products_FF)[1][:, ::-1][:, : self.config.channels]
            basis_FC = basis_FC.astype(self.down.dtype)
            self.down[...], self.up[...] = basis_FC, basis_FC.T
        parts = [(self.merged(x_MNF, count), views_M) for x_MNF, count, views_M in kinds]
        x_NC = jnp.concatenate([x_MKC.reshape(-1, self.config.channels) for x_MKC, _ in parts])
        mask_N = jnp.concatenate([jnp.repeat(views_M, x_MKC.shape[1]) for x_MKC, views_M in parts])
        self.hyperprior.calibrate(x_NC, mask_N)
        return jnp.sum(mask_N)


def freeze(model: Hyperprior, *, origin: str = "") -> Tables:
    """The integers and distributions that both ends share.

    Args:
        origin: see `Tables`.

    Raises:
        ConfigError: a parameter is not finite.
    """
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)):
        raise ConfigError("entropy model: has parameters that are not finite; train it with a lower rate")
    spread_C = np.asarray(model.spread[...], np.float32)
    values, radii = fixed.laplace_frequencies()
    histogram_EZV = jax.nn.softmax(jnp.asarray(model.experts.histogram[...], jnp.float32), axis=-1)
    if not model.experts.has_latents:
        histogram_EZV = jax.nn.one_hot(jnp.full(histogram_EZV.shape[:-1], MAX_LATENT), histogram_EZV.shape[-1])
    arrays = {
        "offset": np.asarray(model.offset[...], np.float32),
        "spread": spread_C,
        "step": spread_C * np.exp(np.asarray(model.experts.log_step[...], np.float32)),
        "latent_frequencies": fixed.frequencies(np.asarray(histogram_EZV)),
        "value_frequencies": values,
        "radius": radii,
    }
    networks = {"router": model.router, "analysis": model.experts.analysis, "synthesis": model.experts.synthesis}
    for name, network in networks.items():
        # The experts are stacked already; the router counts as one.
        weights1, bias1, weights2, bias2 = (
            np.asarray(x)[None] if name == "router" else np.asarray(x) for x in network.integers()
        )
        arrays |= {f"{name}_weights1": weights1.astype(np.int8), f"{name}_weights2": weights2.astype(np.int8)}
        arrays |= {f"{name}_bias1": bias1.astype(np.int32), f"{name}_bias2": bias2.astype(np.int32)}
        arrays[f"{name}_shifts"] = np.array(network.shifts, np.int32)
    if not model.experts.has_latents:
        for part in ("weights2", "bias2"):
            arrays[f"analysis_{part}"] = np.zeros_like(arrays[f"analysis_{part}"])
    return Tables(arrays, origin)
