"""Reads `config.json`: types, limits, unsupported variants, and the conversion to our configuration.

Every value is validated here, once, before use. Fields that do not affect the computation are ignored. A field that
does is either read, or refused unless its value turns it off.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from stepjax.config import Activation, DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from stepjax.errors import CheckpointError, ConfigError

TEXT_FAMILIES = ("qwen3", "llama")
IMAGE_FIELDS = "stepjax_images"  # our field: differences from the public model's images
STARTS_THINKING = "stepjax_starts_thinking"  # our field: false if generation prompts do not open <think>

# Far beyond any known model, but small enough that computing the shapes of such a model is cheap.
Layers = Annotated[int, Field(gt=0, le=2_000)]
Heads = Annotated[int, Field(gt=0, le=10_000)]
Width = Annotated[int, Field(gt=0, le=1_000_000)]
Rows = Annotated[int, Field(gt=0, le=100_000_000)]
Positions = Annotated[int, Field(gt=0, le=1_000_000_000)]
Pixels = Annotated[int, Field(gt=0, le=100_000)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Theta = Annotated[float, Field(ge=1, le=1e15)]
Factor = Annotated[float, Field(gt=0, le=10_000)]
TokenId = Annotated[int, Field(ge=0, le=100_000_000)]


class _Fields(pydantic.BaseModel):
    """Fields by our names; the alias is the name in the file, if different."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, validate_by_name=True)


class _Vision(_Fields):
    """`vision_config`: the fields of `VisionConfig`, plus two from which others are derived."""

    image_size: Pixels
    patch_size: Pixels
    width: Width
    num_layers: Layers = Field(alias="layers")
    num_heads: Heads = Field(alias="heads")
    mlp_ratio: Factor = 8960 / 1536
    norm_eps: Epsilon = Field(1e-5, alias="layer_norm_eps")
    rope_theta: Theta = 10_000.0
    layer_scale_init: Annotated[float, Field(ge=0, le=100)] = Field(0.1, alias="ls_init_value")
    activation: Activation = Field("quick_gelu", alias="hidden_act")


class _Rope(_Fields):
    """`rope_scaling`, or Transformers 5's `rope_parameters`; other fields are refused."""

    model_config = ConfigDict(extra="forbid")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None
    factor: Annotated[float, Field(ge=1, le=10_000)] | None = None
    original_max_position_embeddings: Positions | None = None
    attention_factor: Factor | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {name: x for name, x in fields.items() if x is not None} if isinstance(fields, dict) else fields


class _Text(_Fields):
    """A text model: the fields of `DecoderConfig`."""

    width: Width = Field(alias="hidden_size")
    num_layers: Layers = Field(alias="num_hidden_layers")
    num_heads: Heads = Field(alias="num_attention_heads")
    num_kv_heads: Heads | None = Field(None, alias="num_key_value_heads")
    head_dim: Heads | None = None
    mlp_dim: Width = Field(alias="intermediate_size")
    norm_eps: Epsilon = Field(1e-6, alias="rms_norm_eps")
    rope_theta: Theta | None = None
    max_positions: Positions = Field(65_536, alias="max_position_embeddings")
    vocab_size: Rows
    tie_embeddings: bool | None = Field(None, alias="tie_word_embeddings")


