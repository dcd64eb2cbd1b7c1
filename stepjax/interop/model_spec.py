"""The model in a checkpoint: STEP3-VL, or a text decoder alone."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import pydantic
from flax import nnx

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig, NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_config import config_from_hf, decoder_config_from_hf, text_family
from stepjax.interop.hf_layout import Tensor, decoder_tensors, step_vl_tensors
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL, abstract_model
from stepjax.sharding import named_leaves


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Configuration of a model and, unless it is a text model, of its images."""

    model: ModelConfig | DecoderConfig
    images: ImageConfig | None = None

    @property
    def is_text(self) -> bool:
        return isinstance(self.model, DecoderConfig)

    @property
    def decoder(self) -> DecoderConfig:
        return self.model if isinstance(self.model, DecoderConfig) else self.model.decoder

    def part(self, name: str) -> "ModelSpec":
        """This spec for "all"; the decoder as a text model for "decoder"."""
        return ModelSpec(self.decoder) if name == "decoder" else self

    def tensors(self) -> list[Tensor]:
        """The public tensors, with the names of the parameters they fill."""
        if isinstance(self.model, DecoderConfig):
            return decoder_tensors(self.model, prefix="")
        return step_vl_tensors(self.model)

    def abstract(self, numerics: NumericsConfig | None = None) -> StepVL | Qwen3:
        """The model with shapes in place of arrays."""
        numerics = numerics or NumericsConfig()
        if isinstance(self.model, ModelConfig):
            return abstract_model(self.model, numerics)
        config = self.model

        def make() -> Qwen3:
            model = Qwen3(config, numerics, rngs=nnx.Rngs(jax.random.key(0)))
            return jax.tree.map(lambda x: x.astype(numerics.param_dtype), model)

        return jax.eval_shape(make)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        return _shapes(self)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({"kind": type(self.model).__name__, **dataclasses.asdict(self)}))


@functools.lru_cache(maxsize=16)  # tracing a model is slow
def _shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named_leaves(spec.abstract()).items()}


def spec_from_hf(config: dict[str, Any]) -> ModelSpec:
    """Parses the `config.json` of a Hugging Face directory.

    Raises:
        CheckpointError: the model is neither STEP3-VL nor of a known text family, is an unsupported variant, or has an
            unusable value.
    """
    if config.get("vision_config") is not None:
        return ModelSpec(*config_from_hf(config))
    if text_family(config) is None:
        raise CheckpointError("config.json has neither model_type nor architectures: which model does it describe?")
    return ModelSpec(decoder_config_from_hf(config))


_KINDS: dict[str, Any] = {"ModelConfig": ModelConfig, "DecoderConfig": DecoderConfig}


def is_spec(fields: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's configuration is a `ModelSpec`, as in a converted checkpoint, and not that of a run."""
    return fields.get("kind") in _KINDS


def spec_from_json(fields: dict[str, Any]) -> ModelSpec:
    """The inverse of `ModelSpec.to_json`.

    Raises:
        CheckpointError: the fields do not fit this version.
    """
    try:
        model = pydantic.TypeAdapter(_KINDS[fields["kind"]]).validate_python(fields["model"])
        images = pydantic.TypeAdapter(ImageConfig | None).validate_python(fields["images"])
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        raise CheckpointError(
            f"the checkpoint's configuration does not fit this version of stepjax: {error}"
        ) from error
    return ModelSpec(model, images)
