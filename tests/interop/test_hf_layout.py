"""Public tensors and our parameters: the table of keys and shapes, reshaping and back, and `config.json`."""

import copy
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_config import config_from_hf, decoder_config_from_hf
from stepjax.interop.hf_layout import decoder_tensors, disk_key, step_vl_tensors
from stepjax.models.step_vl import abstract_model, num_parameters
from stepjax.sharding import parameter_name

BLOCK, LAYER = "vision_model.transformer.resblocks.{layer}", "model.layers.{layer}"
# The public checkpoint as published (spec section 1.7), per layer where there are layers.
PUBLIC = {
    "vision_model.conv1.weight": (1536, 3, 14, 14),
    "vision_model.positional_embedding": (2704, 1536),
    "vision_model.ln_pre.weight": (1536,),
    "vision_model.ln_pre.bias": (1536,),
    f"{BLOCK}.attn.in_proj_weight": (4608, 1536),
    f"{BLOCK}.attn.in_proj_bias": (4608,),
    f"{BLOCK}.attn.out_proj.weight": (1536, 1536),
    f"{BLOCK}.attn.out_proj.bias": (1536,),
    f"{BLOCK}.ln_1.weight": (1536,),
    f"{BLOCK}.ln_1.bias": (1536,),
    f"{BLOCK}.ln_2.weight": (1536,),
    f"{BLOCK}.ln_2.bias": (1536,),
    f"{BLOCK}.ls_1.gamma": (1536,),
    f"{BLOCK}.ls_2.gamma": (1536,),
    f"{BLOCK}.mlp.c_fc.weight": (8960, 1536),
    f"{BLOCK}.mlp.c_fc.bias": (8960,),
    f"{BLOCK}.mlp.c_proj.weight": (1536, 8960),
    f"{BLOCK}.mlp.c_proj.bias": (1536,),
    "vision_model.vit_downsampler1.weight": (3072, 1536, 3, 3),
    "vision_model.vit_downsampler1.bias": (3072,),
    "vision_model.vit_downsampler2.weight": (6144, 3072, 3, 3),
    "vision_model.vit_downsampler2.bias": (6144,),
    "vit_large_projector.weight": (4096, 6144),
    "model.embed_tokens.weight": (151936, 4096),
    f"{LAYER}.self_attn.q_proj.weight": (4096, 4096),
    f"{LAYER}.self_attn.o_proj.weight": (4096, 4096),
    f"{LAYER}.self_attn.k_proj.weight": (1024, 4096),
    f"{LAYER}.self_attn.v_proj.weight": (1024, 4096),
    f"{LAYER}.self_attn.q_norm.weight": (128,),
    f"{LAYER}.self_attn.k_norm.weight": (128,),
    f"{LAYER}.mlp.gate_proj.weight": (12288, 4096),
    f"{LAYER}.mlp.up_proj.weight": (12288, 4096),
    f"{LAYER}.mlp.down_proj.weight": (4096, 12288),
    f"{LAYER}.input_layernorm.weight": (4096,),
    f"{LAYER}.post_attention_layernorm.weight": (4096,),
    "model.norm.weight": (4096,),
    "lm_head.weight": (151936, 4096),
}

