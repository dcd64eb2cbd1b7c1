"""Which tensor of the public checkpoint is which parameter of ours, and how the two are reshaped into each other.

Public tensors are PyTorch's: linear weights [out, in], convolutions [out, in, height, width], one tensor a layer. Ours
keep the contracted dimensions first, split the heads, and stack the layers. Both layouts of the public keys are read:
the one on disk (`vision_model.*`, `model.layers.*`) and the one that Transformers re-saves (`model.vision_model.*`,
`model.language_model.*`).
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pydantic

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from stepjax.errors import CheckpointError

Array = np.ndarray

IMAGE_FIELDS = "stepjax_images"  # our field of config.json: what differs from the public model's images


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


def config_from_hf(hf: dict) -> tuple[ModelConfig, ImageConfig]:
    """Model and image configuration from a STEP3-VL `config.json`.

    Raises:
        CheckpointError: the file describes a variant that this model does not cover.
    """
    try:
        vision, text = hf["vision_config"], hf["text_config"]
        if (
            vision.get("hidden_act", "quick_gelu") != "quick_gelu"
            or vision.get("use_cls_token")
            or vision.get("use_ln_post")
        ):
            raise CheckpointError(
                f"vision_config={vision}: only quick_gelu without class token and final norm is supported"
            )
        patch, width = vision["patch_size"], vision["width"]
        image_size = vision["image_size"]
        model = ModelConfig(
            vision=VisionConfig(
                width=width,
                num_layers=vision["layers"],
                num_heads=vision["heads"],
                mlp_dim=int(width * vision.get("mlp_ratio", 8960 / 1536)),
                patch_size=patch,
                position_grid=image_size // patch,
                norm_eps=vision.get("layer_norm_eps", 1e-5),
                layer_scale_init=vision.get("ls_init_value", 0.1),
            ),
            decoder=decoder_config_from_hf(text),
            projector_bias=hf.get("projector_bias", False),
        )
        # The crop's size is not in the file: its token count is (a square of a 4-fold down-sampled grid).
        crop_grid = 4 * round(hf.get("patch_token_len", 81) ** 0.5)
        images = {"global_size": image_size, "crop_size": crop_grid * patch, "patch_size": patch}
        images |= hf.get(IMAGE_FIELDS, {})
        return model, pydantic.TypeAdapter(ImageConfig).validate_python(images)
    except KeyError as error:
        raise CheckpointError(f"config.json lacks the field {error}; is it a STEP3-VL checkpoint?") from error
    except pydantic.ValidationError as error:
        raise CheckpointError(f"config.json has unusable {IMAGE_FIELDS}: {error}") from error


def decoder_config_from_hf(text: dict) -> DecoderConfig:
    """Decoder configuration from a Qwen3 or Llama `config.json` (or the `text_config` of a STEP3-VL one).

    Raises:
        CheckpointError: its rotary positions are scaled, and not by plain YaRN.
    """
    family = " ".join([text.get("model_type") or "", *(text.get("architectures") or [])]).lower()
    qwen = "qwen3" in family or not family.strip()
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # Transformers 5 writes the first
    max_positions = text.get("max_position_embeddings", 65_536)
    yarn = _yarn_fields(rope, max_positions)
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        mlp_dim=text["intermediate_size"],
        norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or text.get("rope_theta", 1e6 if qwen else 1e4),
        qk_norm=qwen,
        tie_embeddings=text.get("tie_word_embeddings", False),
        max_positions=max(max_positions, int(yarn.get("yarn_factor", 0) * yarn.get("yarn_trained_positions", 0))),
        **yarn,
    )


def _yarn_fields(rope: dict, max_positions: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` for scaled rotary positions; none for plain ones.

    Raises:
        CheckpointError: they are scaled in a way that is not supported.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"}
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    unusual = {
        name: value
        for name, value in rope.items()
        if name not in known and value is not None and usual.get(name) != value
    }
    if kind != "yarn" or "factor" not in rope or unusual:
        raise CheckpointError(f"rotary scaling {rope!r} is not supported: only plain positions, and plain YaRN, are")
    factor = float(rope["factor"])
    temperature = rope.get("attention_factor")
    return {
        "yarn_factor": factor,
        "yarn_trained_positions": rope.get("original_max_position_embeddings") or max_positions,
        "yarn_attention_factor": 0.1 * math.log(factor) + 1 if temperature is None else temperature,
    }
