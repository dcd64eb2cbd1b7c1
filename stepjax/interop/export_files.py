"""The files beside the weights of an exported directory: configuration, tokenizer, templates.

Those that a converted checkpoint kept are given back as they were. Others are made, for what trained here has none:
the PyTorch files in `assets/pytorch` are copied, and `--side-files DIR` takes the tokenizer and the remote code of
another directory, such as the public checkpoint, in their place.
"""

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

from stepjax.config import TokenizerConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_config import config_json, image_fields
from stepjax.interop.hf_directory import CONFIG, INDEX, read_json, side_files
from stepjax.interop.hf_layout import STARTS_THINKING
from stepjax.interop.jinja_template import jinja_template
from stepjax.interop.model_spec import ModelSpec
from stepjax.processing.tokenizer import MARKERS, SpecialTokens, Tokenizer, load_tokenizer

# What belongs to the seeing model only.
_VISION_FILES = ("preprocessor_config.json", "processor_config.json")


def copy_kept(directory: Path, target: Path, *, text_only: bool) -> list[str]:
    """Copy the side files of a Hugging Face directory. Returns the names of what else is in it.

    With `text_only`, the remote code and the image processor's settings stay behind, and `config.json` becomes that of
    the text model.
    """
    target.mkdir(exist_ok=True)
    files, others = side_files(directory)
    for file in files:
        vision = file.suffix == ".py" or file.name in (*_VISION_FILES, INDEX)
        if not (text_only and vision):
            shutil.copyfile(file, target / file.name)
    return others


def text_config(whole: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """`config.json` of the decoder alone, from that of the whole model."""
    made = config_json(spec, None, None)
    names = {name: made[name] for name in ("architectures", "model_type")}
    return made | (whole.get("text_config") or {}) | names


def write_config(directory: Path, fields: dict[str, Any]) -> None:
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def restore(kept: Path, target: Path, *, spec: ModelSpec, text_only: bool, dtype: str | None) -> None:
    """Give back the side files of a converted checkpoint; `dtype` is the tensors' new type, None where it is kept."""
    copy_kept(kept, target, text_only=text_only)
    fields = read_json(kept / CONFIG)
    if text_only:
        fields = text_config(fields, spec)
    if dtype is not None:
        for part in (fields, fields.get("text_config") or {}, fields.get("vision_config") or {}):
            part |= {name: dtype for name in ("dtype", "torch_dtype") if name in part}
    if fields != read_json(kept / CONFIG):
        write_config(target, fields)


def make(
    target: Path, spec: ModelSpec, tokenizer_config: TokenizerConfig, dtype: str | None, others: Path | None
) -> None:
    """Write the side files of a model that was trained here, with those of the directory `others` in front."""
    if others is not None:
        copy_kept(others, target, text_only=spec.is_text)
        (target / INDEX).unlink(missing_ok=True)
        if not (target / "tokenizer.json").exists():
            raise CheckpointError(f"--side-files {others}: it has no tokenizer.json")
        tokenizer = load_tokenizer(target)
        _check_same_ids(tokenizer, load_tokenizer(tokenizer_config), others)
    else:
        tokenizer = load_tokenizer(tokenizer_config)
    tokens = tokenizer.special_tokens
    starts_thinking = tokenizer_config.generation_starts_thinking
    ours = {} if spec.is_text or starts_thinking else {STARTS_THINKING: False}
    write_config(target, config_json(spec, tokens, dtype) | ours)
    if not (target / "tokenizer.json").exists():
        tokenizer.save(target / "tokenizer.json")
    template = jinja_template(starts_thinking=starts_thinking)
    made: dict[str, Any] = {
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
            code = importlib.resources.files("stepjax").joinpath("assets", "pytorch")
            for file in code.iterdir():
                if file.name.endswith(".py"):
                    (target / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
            for name in _VISION_FILES:  # of other code
                (target / name).unlink(missing_ok=True)
        made |= dict.fromkeys(_VISION_FILES, image_fields(spec.images))
    for name, fields in made.items():
        if not (target / name).exists():
            (target / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (target / "chat_template.jinja").exists():
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


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
            "padding_side": "left",  # of batches that are generated from
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
            f"--side-files {where}: its tokenizer is not the one that the model was trained with (it differs in "
            f"{', '.join(differing) or 'the number of ids'}); leave the option out, or name the right directory"
        )
