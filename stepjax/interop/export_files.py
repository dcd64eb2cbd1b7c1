"""Side files of an exported directory: configuration, tokenizer, templates.

A converted checkpoint's side files are exported unchanged. For a model trained here they are generated: the PyTorch
files and the chat template come from `assets/pytorch`, unless `--side-files DIR` supplies the tokenizer and the remote
code of another directory, such as the public checkpoint.
"""

import copy
import dataclasses
import importlib.resources
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.config import DecoderConfig, ImageConfig, ModelConfig, TokenizerConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_config import IMAGE_FIELDS, STARTS_THINKING, config_from_hf, text_fields, vision_fields
from stepjax.interop.hf_directory import CONFIG, INDEX, side_files
from stepjax.interop.model_spec import ModelSpec
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.processing.tokenizer import MARKERS, SpecialTokens, Tokenizer, load_tokenizer

# Only for models that read images.
_VISION_FILES = ("preprocessor_config.json", "processor_config.json")


def write_side_files(
    target: Path,
    source: OrbaxDirectory,
    spec: ModelSpec,
    dtypes: Mapping[str, np.dtype],
    *,
    is_cast: bool,
    others: Path | None,
) -> None:
    """Writes the side files of an exported checkpoint.

    Args:
        spec: of the exported model, the whole one or its text part.
        dtypes: of the tensors; configurations state the dtype if there is only one.
        is_cast: whether `dtypes` differ from the stored ones.
        others: a directory whose files take precedence over ours; for training runs.
    """
    names = {dtype.name for dtype in dtypes.values()}
    dtype = names.pop() if len(names) == 1 else None
    if source.run is not None:
        make(target, spec, source.run.tokenizer, dtype, others)
        return
    fields = source.kept_config()
    if fields is None or source.side_files is None:
        return
    text_only = spec != source.spec
    copy_kept(source.side_files, target, text_only=text_only)
    changed = text_config(fields, spec) if text_only else copy.deepcopy(fields)
    if is_cast and dtype is not None:
        for part in (changed, changed.get("text_config") or {}, changed.get("vision_config") or {}):
            part |= {name: dtype for name in ("dtype", "torch_dtype") if name in part}
    if changed != fields:
        write_config(target, changed)


def copy_kept(directory: Path, target: Path, *, text_only: bool) -> list[str]:
    """Copies the side files of a Hugging Face directory. Returns the names of everything else in it.

    `text_only` skips the remote code and the image processor's settings.
    """
    target.mkdir(exist_ok=True)
    files, others = side_files(directory)
    for file in files:
        vision = file.suffix == ".py" or file.name in (*_VISION_FILES, INDEX)
        if not (text_only and vision):
            shutil.copyfile(file, target / file.name)
    return others


