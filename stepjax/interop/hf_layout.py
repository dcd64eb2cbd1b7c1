"""Which tensor of the public checkpoint is which parameter of ours, and how the two are reshaped into each other.

Public tensors are PyTorch's: linear weights [out, in], convolutions [out, in, height, width], one tensor a layer. Ours
keep the contracted dimensions first, split the heads, and stack the layers. Both layouts of the public keys are read:
the one on disk (`vision_model.*`, `model.layers.*`) and the one that Transformers re-saves (`model.vision_model.*`,
`model.language_model.*`).
"""

import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pydantic

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.interop.hf_schema import RopeFields, step_fields, text_fields, vision_fields

Array = np.ndarray

TEXT_FAMILIES = ("qwen3", "llama")
IMAGE_FIELDS = "stepjax_images"  # our field of config.json: what differs from the public model's images
STARTS_THINKING = "stepjax_starts_thinking"  # ours too: false where generation prompts do not open <think>


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One public tensor (`{layer}` in its key: one a layer) and the parameter that it fills."""

    key: str
    name: str  # our parameter, e.g. "decoder/blocks/mlp/up_kernel"
    to_ours: Callable[[Array], Array]
    to_hf: Callable[[Array], Array]
    is_copy: bool = False  # of a parameter that another tensor fills; a checkpoint may or may not have it

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.key

    def hf_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the public tensor that fills a parameter (of a stacked one: one layer) of the shape `ours`."""
        return self.to_hf(np.broadcast_to(np.float32(0), ours)).shape


def _same(x: Array) -> Array:
    return x


def _transposed(x: Array) -> Array:
    return x.T


def _tensor(key: str, name: str, to_ours=_same, to_hf=_same) -> Tensor:
    return Tensor(key, name, to_ours, to_hf)


def _linear(key: str, name: str) -> Tensor:
    return _tensor(key, name, _transposed, _transposed)


