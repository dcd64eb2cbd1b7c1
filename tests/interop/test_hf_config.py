"""`config.json`: every value is checked as it is read, and what would change the answer is refused by name."""

import copy
import json
import math

import pytest
from test_hf_layout import PUBLIC_CONFIG

from stepjax.errors import CheckpointError
from stepjax.interop.model_spec import spec_from_hf

QWEN = PUBLIC_CONFIG["text_config"] | {"model_type": "qwen3", "eos_token_id": [1, 2]}
LLAMA = {name: value for name, value in QWEN.items() if name not in ("architectures", "head_dim")}
LLAMA |= {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
VISION = PUBLIC_CONFIG["vision_config"] | {"mlp_ratio": 8960 / 1536, "layer_norm_eps": 1e-5}
STEP = PUBLIC_CONFIG | {"vision_config": VISION, "stepjax_images": {"max_crops": 4, "mean": [0.5, 0.5, 0.5]}}
BAD = [None, True, False, 0, 1, -1, 10**9, 10**40, 0.5, -0.5, 1e-320, 1e39, 1e308, math.nan, math.inf, -math.inf]
BAD += ["", "12", "\ud800", [], [None], [[1]], {}, {"a": None}, {"rope_type": "yarn", "factor": "2"}]


def leaves(config, path=()):
    """The path of every value."""
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


def changed(config, path, value):
    config = copy.deepcopy(config)
    *parents, name = path
    part = config
    for parent in parents:
        part = part[parent]
    part[name] = value
    return config


CASES = [(config, path) for config in (QWEN, LLAMA, STEP) for path in leaves(config)]


@pytest.mark.parametrize("config, path", CASES, ids=lambda value: ".".join(value) if isinstance(value, tuple) else "")
def test_any_value_anywhere_is_read_or_refused_in_words(config, path):
    for value in BAD:
        try:
            spec = spec_from_hf(json.loads(json.dumps(changed(config, path, value))))
        except CheckpointError as error:
            assert len(str(error)) < 1500
        else:
            numbers = [number for part in spec.to_json().values() if isinstance(part, dict) for number in walk(part)]
            assert all(math.isfinite(number) and number < 1e16 for number in numbers)


def walk(fields):
    for value in fields.values():
        if isinstance(value, dict):
            yield from walk(value)
        elif isinstance(value, int | float):
            yield value


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1, "8", True, None, [8], 10**9])
@pytest.mark.parametrize(
    "name", ["hidden_size", "num_hidden_layers", "rms_norm_eps", "vocab_size", "intermediate_size"]
)
def test_numbers_that_describe_no_model_are_named(name, value):
    with pytest.raises(CheckpointError, match=rf"config.json has {name}="):
        spec_from_hf(QWEN | {name: value})


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": 5}, {"model_type": None, "architectures": [3]}, {"architectures": "LlamaForCausalLM"}]
    + [{"model_type": name} for name in ("qwen3_moe", "gemma3", "llama4", "mllama")]
    + [{"architectures": [name]} for name in ("Qwen3MoeForCausalLM", "Llama4ForCausalLM")]
    + [{"vision_config": value, "text_config": {}} for value in ([], "none", 3)]
    + [{"vision_config": VISION, "text_config": value} for value in (None, [], "none", {}, {"model_type": "gemma"})],
)
def test_what_describes_no_known_model_is_refused(config):
    with pytest.raises(CheckpointError, match="config.json"):
        spec_from_hf(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"no_rope_layers": [1, 1, 0]},
        {"no_rope_layer_interval": 4},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 4096, "use_sliding_window": True},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28},
        {"attention_chunk_size": 8192},
        {"attention_multiplier": 0.015625},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"mlp_multipliers": [1.0, 0.5]},
        {"logits_scaling": 8.0},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["text", "step"])
def test_fields_that_change_what_is_computed_are_refused_by_name(fields, where):
    config = QWEN | fields if where == "text" else PUBLIC_CONFIG | {"text_config": QWEN | fields}
    name = next(iter(fields))
    with pytest.raises(CheckpointError, match="rotary scaling|rope_" if name.startswith("rope_") else name):
        spec_from_hf(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"no_rope_layers": None},
        {"no_rope_layers": [1] * 36},
        {"layer_types": ["full_attention"] * 36},
        {"layer_types": ["full_attention"] * 36, "sliding_window": 4096, "use_sliding_window": True},
        {"sliding_window": None, "use_sliding_window": True},
        {"sliding_window": 4096},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 36},
        {"attention_multiplier": 1.0, "embedding_multiplier": 1, "residual_multiplier": None, "logits_scaling": 1},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"partial_rotary_factor": 1.0, "attention_chunk_size": None},
        {"attention_bias": False, "mlp_bias": None},
        {"rope_scaling": {"rope_type": "default", "mrope_section": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"vision_config": None},
        {"an_unknown_field": {"of": ["any", "kind"]}, "transformers_version": "5.1.0"},
    ],
    ids=str,
)
def test_values_that_turn_a_field_off_are_taken(fields):
    assert spec_from_hf(QWEN | fields) == spec_from_hf(QWEN)
    unnamed = PUBLIC_CONFIG["text_config"] | fields  # as the public checkpoint has it: without model_type
    assert spec_from_hf(PUBLIC_CONFIG | {"text_config": unnamed}) == spec_from_hf(PUBLIC_CONFIG)


@pytest.mark.parametrize(
    "part, fields",
    [
        ("vision_config", {"use_rope2d": False}),
        ("vision_config", {"use_abs_posemb": False}),
        ("vision_config", {"pool_type": "attn"}),
        ("vision_config", {"ls_init_value": None}),
        (None, {"vision_select_layer": -2}),
        (None, {"understand_projector_stride": 1}),
        (None, {"image_token_len": 81}),
        (None, {"patch_token_len": 80}),
        (None, {"stepjax_images": {"crop_sise": 504}}),
    ],
)
def test_variants_of_the_encoder_are_refused_by_name(part, fields):
    config = PUBLIC_CONFIG | (fields if part is None else {part: PUBLIC_CONFIG[part] | fields})
    with pytest.raises(CheckpointError, match=next(iter(fields))):
        spec_from_hf(config)