class _TextFile(_Text):
    """A text model's file: plus the other validated fields."""

    model_type: str | None = None
    architectures: list[str] | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class _StepFile(_Fields):
    """Top-level fields of a STEP3-VL configuration."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    projector_bias: bool | None = None
    image_token_len: Rows | None = None
    patch_token_len: Rows | None = None
    image_token_id: TokenId | None = None
    stepjax_images: dict[str, Any] | None = None


Parsed = TypeVar("Parsed", bound=_Fields)
Allowed = Mapping[str, tuple[Any, ...]]

# Allowed values of fields that are present and not null: the supported variant.
_STEP: Allowed = {"vision_select_layer": (-1,), "understand_projector_stride": (2,)}
_VISION: Allowed = {
    "hidden_act": ("quick_gelu", "gelu"),
    "pool_type": ("none",),
    "output_dim": (),
    "num_channels": (3,),
    **dict.fromkeys(("use_cls_token", "ues_cls_token", "use_ln_post"), (False,)),
    **dict.fromkeys(("use_ln_pre", "use_abs_posemb", "use_rope2d"), (True,)),
}
_TEXT: Allowed = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "layer_types": ("full_attention",),
    "no_rope_layers": (1,),  # 1: the layer has rotary positions
    "no_rope_layer_interval": (0,),
    "nope_layer_interval": (0,),
    "attention_chunk_size": (),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "alibi", "use_parallel_residual"), (False,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_scaling_factor", "rope_factor"), (1,)),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb", "embedding_scale"), (1,)),
    **dict.fromkeys(("clip_qkv", "query_pre_attn_scalar", "scale_depth"), ()),
}
_TEXT_PATTERNS: Allowed = {"multiplier": (1,), "softcap": (0,)}
_ROPE: Allowed = {"beta_fast": (32,), "beta_slow": (1,), "truncate": (True,), "partial_rotary_factor": (1,)}


# Configurations ------------------------------------------------------------------------------------------------------


def config_from_hf(config: dict[str, Any]) -> tuple[ModelConfig, ImageConfig]:
    """Model and image configuration from a STEP3-VL `config.json`.

    Raises:
        CheckpointError: the file describes an unsupported variant, or has an unusable value.
    """
    _check_variant(config, _STEP, "")
    fields = _parsed(_StepFile, config, "")
    _check_variant(fields.vision_config, _VISION, "vision_config.")
    vision = _parsed(_Vision, fields.vision_config, "vision_config.")
    # The file has the crop's token count, not its size: a square grid, down-sampled four-fold.
    crop_size = 4 * round((fields.patch_token_len or 81) ** 0.5) * vision.patch_size
    implied = {"global_size": vision.image_size, "crop_size": crop_size, "patch_size": vision.patch_size}
    try:
        model = ModelConfig(
            vision=VisionConfig(
                **vision.model_dump(exclude={"image_size", "mlp_ratio"}),
                mlp_dim=int(vision.width * vision.mlp_ratio),
                position_grid=vision.image_size // vision.patch_size,
            ),
            decoder=decoder_config_from_hf(fields.text_config),
            projector_bias=bool(fields.projector_bias),
        )
        images = _image_config(implied, fields.stepjax_images or {})
    except ConfigError as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    for name, tokens in (("image_token_len", images.global_tokens), ("patch_token_len", images.crop_tokens)):
        if getattr(fields, name) not in (None, tokens):
            raise CheckpointError(
                f"config.json has {name}={getattr(fields, name)}: a view of its size has {tokens} tokens"
            )
    return model, images


def _image_config(implied: dict[str, int], own: dict[str, Any]) -> ImageConfig:
    unknown = own.keys() - ImageConfig.__dataclass_fields__
    numbers = [x for value in own.values() for x in (value if isinstance(value, list) else [value])]
    if unknown or any(isinstance(x, int | float) and not 0 <= x <= 100_000 for x in numbers):
        raise CheckpointError(f"config.json has unusable {IMAGE_FIELDS}={reprlib.repr(own)}: unknown names, or sizes")
    try:
        return pydantic.TypeAdapter(ImageConfig).validate_json(json.dumps(implied | own), strict=True)
    except pydantic.ValidationError as error:
        raise CheckpointError(f"config.json has unusable {IMAGE_FIELDS}: {error}") from error


def text_family(text: dict[str, Any]) -> str | None:
    """The member of `TEXT_FAMILIES` that a `config.json` names; None if it names no family at all.

    Raises:
        CheckpointError: the file names another family.
    """
    names = text.get("architectures")
    named = [text.get("model_type"), *(names if isinstance(names, list) else [names])]
    named = [name for name in named if name is not None]
    for family in TEXT_FAMILIES:
        # A longer name may be another model: "qwen3_moe", "Llama4ForCausalLM".
        if named and re.fullmatch(rf"{family}(?:for\w+|model|)", str(named[0]).lower()):
            return family
    if named:
        raise CheckpointError(
            f"config.json has model_type={text.get('model_type')!r}, architectures={reprlib.repr(names)}: "
            "only STEP3-VL (with a vision_config) and plain Qwen3 and Llama text models are read"
        )
    return None


def decoder_config_from_hf(text: dict[str, Any]) -> DecoderConfig:
    """Decoder configuration from a Qwen3 or Llama `config.json` (or the `text_config` of a STEP3-VL one).

    Raises:
        CheckpointError: the file describes an unsupported variant, or has an unusable value.
    """
    qwen = text_family(text) != "llama"
    fields = _checked_text(text, is_qwen=qwen)
    ropes = [rope for rope in (fields.rope_parameters, fields.rope_scaling) if rope is not None]
    rope = ropes[0] if ropes else _Rope()  # Transformers 5 writes rope_parameters
    if any(other != rope for other in ropes):
        raise CheckpointError(f"config.json has rope_parameters={rope!r} and another rope_scaling: remove one of them")
    if fields.rope_theta not in (None, rope.rope_theta or fields.rope_theta):
        raise CheckpointError(
            f"config.json has rope_theta={fields.rope_theta}, but {rope.rope_theta} in its rotary scaling"
        )
    yarn = _yarn_fields(rope, fields.max_positions)
    stretched = int(yarn.get("yarn_factor", 0) * yarn.get("yarn_trained_positions", 0))
    given = fields.model_dump(include=set(_Text.model_fields)) | {
        "num_kv_heads": fields.num_kv_heads or fields.num_heads,
        "head_dim": fields.head_dim or fields.width // fields.num_heads,
        "rope_theta": rope.rope_theta or fields.rope_theta or (1e6 if qwen else 1e4),
        "tie_embeddings": bool(fields.tie_embeddings),
        "max_positions": max(fields.max_positions, stretched),
    }
    try:
        return DecoderConfig(**given, qk_norm=qwen, **yarn)
    except ConfigError as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error


def _yarn_fields(rope: _Rope, max_positions: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` for scaled rotary positions; empty for plain ones."""
    kind = rope.rope_type or rope.type or "default"
    if kind == "default" and rope.factor in (None, 1) and rope.attention_factor in (None, 1):
        return {}
    if kind != "yarn" or rope.factor is None:
        given = rope.model_dump(exclude_none=True)
        raise CheckpointError(f"rotary scaling {given!r} is not supported: only plain positions, and plain YaRN, are")
    temperature = rope.attention_factor
    return {
        "yarn_factor": rope.factor,
        "yarn_trained_positions": rope.original_max_position_embeddings or max_positions,
        "yarn_attention_factor": 0.1 * math.log(rope.factor) + 1 if temperature is None else temperature,
    }


