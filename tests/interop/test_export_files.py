"""What an exported run has beside its weights: complete, and from another directory where that is asked for."""

import ast
import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from tiny_recipe import config as RECIPE

from stepjax.cli import main
from stepjax.config import ImageConfig
from stepjax.interop.export_files import chat_template, config_json, image_fields
from stepjax.interop.load import load_processor, open_checkpoint
from stepjax.interop.model_spec import ModelSpec, spec_from_hf
from stepjax.processing import templates
from stepjax.processing.chat_template import ImageSegment, SpecialSegment, generation_prompt, render
from stepjax.processing.tokenizer import load_tokenizer
from stepjax.training.checkpoint import Checkpointer


def test_an_exported_run_is_complete(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "configuration_step_vl.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_step_vl.py",
        "preprocessor_config.json",
        "processing_step3.py",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    read = {path.name: json.loads(path.read_text()) for path in exported.glob("*.json")}
    tokens = load_tokenizer("demo").special_tokens
    config = read["config.json"]
    assert config["architectures"] == ["StepVLForConditionalGeneration"]
    assert config["auto_map"]["AutoConfig"] == "configuration_step_vl.StepRoboticsConfig"
    assert (config["model_type"], config["image_token_id"]) == ("step_robotics", tokens.image_patch)
    assert (config["image_token_len"], config["patch_token_len"]) == (1, 1)
    assert config["torch_dtype"] == "float32"
    assert read["generation_config.json"]["eos_token_id"] == list(tokens.stop_ids)
    for fields in (config, read["processor_config.json"]):
        for name in fields["auto_map"].values():
            module, class_name = name.split(".")
            assert f"class {class_name}(" in (exported / f"{module}.py").read_text()
    assert read["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
    assert read["added_tokens.json"]["<im_patch>"] == tokens.image_patch


def test_the_pytorch_processor_takes_every_setting_of_images(exported):
    """By name, and with our defaults. (tests/parity runs it.)"""
    tree = ast.parse((exported / "processing_step3.py").read_text())
    [arguments] = [node.args for node in ast.walk(tree) if getattr(node, "name", None) == "__init__"]
    defaults = dict(zip([each.arg for each in arguments.args[1:]], arguments.defaults, strict=True))
    settings = image_fields(ImageConfig())
    assert defaults.keys() - settings.keys() == {"tokenizer", "chat_template"}
    for name in settings.keys() - {"processor_class", "auto_map"}:
        assert ast.literal_eval(defaults[name]) == settings[name], name
    written = json.loads((exported / "processor_config.json").read_text())
    assert written == json.loads(json.dumps(image_fields(RECIPE.images)))


@pytest.mark.parametrize("starts_thinking", [True, False])
def test_prompts_end_as_the_run_has_them(run, tmp_path, starts_thinking):
    recipe = dataclasses.replace(
        RECIPE, tokenizer=dataclasses.replace(RECIPE.tokenizer, generation_starts_thinking=starts_thinking)
    )
    with Checkpointer(tmp_path / "run" / "checkpoints", keep=1, config=recipe) as checkpointer:
        checkpointer.save(1, {"model": run[1]}, {}, wait=True)
    for source, target in (("run", "hf"), ("hf", "orbax"), ("orbax", "back")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
        processor = load_processor(open_checkpoint(tmp_path / target))
        prompt = processor.process_prompt([{"role": "user", "content": "?"}])
        assert processor.decode(prompt.tokens).endswith("<think>\n" if starts_thinking else "assistant\n")


@pytest.mark.parametrize("has_code", [True, False])
def test_code_and_the_settings_that_it_reads_stay_together(run, exported, tmp_path, has_code):
    like = tmp_path / "like"
    like.mkdir()
    (like / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    (like / "processor_config.json").write_text("{}")
    if has_code:
        (like / "modeling_step_vl.py").write_text("theirs")
    assert main(["convert", str(run[0]), str(tmp_path / "hf"), "--side-files", str(like)]) == 0
    code = {path.name: path.read_text() for path in (tmp_path / "hf").glob("*.py")}
    settings = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    if has_code:
        assert (code, settings) == ({"modeling_step_vl.py": "theirs"}, {})
    else:
        assert code == {path.name: path.read_text() for path in exported.glob("*.py")}
        assert settings["size"] == RECIPE.images.global_size


@pytest.mark.parametrize("part", ["all", "decoder"])
def test_side_files_of_another_directory_go_in_front(run, exported, tmp_path, part):
    like = tmp_path / "like"
    like.mkdir()
    (like / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    (like / "modeling_step_vl.py").write_text("pass\n")
    (like / "chat_template.jinja").write_text("theirs")
    (like / "config.json").write_text("{}")
    (like / "model.safetensors.index.json").write_text("{}")
    arguments = ["--side-files", str(like), "--part", part, "--dtype", "bfloat16"]
    assert main(["convert", str(run[0]), str(tmp_path / "hf"), *arguments]) == 0
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "theirs"
    assert (tmp_path / "hf" / "modeling_step_vl.py").exists() == (part == "all")
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == {"all": "step_robotics", "decoder": "qwen3"}[part]
    assert config["torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("vision_model.conv1.weight" in tensors) == (part == "all")
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], np.asarray(run[1].decoder.embedding[...]).astype("bfloat16")
    )


def test_side_files_with_another_tokenizer_are_refused(run, exported, tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert main(["convert", str(run[0]), str(tmp_path / "hf"), "--side-files", str(tmp_path)]) == 1
    assert "its tokenizer is not the one the model was trained with" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]


@pytest.mark.parametrize("text_only", [False, True])
def test_configurations_come_back_from_their_json(text_only):
    images = dataclasses.replace(RECIPE.images, small_is_inclusive=False, max_crops=None)
    decoder = dataclasses.replace(
        RECIPE.model.decoder, yarn_factor=2.0, yarn_trained_positions=512, max_positions=1024, yarn_attention_factor=1.5
    )
    vision = dataclasses.replace(
        RECIPE.model.vision, width=44, num_heads=1, mlp_dim=49, rope_theta=9.0
    )  # 44 * (49 / 44) < 49
    model = dataclasses.replace(RECIPE.model, vision=vision, decoder=decoder, projector_bias=True)
    spec = ModelSpec(decoder) if text_only else ModelSpec(model, images)
    fields = config_json(spec, load_tokenizer("demo").special_tokens, "bfloat16")
    assert spec_from_hf(json.loads(json.dumps(fields))) == spec


def test_llama_is_told_from_qwen():
    decoder = dataclasses.replace(RECIPE.model.decoder, qk_norm=False, tie_embeddings=True)
    fields = config_json(ModelSpec(decoder), None, None)
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert spec_from_hf(fields) == ModelSpec(decoder)


# Chat templates ------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "f", "arguments": {"x": [1, "ä"], "y": None}}}
USER = {"role": "user", "content": "Hi"}
CONVERSATIONS = {
    "plain": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hello"}, USER],
    "images": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}],
    "reasoning": [
        USER,
        {"role": "assistant", "content": "<think>\nearlier\n</think>\n\nFirst"},
        USER,
        {"role": "assistant", "content": "\nSecond", "reasoning_content": "\nlater\n"},
    ],
    "reasoning in the content": [
        USER,
        {"role": "assistant", "content": "<think>a</think>b</think>\n\nc"},
        {"role": "assistant", "content": "before <think>a</think> after"},
        {"role": "assistant", "content": "no opening</think>\nafter"},
    ],
    "calls": [
        USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, {"name": "g", "arguments": '{"a":1}'}]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "h"}]},
        {"role": "tool", "content": "three"},
    ],
}


def text_of(segments):
    def of(segment):
        if isinstance(segment, ImageSegment):
            return "<im_patch>"
        return segment.name if isinstance(segment, SpecialSegment) else segment.text

    return "".join(map(of, segments))


def rendered(messages, *, starts_thinking=True, **variables):
    template = chat_template(starts_thinking=starts_thinking)
    return templates.render(template, {"messages": messages, **variables}, name="the template", is_chat=True)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_written_alike(name, tools):
    messages = CONVERSATIONS[name]
    ours = text_of(render(messages, tools=tools))
    assert rendered(messages, tools=tools, add_generation_prompt=False) == ours


@pytest.mark.parametrize("starts_thinking", [False, True])
@pytest.mark.parametrize("enable_thinking", [None, False, True])
def test_generation_prompts_are_alike(starts_thinking, enable_thinking):
    variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    ours = text_of(
        [*render([USER]), *generation_prompt(starts_thinking=starts_thinking, enable_thinking=enable_thinking)]
    )
    written = rendered([USER], starts_thinking=starts_thinking, add_generation_prompt=True, **variables)
    assert written == ours