def make(
    target: Path, spec: ModelSpec, tokenizer_config: TokenizerConfig, dtype: str | None, others: Path | None
) -> None:
    """Writes the side files of a model trained here; files in `others` take precedence over ours."""
    if others is not None:
        copy_kept(others, target, text_only=spec.is_text)
        (target / INDEX).unlink(missing_ok=True)
        if not (target / "tokenizer.json").exists():
            raise CheckpointError(f"--side-files {others}: it has no tokenizer.json")
        tokenizer = load_tokenizer(target)
        _check_same_ids(tokenizer, load_tokenizer(tokenizer_config), others)
    else:
        tokenizer = load_tokenizer(tokenizer_config)
        tokenizer.save(target / "tokenizer.json")
    tokens = tokenizer.special_tokens
    starts_thinking = tokenizer_config.generation_starts_thinking
    ours = {} if spec.is_text or starts_thinking else {STARTS_THINKING: False}
    write_config(target, config_json(spec, tokens, dtype) | ours)
    made = {
        "generation_config.json": {
            "bos_token_id": tokens.end_of_text,
            "eos_token_id": list(tokens.stop_ids),
            "pad_token_id": tokens.end_of_text,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
        },
        **_tokenizer_files(target / "tokenizer.json", spec.decoder.max_positions),
    }
    if spec.images is not None:
        if not (target / "modeling_step_vl.py").exists():
            for file in _assets().iterdir():
                if file.name.endswith(".py"):
                    (target / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
            for name in _VISION_FILES:  # belong to other code
                (target / name).unlink(missing_ok=True)
        made |= dict.fromkeys(_VISION_FILES, image_fields(spec.images))
    texts = {"chat_template.jinja": chat_template(starts_thinking=starts_thinking)}
    texts |= {name: json.dumps(fields, indent=2, ensure_ascii=False) + "\n" for name, fields in made.items()}
    for name, text in texts.items():
        if not (target / name).exists():
            (target / name).write_text(text, encoding="utf-8")


def chat_template(*, starts_thinking: bool) -> str:
    """`processing.chat_template` as a Jinja template, for servers that render conversations themselves.

    It renders the same text but does not separate text from control tokens: `<|im_end|>` in a message ends a turn. An
    image is one `<im_patch>`, which those servers' processors expand. See `chat_template.generation_prompt` for
    `starts_thinking`.
    """
    template = (_assets() / "chat_template.jinja").read_text(encoding="utf-8")
    return template.replace("STARTS_THINKING", "true" if starts_thinking else "false")


def _assets():
    return importlib.resources.files("stepjax") / "assets" / "pytorch"


def _tokenizer_files(tokenizer_json: Path, max_positions: int) -> dict[str, Any]:
    added = json.loads(tokenizer_json.read_text(encoding="utf-8"))["added_tokens"]
    special = [token["content"] for token in added if token["special"] and token["content"] not in MARKERS]
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added
            },
            "additional_special_tokens": special,
            "bos_token": None,
            **ends,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",  # for batched generation
            "model_max_length": max_positions,
        },
        "special_tokens_map.json": {"additional_special_tokens": special, **ends},
        "added_tokens.json": {token["content"]: token["id"] for token in added},
    }


def _check_same_ids(given: Tokenizer, trained: Tokenizer, where: Path) -> None:
    names = [name for name in SpecialTokens.__dataclass_fields__]
    differing = [name for name in names if getattr(given.special_tokens, name) != getattr(trained.special_tokens, name)]
    if differing or given.vocab_size != trained.vocab_size:
        raise CheckpointError(
            f"--side-files {where}: its tokenizer is not the one the model was trained with (it differs in "
            f"{', '.join(differing) or 'the number of ids'}); drop the option, or name the right directory"
        )


# config.json ---------------------------------------------------------------------------------------------------------


def write_config(directory: Path, fields: dict[str, Any]) -> None:
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def text_config(whole: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The decoder's `config.json`, derived from the whole model's."""
    made = config_json(spec, None, None)
    names = {name: made[name] for name in ("architectures", "model_type")}
    return made | (whole.get("text_config") or {}) | names


def config_json(spec: ModelSpec, tokens: SpecialTokens | None, dtype: str | None) -> dict[str, Any]:
    """The config.json fields that Transformers, vLLM and SGLang read, named as in the public checkpoint.

    `tokens` provides control token ids; None omits them. `dtype` is the tensors' dtype; None if it varies.
    """
    if isinstance(spec.model, DecoderConfig):
        return _text_fields(spec.model, tokens, dtype)
    assert isinstance(spec.model, ModelConfig) and spec.images is not None
    images = spec.images
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
            **vision_fields(spec.model.vision, images.global_size),
            "pool_type": "none",
            "output_dim": None,
            "use_cls_token": False,
            "use_ln_post": False,
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


def _text_fields(config: DecoderConfig, tokens: SpecialTokens | None, dtype: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **text_fields(config),
        "hidden_act": "silu",
        "rope_scaling": None,
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
    """`processor_config.json`: how the exported processor cuts images into views."""
    names = {"global_size": "size", "mean": "image_mean", "std": "image_std"}
    settings = [each.name for each in dataclasses.fields(images) if each.init]  # the rest follows from the model
    return {
        "processor_class": "Step3VLProcessor",
        "auto_map": {"AutoProcessor": "processing_step3.Step3VLProcessor"},
        **{names.get(name, name): getattr(images, name) for name in settings},
    }