def vision_fields(config: VisionConfig, image_size: int) -> dict[str, Any]:
    """The `vision_config` fields that we read."""
    ratio = config.mlp_dim / config.width
    if int(config.width * ratio) < config.mlp_dim:  # readers truncate like this
        ratio = math.nextafter(ratio, math.inf)
    known = {name: getattr(config, name) for name in _Vision.model_fields if hasattr(config, name)}
    return _Vision(**known, image_size=image_size, mlp_ratio=ratio).model_dump(by_alias=True)


def text_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a text model's `config.json` that we read, except its family and rotary scaling."""
    return _Text(**{name: getattr(config, name) for name in _Text.model_fields}).model_dump(by_alias=True)


# Checks --------------------------------------------------------------------------------------------------------------


def _checked_text(text: dict[str, Any], *, is_qwen: bool) -> _TextFile:
    for rope in ("rope_parameters", "rope_scaling"):  # first, since each kind has its own fields
        given = text.get(rope)
        kind = (given.get("rope_type") or given.get("type")) if isinstance(given, dict) else None
        if isinstance(kind, str) and kind not in ("default", "yarn"):
            raise CheckpointError(
                f"config.json has {rope}.rope_type={reprlib.repr(kind)}: only default and yarn are supported"
            )
    fields = _parsed(_TextFile, text, "")
    patterns = {name: off for part, off in _TEXT_PATTERNS.items() for name in text if part in name.lower()}
    _check_variant(text, {**_TEXT, **patterns}, "")
    for rope in ("rope_parameters", "rope_scaling"):
        _check_variant(text.get(rope) or {}, _ROPE, f"{rope}.")
    # `layer_types` decides if present. Otherwise Qwen ignores its file's window by default, and layers below
    # `max_window_layers` never use it.
    window, first = text.get("sliding_window"), text.get("max_window_layers")
    used = window is not None and text.get("use_sliding_window", not is_qwen)
    if used and text.get("layer_types") is None and not (type(first) is int and first >= fields.num_layers):
        raise CheckpointError(
            f"config.json has sliding_window={reprlib.repr(window)}: only full attention is supported, and "
            "use_sliding_window does not turn the window off"
        )
    return fields


def _check_variant(given: Mapping[str, Any], table: Allowed, prefix: str) -> None:
    for name, allowed in table.items():
        if not _is_allowed(given.get(name), allowed):
            supported = " or ".join(map(repr, allowed)) or "null"
            raise CheckpointError(
                f"config.json has {prefix}{name}={reprlib.repr(given[name])}, which changes the computation: only "
                f"{supported} is supported"
            )


def _is_allowed(value: Any, allowed: tuple[Any, ...]) -> bool:
    if isinstance(value, list | dict):
        return all(_is_allowed(item, allowed) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or value in allowed


def _parsed(kind: type[Parsed], fields: Mapping[str, Any], prefix: str) -> Parsed:
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
    told = []
    for problem in problems[:5]:
        name = prefix + ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            told.append(f"config.json lacks the field {name!r}; is it a STEP3-VL, Qwen3 or Llama checkpoint?")
        elif problem["type"] == "extra_forbidden":
            told.append(f"config.json has {name}={reprlib.repr(problem['input'])}, which is not supported")
        else:
            told.append(f"config.json has {name}={reprlib.repr(problem['input'])}: {problem['msg']}")
    raise CheckpointError("; ".join(told))
