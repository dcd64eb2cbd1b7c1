"""`config.json` of an exported model: the fields that Transformers, vLLM and SGLang read."""

import dataclasses
import math
from typing import Any

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from stepjax.interop.hf_layout import IMAGE_FIELDS, config_from_hf
from stepjax.interop.model_spec import ModelSpec
from stepjax.processing.tokenizer import SpecialTokens


def config_json(spec: ModelSpec, tokens: SpecialTokens | None, dtype: str | None) -> dict[str, Any]:
    """The fields of a model's config.json, in the public checkpoint's words.

    `tokens` gives the ids of control tokens, which are left out where they are not known; `dtype` is that of the
    tensors, None where it varies.
    """
    if isinstance(spec.model, DecoderConfig):
        return _text_fields(spec.model, tokens, dtype)
    assert isinstance(spec.model, ModelConfig) and spec.images is not None
    vision, images = spec.model.vision, spec.images
    fields: dict[str, Any] = {
        "architectures": ["StepVLForConditionalGeneration"],
        "model_type": "step_robotics",
        "auto_map": {
            "AutoConfig": "configuration_step_vl.StepRoboticsConfig",
            "AutoModelForCausalLM": "modeling_step_vl.Step3VL10BForCausalLM",
        },
        "im_start_token": "<im_start>",
        "im_end_token": "<im_end>",
        "im_patch_token": "<im_patch>",
        "image_token_len": images.global_tokens,
        "patch_token_len": images.crop_tokens,
        "understand_projector_stride": 2,
        "use_im_start_end": "true",
        "vision_select_layer": -1,
        "projector_bias": spec.model.projector_bias,
        "tie_word_embeddings": spec.decoder.tie_embeddings,
        "vision_config": {
            "image_size": images.global_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.num_layers,
            "heads": vision.num_heads,
            "mlp_ratio": _mlp_ratio(vision),
            "layer_norm_eps": vision.norm_eps,
            "rope_theta": vision.rope_theta,
            "pool_type": "none",
            "output_dim": None,
            "use_cls_token": False,
            "ls_init_value": vision.layer_scale_init,
            "use_ln_post": False,
            "hidden_act": vision.activation,
        },
        "text_config": _text_fields(spec.decoder, tokens, dtype),
    }
    if tokens is not None:
        fields["image_token_id"] = tokens.image_patch
    if dtype is not None:
        fields["torch_dtype"] = dtype
    _, implied = config_from_hf(fields)
    differing = {name: value for name, value in vars(images).items() if value != getattr(implied, name)}
    return fields | ({IMAGE_FIELDS: differing} if differing else {})


def _mlp_ratio(vision: VisionConfig) -> float:
    """The ratio of which readers take int(width * ratio): the quotient, rounded up where that would be one less."""
    ratio = vision.mlp_dim / vision.width
    return ratio if int(vision.width * ratio) == vision.mlp_dim else math.nextafter(ratio, math.inf)


def _text_fields(config: DecoderConfig, tokens: SpecialTokens | None, dtype: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.qk_norm:
        fields |= {"sliding_window": None, "use_sliding_window": False, "max_window_layers": config.num_layers}
    if config.yarn_factor > 1:
        fields["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.yarn_trained_positions,
            "attention_factor": config.yarn_attention_factor,
        }
    if tokens is not None:
        fields |= {"bos_token_id": tokens.end_of_text, "eos_token_id": list(tokens.stop_ids)}
        fields["pad_token_id"] = tokens.end_of_text
    if dtype is not None:
        fields["torch_dtype"] = dtype
    return fields


def image_fields(images: ImageConfig) -> dict[str, Any]:
    """`processor_config.json`, by which the exported processor cuts images into views."""
    fields = {"global_size": "size", "mean": "image_mean", "std": "image_std"}
    return {
        "processor_class": "Step3VLProcessor",
        "auto_map": {"AutoProcessor": "processing_step3.Step3VLProcessor"},
        **{fields.get(name, name): value for name, value in dataclasses.asdict(images).items()},
    }
