"""STEP3-VL: encoder, projector and decoder as one model.

Legend: B rows, T tokens, G global-view slots of a row, C crop slots of a row, F features of a row, D decoder width,
M views, Q features of a view, Z channels of a coded feature.

The features of a row form one table: crops first, then global views (see `feature_table`). `feature_index_BT` selects
the entry that replaces a token's embedding. Pixels thus stay on the device that holds their text, and the number of
images or crops never changes a shape.

A model with a codec (`config.tofc`) merges the features of a view and codes them before the projector's matrix: a
device can send them. From pixels it computes what the server would have of them; decoded features can take the place of
pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stepjax.config import ModelConfig, NumericsConfig
from stepjax.errors import ConfigError
from stepjax.models.perception_encoder import PerceptionEncoder
from stepjax.models.projector import Projector
from stepjax.models.qwen3 import Qwen3
from stepjax.sharding import axis_size, constrain, shardings
from stepjax.tofc.hyperprior import Rate, Tofc
from stepjax.tofc.merge import Clusters

NO_FEATURE = -1  # feature_index of an ordinary token


class StepVL(nnx.Module):
    """The whole model. Parameters are float32 unless `numerics.param_dtype` says otherwise."""

    def __init__(self, config: ModelConfig, numerics: NumericsConfig | None = None, *, rngs: nnx.Rngs):
        numerics = numerics or NumericsConfig()
        self.config, self.numerics = config, numerics
        self.vision = PerceptionEncoder(config.vision, numerics, rngs=rngs)
        self.projector = Projector(config, numerics, rngs=rngs)
        self.decoder = Qwen3(config.decoder, numerics, init_range=config.init_range, rngs=rngs)
        self.tofc = None if config.tofc is None else Tofc(config.tofc, rngs=rngs)

    def encode_views(self, views_BMX: Float[Array, "B M H H 3"] | Float[Array, "B M Q Z"]) -> Float[Array, "B F D"]:
        """Encodes M views per row as [B, M * tokens per view, D].

        Args:
            views_BMX: normalised pixels [B, M, side, side, 3], or features [B, M, Q, Z] that were decoded.
        """
        if views_BMX.ndim == 4:
            return self._received(views_BMX.reshape(len(views_BMX), -1, views_BMX.shape[-1]))
        if self.tofc is None:
            return self._by_row(self.projector, views_BMX)
        x_BFZ = self._by_row(self._merged, views_BMX)
        rate = self.tofc.hyperprior(x_BFZ.reshape(-1, x_BFZ.shape[-1]), hard=True)
        return self._received(rate.features_NC.reshape(x_BFZ.shape))

    def merged_views(self, views_MHWC: Float[Array, "M H H 3"]) -> Float[Array, "M Q Z"]:
        """The device's part of a model with a codec: pixels [M, side, side, 3] to float32 features [M, Q, Z]."""
        with jax.named_scope("encoder"):
            x_MPE = self.vision(views_MHWC)
        return self._merged(x_MPE).astype(jnp.float32)

    def view_clusters(self, views_MHWC: Float[Array, "M H H 3"]) -> Clusters:
        """What `merged_views` merges, with a leading axis M."""
        assert self.tofc is not None
        x_MPE = self.vision(views_MHWC)
        return self.tofc.clusters(self.projector.downsampled(x_MPE), self._most_features(x_MPE.shape[1]))

    def coded_feature_table(
        self,
        global_views_BGHWC: Float[Array, "B G H H 3"],
        crops_BCHWC: Float[Array, "B C S S 3"],
        exists_BF: Bool[Array, "B F"],
        *,
        temperature: jax.Array,
    ) -> tuple[Float[Array, "B F D"], Rate]:
        """In training: the feature table as the server would have it, and the rate of its B * F features.

        Args:
            exists_BF: which features are of real views.
            temperature: of the router.
        """
        assert self.tofc is not None
        tables = [self._by_row(self._merged, views) for views in (crops_BCHWC, global_views_BGHWC) if views.shape[1]]
        x_BFZ = jnp.concatenate(tables, axis=1)
        flat = x_BFZ.reshape(-1, x_BFZ.shape[-1])
        with jax.named_scope("codec"):
            rate = self.tofc.hyperprior(flat, mask_N=exists_BF.reshape(-1), temperature=temperature)
        return self._received(rate.features_NC.reshape(x_BFZ.shape)), rate

    def calibrate(
        self,
        global_views_BGHWC: Float[Array, "B G H H 3"],
        crops_BCHWC: Float[Array, "B C S S 3"],
        exists_BF: Bool[Array, "B F"],
    ) -> jax.Array:
        """Fits the codec to the features of a batch, in place (see `Tofc.calibrate`); returns their number."""
        assert self.tofc is not None
        kinds, first = [], 0
        for views_BMHWC in (crops_BCHWC, global_views_BGHWC):
            if views_BMHWC.shape[1]:
                rows, views = views_BMHWC.shape[:2]
                x_BFO = self._by_row(self.projector.downsampled, views_BMHWC)
                x_MQO = x_BFO.reshape(rows * views, -1, x_BFO.shape[-1])
                grid = views_BMHWC.shape[2] // self.config.vision.patch_size
                count = min(self._most_features(grid * grid), x_MQO.shape[1])
                kinds.append((x_MQO, count, exists_BF[:, first : first + views * count : count].reshape(-1)))
                first += views * count
        return self.tofc.calibrate(kinds)

    def _most_features(self, patches: int) -> int:
        """Features that a view of so many patches may keep."""
        assert self.tofc is not None
        is_global = patches == self.config.vision.position_grid**2
        return self.tofc.config.global_clusters if is_global else self.tofc.config.crop_clusters

    def _merged(self, x_MPE: jax.Array) -> jax.Array:
        assert self.tofc is not None
        return self.tofc.merged(self.projector.downsampled(x_MPE), self._most_features(x_MPE.shape[1]))

    def _received(self, x_BFZ: jax.Array) -> jax.Array:
        """The server's part: decoded features [B, F, Z] to embeddings [B, F, D]."""
        assert self.tofc is not None
        x_BFZ = constrain(x_BFZ, "batch", None, None).astype(self.numerics.compute_dtype)
        with jax.named_scope("projector"):
            return constrain(self.projector.projected(self.tofc.expanded(x_BFZ)), "batch", None, "act_embed")

    def _by_row(self, function: Callable[[jax.Array], jax.Array], views_BMHWC: jax.Array) -> jax.Array:
        """`function` of the encoder's features of all views, [B, M * Q, ...]."""
        rows, views = views_BMHWC.shape[:2]
        # Devices that share a row split its views; empty views make the parts equal.
        empty = -views % axis_size("row_views")
        views_BMHWC = jnp.pad(views_BMHWC, ((0, 0), (0, empty)) + ((0, 0),) * 3)
        views_BMHWC = constrain(views_BMHWC, "batch", "row_views", None, None, None)
        x_MHWC = constrain(views_BMHWC.reshape(-1, *views_BMHWC.shape[2:]), "views", None, None, None)
        with jax.named_scope("encoder"):
            x_MPE = self.vision(x_MHWC)
        with jax.named_scope("projector"):
            y_MQD = function(x_MPE)
            y_BMQD = constrain(y_MQD.reshape(rows, -1, *y_MQD.shape[1:]), "batch", "row_views", None, "act_embed")
            y_BMQD = constrain(y_BMQD, "batch", None, None, "act_embed")[:, :views]
            return constrain(y_BMQD.reshape(rows, -1, y_MQD.shape[-1]), "batch", None, "act_embed")

    def feature_table(
        self, global_views_BGHWC: Float[Array, "B G H H 3"], crops_BCHWC: Float[Array, "B C S S 3"]
    ) -> Float[Array, "B F D"]:
        """Embeddings [B, F, D] of each row's views: crops in order, then global views."""
        tables = [self.encode_views(views) for views in (crops_BCHWC, global_views_BGHWC) if views.shape[1]]
        if not tables:
            rows, dtype = global_views_BGHWC.shape[0], jnp.dtype(self.numerics.compute_dtype)
            return jnp.zeros((rows, 0, self.config.decoder.width), dtype)
        return jnp.concatenate(tables, axis=1)

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        features_BFD: Float[Array, "B F D"],
        feature_index_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Token embeddings [B, T, D], replaced by image features where `feature_index_BT` selects one."""
        x_BTD = self.decoder.embed(tokens_BT)
        if features_BFD.shape[1]:
            index_BT1 = jnp.maximum(feature_index_BT, 0)[..., None]
            gathered_BTD = jnp.take_along_axis(features_BFD, index_BT1, axis=1)
            x_BTD = jnp.where(feature_index_BT[..., None] == NO_FEATURE, x_BTD, gathered_BTD)
        return constrain(x_BTD, "batch", "length", "act_embed")

    def __call__(
        self,
        *,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        prefix_ids_BT: Int[Array, "B T"] | None = None,
        feature_index_BT: Int[Array, "B T"],
        global_views_BGHWC: Float[Array, "B G H H 3"],
        crops_BCHWC: Float[Array, "B C S S 3"],
    ) -> Float[Array, "B T D"]:
        """Hidden states [B, T, D] after the final norm; `model.decoder.logits` maps them to logits."""
        features_BFD = self.feature_table(global_views_BGHWC, crops_BCHWC)
        return self.hidden(
            features_BFD,
            tokens_BT=tokens_BT,
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
            prefix_ids_BT=prefix_ids_BT,
            feature_index_BT=feature_index_BT,
        )

    def hidden(
        self,
        features_BFD: Float[Array, "B F D"],
        *,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        prefix_ids_BT: Int[Array, "B T"] | None = None,
        feature_index_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """The same from a feature table."""
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT, features_BFD, feature_index_BT)
        with jax.named_scope("decoder"):
            return self.decoder(x_BTD, positions_BT, segment_ids_BT, prefix_ids_BT=prefix_ids_BT)[0]


Model = TypeVar("Model", bound=StepVL | Qwen3)


def make_model(config: ModelConfig, numerics: NumericsConfig, key: jax.Array) -> StepVL:
    """Random parameters; meant to be traced (see `init_model`)."""
    model = StepVL(config, numerics, rngs=nnx.Rngs(key))
    return jax.tree.map(lambda x: x.astype(numerics.param_dtype), model)


def abstract_model(config: ModelConfig, numerics: NumericsConfig | None = None) -> StepVL:
    """The model with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda: make_model(config, numerics or NumericsConfig(), jax.random.key(0)))