# The fields of the public config.json that decide the model.
PUBLIC_CONFIG = {
    "architectures": ["StepVLForConditionalGeneration"],
    "model_type": "step_robotics",
    "image_token_len": 169,
    "patch_token_len": 81,
    "image_token_id": 151679,
    "understand_projector_stride": 2,
    "vision_select_layer": -1,
    "projector_bias": False,
    "vision_config": {
        "image_size": 728,
        "patch_size": 14,
        "width": 1536,
        "layers": 47,
        "heads": 16,
        "pool_type": "none",
        "output_dim": None,
        "use_cls_token": False,
        "ls_init_value": 0.1,
        "use_ln_post": False,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "max_position_embeddings": 65536,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}


def shapes_of(model):
    """Shape of every parameter by name."""
    return {parameter_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


# Keys and shapes -----------------------------------------------------------------------------------------------------


def test_every_public_key_and_shape_maps_to_one_parameter_and_all_are_covered():
    tensors = step_vl_tensors(ModelConfig())
    parameters = shapes_of(abstract_model(ModelConfig()))
    assert len(tensors) == len({tensor.key for tensor in tensors}) == len(PUBLIC)
    assert sorted(tensor.name for tensor in tensors) == sorted(parameters)  # one to one

    total = 0
    for tensor in tensors:
        ours = parameters[tensor.name]
        layers = ours[0] if tensor.stacked else 1
        per_tensor = ours[1:] if tensor.stacked else ours
        assert tensor.hf_shape(per_tensor) == PUBLIC[tensor.key], tensor.key
        back = jax.eval_shape(tensor.to_ours, jax.ShapeDtypeStruct(PUBLIC[tensor.key], np.float32))
        assert back.shape == per_tensor, tensor.key
        assert layers == {BLOCK: 47, LAYER: 36}.get(tensor.key.partition("}")[0] + "}", 1)
        total += layers * int(np.prod(PUBLIC[tensor.key]))
    assert total == num_parameters(abstract_model(ModelConfig())) == 10_171_750_144


def test_a_bias_of_the_projector_has_its_key():
    config = ModelConfig(projector_bias=True)
    [bias] = {t.key: t for t in step_vl_tensors(config)}.keys() - PUBLIC.keys()
    assert bias == "vit_large_projector.bias"
    assert sorted(t.name for t in step_vl_tensors(config)) == sorted(shapes_of(abstract_model(config)))


def test_llama_has_no_norms_of_heads_and_no_head():
    config = DecoderConfig(qk_norm=False, tie_embeddings=True)
    missing = {t.key for t in decoder_tensors(DecoderConfig())} - {
        t.key for t in decoder_tensors(config) if not t.is_copy
    }
    assert missing == {f"{LAYER}.self_attn.q_norm.weight", f"{LAYER}.self_attn.k_norm.weight", "lm_head.weight"}


def test_round_trip_is_byte_for_byte(tiny_dir):
    config, _ = config_from_hf(json.loads((tiny_dir / "config.json").read_text()))
    public = load_file(tiny_dir / "model.safetensors")
    parameters = shapes_of(abstract_model(config))
    visited = set()
    for tensor in step_vl_tensors(config):
        ours = parameters[tensor.name]
        for layer in range(ours[0]) if tensor.stacked else [None]:
            key = tensor.key.format(layer=layer)
            value = tensor.to_ours(public[key])
            assert value.shape == (ours if layer is None else ours[1:]), key
            back = tensor.to_hf(value)
            assert (back.shape, back.dtype) == (public[key].shape, public[key].dtype)
            assert back.tobytes() == public[key].tobytes(), key
            visited.add(key)
    assert visited == set(public)


@pytest.mark.parametrize(
    "saved, on_disk",
    [
        ("model.vision_model.conv1.weight", "vision_model.conv1.weight"),
        ("model.vit_large_projector.weight", "vit_large_projector.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_both_public_key_layouts_are_understood(saved, on_disk):
    assert disk_key(saved) == on_disk == disk_key(on_disk)


# config.json ---------------------------------------------------------------------------------------------------------


def test_public_config_gives_the_defaults():
    assert config_from_hf(PUBLIC_CONFIG) == (ModelConfig(), ImageConfig())


def test_tiny_config(tiny_dir):
    model, images = config_from_hf(json.loads((tiny_dir / "config.json").read_text()))
    assert (model.vision.width, model.vision.mlp_dim, model.vision.position_grid) == (48, 280, 12)
    assert (model.decoder.vocab_size, model.decoder.head_dim, model.decoder.max_positions) == (320, 16, 4096)
    assert (images.global_tokens, images.crop_tokens) == (9, 4)


@pytest.mark.parametrize(
    "part, field, value, named",
    [
        ("vision_config", "hidden_act", "gelu_new", "gelu_new"),
        ("vision_config", "use_cls_token", True, "use_cls_token"),
        ("vision_config", "use_ln_post", True, "use_ln_post"),
        ("text_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}, "beta_fast=16"),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 4.0}, "linear"),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "yarn"),
        ("text_config", "vocab_size", None, "vocab_size"),
        ("vision_config", "layers", None, "layers"),
    ],
)
def test_variants_that_are_not_covered_are_refused_by_name(part, field, value, named):
    config = copy.deepcopy(PUBLIC_CONFIG)
    config[part][field] = value
    if value is None:
        del config[part][field]
    with pytest.raises(CheckpointError, match=named):
        config_from_hf(config)


def test_decoder_config_of_llama():
    config = decoder_config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        }
    )
    assert not config.qk_norm and config.tie_embeddings
    assert (config.head_dim, config.rope_theta, config.norm_eps) == (64, 1e4, 1e-5)


@pytest.mark.parametrize("names", [{"architectures": ["Qwen3ForCausalLM"]}, {"model_type": "qwen3"}, {}])
def test_theta_is_read_where_either_version_of_transformers_writes_it(names):
    text = {k: v for k, v in PUBLIC_CONFIG["text_config"].items() if k not in ("architectures", "rope_theta")}
    assert decoder_config_from_hf(text | names | {"rope_theta": 5e5}).rope_theta == 5e5
    newer = decoder_config_from_hf(text | names | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert newer.rope_theta == 5e5 and newer.qk_norm
    llama = decoder_config_from_hf(text | {"architectures": None, "model_type": "llama", "rope_theta": 1e4})
    assert not llama.qk_norm
