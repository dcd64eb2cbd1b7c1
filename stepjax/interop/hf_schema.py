"""`config.json` as it is read: types, limits, and the variants that are refused by name.

Every value is checked here, once, before anything is made of it. Fields that change nothing that is computed are passed
over; a field that does is either read, or refused unless it holds a value that turns it off.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from stepjax.config import Activation
from stepjax.errors import CheckpointError

# Far beyond any model that is known, and small enough that shapes of such a model cost nothing to compute.
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
    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


class VisionFields(_Fields):
    image_size: Pixels
    patch_size: Pixels
    width: Width
    layers: Layers
    heads: Heads
    mlp_ratio: Factor = 8960 / 1536
    layer_norm_eps: Epsilon = 1e-5
    rope_theta: Theta = 10_000.0
    ls_init_value: Annotated[float, Field(ge=0, le=100)] = 0.1
    hidden_act: Activation = "quick_gelu"


class RopeFields(_Fields):
    """Of `rope_scaling`, or `rope_parameters` as Transformers 5 writes it; no others are known."""

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


class TextFields(_Fields):
    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: Rows
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(gt=0, le=10_000)] | None = None
    intermediate_size: Width
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Theta | None = None
    rope_parameters: RopeFields | None = None
    rope_scaling: RopeFields | None = None
    max_position_embeddings: Positions = 65_536
    tie_word_embeddings: bool | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class StepFields(_Fields):
    """Beside the two parts of a STEP3-VL configuration."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    projector_bias: bool | None = None
    image_token_len: Rows | None = None
    patch_token_len: Rows | None = None
    image_token_id: TokenId | None = None
    stepjax_images: dict[str, Any] | None = None  # ours: `hf_layout.IMAGE_FIELDS`


Parsed = TypeVar("Parsed", bound=_Fields)

# What a field has to hold, if it is there and not null: the one variant that is computed here.
_STEP: dict[str, tuple[Any, ...]] = {"vision_select_layer": (-1,), "understand_projector_stride": (2,)}
_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "pool_type": ("none",),
    "output_dim": (),
    "num_channels": (3,),
    **dict.fromkeys(("use_cls_token", "ues_cls_token", "use_ln_post"), (False,)),
    **dict.fromkeys(("use_ln_pre", "use_abs_posemb", "use_rope2d"), (True,)),
}
_TEXT: dict[str, tuple[Any, ...]] = {
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
_TEXT_PATTERNS: dict[str, tuple[Any, ...]] = {"multiplier": (1,), "softcap": (0,)}
_ROPE: dict[str, tuple[Any, ...]] = {
    "beta_fast": (32,),
    "beta_slow": (1,),
    "truncate": (True,),
    "partial_rotary_factor": (1,),
}


def step_fields(config: dict[str, Any]) -> StepFields:
    """Raises CheckpointError where the file describes a variant that is not covered, or a value is unusable."""
    _check_variant(config, _STEP, "")
    return _parsed(StepFields, config, "")


def vision_fields(vision: dict[str, Any]) -> VisionFields:
    """Raises CheckpointError as `step_fields` does."""
    _check_variant(vision, _VISION, "vision_config.")
    return _parsed(VisionFields, vision, "vision_config.")


def text_fields(text: dict[str, Any], *, is_qwen: bool) -> TextFields:
    """Raises CheckpointError as `step_fields` does."""
    for rope in ("rope_parameters", "rope_scaling"):  # first, since each kind has fields of its own
        given = text.get(rope)
        kind = (given.get("rope_type") or given.get("type")) if isinstance(given, dict) else None
        if isinstance(kind, str) and kind not in ("default", "yarn"):
            raise CheckpointError(
                f"config.json has {rope}.rope_type={reprlib.repr(kind)}: only default and yarn are supported"
            )
    fields = _parsed(TextFields, text, "")
    patterns = {name: off for part, off in _TEXT_PATTERNS.items() for name in text if part in name.lower()}
    _check_variant(text, _TEXT | patterns, "")
    for rope in ("rope_parameters", "rope_scaling"):
        _check_variant(text.get(rope) or {}, _ROPE, f"{rope}.")
    # Where it is, `layer_types` decides. Else Qwen's default is not to use the window that the file has all the same,
    # and the layers below `max_window_layers` never do.
    window, first = text.get("sliding_window"), text.get("max_window_layers")
    used = window is not None and text.get("use_sliding_window", not is_qwen)
    if used and text.get("layer_types") is None and not (type(first) is int and first >= fields.num_hidden_layers):
        raise CheckpointError(
            f"config.json has sliding_window={reprlib.repr(window)}: only full attention is supported, and "
            "use_sliding_window does not turn the window off"
        )
    return fields


def _check_variant(given: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], prefix: str) -> None:
    for name, allowed in table.items():
        if not _is_allowed(given.get(name), allowed):
            supported = " or ".join(map(repr, allowed)) or "null"
            raise CheckpointError(
                f"config.json has {prefix}{name}={reprlib.repr(given[name])}, which changes what is computed: only "
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