def init_model(
    config: ModelConfig,
    numerics: NumericsConfig | None = None,
    *,
    seed: int | jax.Array = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> StepVL:
    """Random parameters. With a mesh, each device creates its own shards; no device ever holds the whole model.

    Raises:
        ConfigError: a parameter does not divide over the mesh.
    """
    numerics = numerics or NumericsConfig()
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    layout = None if mesh is None else shardings(abstract_model(config, numerics), mesh)
    return jax.jit(lambda key: make_model(config, numerics, key), out_shardings=layout)(key)


def stretched(model: Model, factor: float, *, attention_factor: float = 1.0) -> Model:
    """The same weights, with rotary positions stretched by YaRN to `factor` times as many tokens.

    Args:
        attention_factor: scales cosines and sines. PaCoRe serves with 1; YaRN's default is 0.1 ln(factor) + 1.

    Raises:
        ConfigError: the factor is below 1, or the model is already stretched.
    """
    trained = (model.decoder if isinstance(model, StepVL) else model).config
    if factor < 1:
        raise ConfigError(f"factor={factor}: must be at least 1")
    if trained.yarn_factor > 1:
        raise ConfigError(f"factor={factor}: the model is already stretched by {trained.yarn_factor}")
    config = dataclasses.replace(
        trained,
        max_positions=int(trained.max_positions * factor),
        yarn_factor=factor,
        yarn_trained_positions=trained.max_positions,
        yarn_attention_factor=attention_factor,
    )
    copy: Any = jax.tree.map(lambda leaf: leaf, model)  # the arrays are shared
    if isinstance(model, StepVL):
        copy.config = dataclasses.replace(model.config, decoder=config)
        copy.decoder.config = config
    else:
        copy.config = config
    return copy


def num_parameters(model: Any) -> int:
    """Number of parameters of a model, abstract or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