def _convolution(key: str, name: str) -> Tensor:
    return _tensor(key, name, lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def _heads_in(key: str, name: str, heads: int, head_dim: int) -> Tensor:
    """[heads * head_dim, width] to [width, heads, head_dim]."""
    return _tensor(key, name, lambda x: x.T.reshape(-1, heads, head_dim), lambda x: x.reshape(x.shape[0], -1).T)


def _heads_out(key: str, name: str, heads: int, head_dim: int) -> Tensor:
    """[width, heads * head_dim] to [heads, head_dim, width]."""
    return _tensor(key, name, lambda x: x.T.reshape(heads, head_dim, -1), lambda x: x.reshape(-1, x.shape[-1]).T)


def vision_tensors(config: VisionConfig) -> list[Tensor]:
    """The encoder's and down-samplers' tensors."""
    N, H, grid, width = config.num_heads, config.head_dim, config.position_grid, config.width
    block, ours = "vision_model.transformer.resblocks.{layer}", "vision/blocks"
    tensors = [
        _convolution("vision_model.conv1.weight", "vision/patch_kernel"),
        _tensor(
            "vision_model.positional_embedding",
            "vision/positions",
            lambda x: x.reshape(grid, grid, width),
            lambda x: x.reshape(grid * grid, width),
        ),
        _tensor("vision_model.ln_pre.weight", "vision/norm_pre/scale"),
        _tensor("vision_model.ln_pre.bias", "vision/norm_pre/bias"),
        _tensor(
            f"{block}.attn.in_proj_weight",
            f"{ours}/attention/qkv_kernel",
            lambda x: x.T.reshape(width, 3, N, H),
            lambda x: x.reshape(width, 3 * N * H).T,
        ),
        _tensor(
            f"{block}.attn.in_proj_bias",
            f"{ours}/attention/qkv_bias",
            lambda x: x.reshape(3, N, H),
            lambda x: x.reshape(3 * N * H),
        ),
        _heads_out(f"{block}.attn.out_proj.weight", f"{ours}/attention/out_kernel", N, H),
        _tensor(f"{block}.attn.out_proj.bias", f"{ours}/attention/out_bias"),
        _linear(f"{block}.mlp.c_fc.weight", f"{ours}/mlp/up_kernel"),
        _tensor(f"{block}.mlp.c_fc.bias", f"{ours}/mlp/up_bias"),
        _linear(f"{block}.mlp.c_proj.weight", f"{ours}/mlp/down_kernel"),
        _tensor(f"{block}.mlp.c_proj.bias", f"{ours}/mlp/down_bias"),
    ]
    for i in (1, 2):
        tensors += [
            _tensor(f"{block}.ln_{i}.weight", f"{ours}/norm{i}/scale"),
            _tensor(f"{block}.ln_{i}.bias", f"{ours}/norm{i}/bias"),
            _tensor(f"{block}.ls_{i}.gamma", f"{ours}/scale{i}"),
            _convolution(f"vision_model.vit_downsampler{i}.weight", f"projector/down{i}/kernel"),
            _tensor(f"vision_model.vit_downsampler{i}.bias", f"projector/down{i}/bias"),
        ]
    return tensors


# The encoder's keys in timm, which renamed Meta's, and so those of STEP3-VL.
_TIMM_NAMES = (
    ("vision_model.", ""),
    ("transformer.resblocks.", "blocks."),
    ("conv1.", "patch_embed.proj."),
    ("positional_embedding", "pos_embed"),
    ("ln_pre.", "norm_pre."),
    ("ln_", "norm"),
    ("ls_1.gamma", "gamma_1"),
    ("ls_2.gamma", "gamma_2"),
    ("in_proj_", "qkv."),
    ("out_proj.", "proj."),
    ("c_fc.", "fc1."),
    ("c_proj.", "fc2."),
)


def timm_tensors(config: VisionConfig) -> list[Tensor]:
    """The encoder's tensors as timm stores a Perception Encoder (`vit_pe_lang_gigantic_patch14_448`)."""
    tensors = []
    for tensor in vision_tensors(config):
        if tensor.name.startswith("vision/"):
            key = tensor.key
            for theirs, timms in _TIMM_NAMES:
                key = key.replace(theirs, timms)
            tensors.append(dataclasses.replace(tensor, key=key))
            if key == "pos_embed":  # [1, patches, width]
                tensors[-1] = dataclasses.replace(tensors[-1], to_hf=lambda x: x.reshape(1, -1, x.shape[-1]))
    return tensors


def decoder_tensors(config: DecoderConfig, prefix: str = "decoder/") -> list[Tensor]:
    """The decoder's tensors: plain Qwen3, or Llama where norms are absent and embeddings tied."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    layer, ours = "model.layers.{layer}", f"{prefix}blocks"
    tensors = [
        _tensor("model.embed_tokens.weight", f"{prefix}embedding"),
        _tensor("model.norm.weight", f"{prefix}norm/scale"),
        _tensor(f"{layer}.input_layernorm.weight", f"{ours}/norm1/scale"),
        _tensor(f"{layer}.post_attention_layernorm.weight", f"{ours}/norm2/scale"),
        _heads_in(f"{layer}.self_attn.q_proj.weight", f"{ours}/attention/q_kernel", N, H),
        _heads_in(f"{layer}.self_attn.k_proj.weight", f"{ours}/attention/k_kernel", K, H),
        _heads_in(f"{layer}.self_attn.v_proj.weight", f"{ours}/attention/v_kernel", K, H),
        _heads_out(f"{layer}.self_attn.o_proj.weight", f"{ours}/attention/out_kernel", N, H),
        _linear(f"{layer}.mlp.gate_proj.weight", f"{ours}/mlp/gate_kernel"),
        _linear(f"{layer}.mlp.up_proj.weight", f"{ours}/mlp/up_kernel"),
        _linear(f"{layer}.mlp.down_proj.weight", f"{ours}/mlp/down_kernel"),
    ]
    if config.qk_norm:
        tensors += [
            _tensor(f"{layer}.self_attn.{side}_norm.weight", f"{ours}/attention/{side}_norm/scale") for side in "qk"
        ]
    if not config.tie_embeddings:
        tensors.append(_linear("lm_head.weight", f"{prefix}head_kernel"))
    else:  # some writers store the tied head all the same
        tensors.append(Tensor("lm_head.weight", f"{prefix}embedding", _same, _same, is_copy=True))
    return tensors


def step_vl_tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a STEP3-VL checkpoint, under its key on disk."""
    tensors = vision_tensors(config.vision) + decoder_tensors(config.decoder)
    tensors.append(_linear("vit_large_projector.weight", "projector/kernel"))
    if config.projector_bias:
        tensors.append(_tensor("vit_large_projector.bias", "projector/bias"))
    return tensors


def disk_key(key: str) -> str:
    """The key on disk of a key in either public layout."""
    key = re.sub(r"^model\.(vision_model|vit_large_projector)\.", r"\1.", key)
    return re.sub(r"^model\.language_model\.", "model.", key)


def config_from_hf(hf: dict[str, Any]) -> tuple[ModelConfig, ImageConfig]:
    """Model and image configuration from a STEP3-VL `config.json`.

    Raises:
        CheckpointError: the file describes a variant that this model does not cover, or has an unusable value.
    """
    fields = step_fields(hf)
    vision = vision_fields(fields.vision_config)
    # The crop's size is not in the file: its token count is (a square of a 4-fold down-sampled grid).
    crop_grid = 4 * round((fields.patch_token_len or 81) ** 0.5)
    images = {"global_size": vision.image_size, "crop_size": crop_grid * vision.patch_size}
    images |= {"patch_size": vision.patch_size}
    try:
        model = ModelConfig(
            vision=VisionConfig(
                width=vision.width,
                num_layers=vision.layers,
                num_heads=vision.heads,
                mlp_dim=int(vision.width * vision.mlp_ratio),
                patch_size=vision.patch_size,
                position_grid=vision.image_size // vision.patch_size,
                norm_eps=vision.layer_norm_eps,
                rope_theta=vision.rope_theta,
                layer_scale_init=vision.ls_init_value,
                activation=vision.hidden_act,
            ),
            decoder=decoder_config_from_hf(fields.text_config),
            projector_bias=bool(fields.projector_bias),
        )
        image_config = _image_config(images, fields.stepjax_images or {})
    except ConfigError as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error
    for name, tokens in (
        ("image_token_len", image_config.global_tokens),
        ("patch_token_len", image_config.crop_tokens),
    ):
        if getattr(fields, name) not in (None, tokens):
            raise CheckpointError(
                f"config.json has {name}={getattr(fields, name)}: a view of its size has {tokens} tokens"
            )
    return model, image_config


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
    """Which of `TEXT_FAMILIES` a `config.json` names; None where it names none.

    Raises:
        CheckpointError: it names another.
    """
    names = text.get("architectures")
    named = [text.get("model_type"), *(names if isinstance(names, list) else [names])]
    named = [name for name in named if name is not None]
    for family in TEXT_FAMILIES:
        # One more letter may be of another model: "qwen3_moe", "Llama4ForCausalLM".
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
        CheckpointError: the file describes a variant that the decoder does not cover, or has an unusable value.
    """
    qwen = text_family(text) != "llama"
    fields = text_fields(text, is_qwen=qwen)
    ropes = [rope for rope in (fields.rope_parameters, fields.rope_scaling) if rope is not None]
    rope = ropes[0] if ropes else RopeFields()  # Transformers 5 writes the first
    if any(other != rope for other in ropes):
        raise CheckpointError(f"config.json has rope_parameters={rope!r} and another rope_scaling: remove one of them")
    if fields.rope_theta not in (None, rope.rope_theta or fields.rope_theta):
        raise CheckpointError(
            f"config.json has rope_theta={fields.rope_theta}, and {rope.rope_theta} beside its scaling"
        )
    yarn = _yarn_fields(rope, fields.max_position_embeddings)
    stretched = int(yarn.get("yarn_factor", 0) * yarn.get("yarn_trained_positions", 0))
    try:
        return DecoderConfig(
            vocab_size=fields.vocab_size,
            width=fields.hidden_size,
            num_layers=fields.num_hidden_layers,
            num_heads=fields.num_attention_heads,
            num_kv_heads=fields.num_key_value_heads or fields.num_attention_heads,
            head_dim=fields.head_dim or fields.hidden_size // fields.num_attention_heads,
            mlp_dim=fields.intermediate_size,
            norm_eps=fields.rms_norm_eps,
            rope_theta=rope.rope_theta or fields.rope_theta or (1e6 if qwen else 1e4),
            qk_norm=qwen,
            tie_embeddings=bool(fields.tie_word_embeddings),
            max_positions=max(fields.max_position_embeddings, stretched),
            **yarn,
        )
    except ConfigError as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error


def _yarn_fields(rope: RopeFields, max_positions: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` for scaled rotary positions; none for plain ones.

    Raises:
        CheckpointError: they are scaled in a way that is not supported.
    """
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
