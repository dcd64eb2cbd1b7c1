"""`stepjax.load` of every kind of directory, onto one device and onto a mesh; exported runs are complete."""

import ast
import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from tiny_recipe import config as RECIPE

import stepjax
from stepjax.cli import main
from stepjax.config import ImageConfig, MeshConfig, NumericsConfig
from stepjax.errors import CheckpointError, ContextLengthError, TokenError
from stepjax.interop.export_files import config_json, image_fields
from stepjax.interop.load import load_model, load_processor, load_run, open_checkpoint
from stepjax.interop.model_spec import ModelSpec, spec_from_hf
from stepjax.interop.text_processor import TextProcessor
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL, abstract_model
from stepjax.processing.processor import Processor
from stepjax.processing.tokenizer import load_tokenizer
from stepjax.sharding import make_mesh, shardings
from stepjax.training.checkpoint import Checkpointer

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")


@pytest.fixture(scope="module")
def run(tmp_path_factory, randomized):
    """A run's directory with one checkpoint, and the model in it."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    model = randomized(abstract_model(RECIPE.model, RECIPE.numerics))
    with Checkpointer(directory / "checkpoints", keep=1, config=RECIPE) as checkpointer:
        checkpointer.save(16, {"model": model, "step": jax.numpy.int32(16)}, {}, wait=True)
    return directory, model


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["convert", str(run[0]), str(directory)]) == 0
    return directory


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


# Kinds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/16"])
def test_a_run_by_any_of_its_directories(run, part):
    model, processor = stepjax.load(run[0] / part)
    assert_same(model, run[1])
    assert isinstance(model, StepVL) and isinstance(processor, Processor)
    assert model.numerics == RECIPE.numerics and processor.image_config == RECIPE.images


def test_an_exported_run_loads_to_the_same_model_and_prompts(run, exported, tmp_path):
    main(["convert", str(exported), str(tmp_path / "orbax")])
    messages = [{"role": "user", "content": "1 + 1?"}]
    expected = stepjax.load(run[0])[1].process_prompt(messages).tokens
    for directory in (exported, tmp_path / "orbax"):
        model, processor = stepjax.load(directory, numerics=RECIPE.numerics)
        assert_same(model, run[1])
        assert isinstance(processor, Processor) and processor.image_config == RECIPE.images
        np.testing.assert_array_equal(processor.process_prompt(messages).tokens, expected)


@pytest.fixture
def text_directory(exported, tmp_path):
    """The decoder of the run alone."""
    main(["convert", str(exported), str(tmp_path / "orbax"), "--part", "decoder"])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "text")])
    return tmp_path / "text"


def test_a_text_model_loads_to_a_decoder_and_a_text_processor(run, text_directory):
    for directory in (text_directory, text_directory.with_name("orbax")):
        model, processor = stepjax.load(directory, numerics=RECIPE.numerics)
        assert isinstance(model, Qwen3) and isinstance(processor, TextProcessor)
        for ours, expected in zip(jax.tree.leaves(model), jax.tree.leaves(run[1].decoder), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", ["hf", "orbax", "run"])
def test_parameters_go_straight_to_their_shardings(run, exported, tmp_path, kind):
    directory = run[0] if kind == "run" else exported
    if kind == "orbax":
        main(["convert", str(exported), str(tmp_path / "orbax")])
        directory = tmp_path / "orbax"
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    model, _ = stepjax.load(directory, numerics=RECIPE.numerics, mesh=mesh)
    assert_same(model, run[1])
    for leaf, layout in zip(jax.tree.leaves(model), jax.tree.leaves(shardings(model, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    kernel = model.decoder.blocks.mlp.up_kernel[...]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 2


@pytest.mark.parametrize("kind", ["hf", "orbax", "run"])
def test_types_are_cast_as_they_are_read(run, exported, tmp_path, kind):
    directory = run[0] if kind == "run" else exported
    if kind == "orbax":
        main(["convert", str(exported), str(tmp_path / "orbax")])
        directory = tmp_path / "orbax"
    model = load_model(open_checkpoint(directory), numerics=NumericsConfig(param_dtype="bfloat16"))
    for ours, whole in zip(jax.tree.leaves(model), jax.tree.leaves(run[1]), strict=True):
        np.testing.assert_array_equal(ours, whole.astype("bfloat16"))


def test_a_checkpoint_without_a_tokenizer_says_how_to_get_the_model(tiny_dir):
    with pytest.raises(CheckpointError, match="has no tokenizer.json: .*load_model"):
        stepjax.load(tiny_dir)


def test_a_tokenizer_of_another_model_is_refused(exported, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(400)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((exported / file).read_bytes())
    with pytest.raises(CheckpointError, match="has 745 ids, and the model only 512 embeddings"):
        stepjax.load(tmp_path)


def test_places_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        stepjax.load(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        stepjax.load(tmp_path)


def test_a_run_is_loaded_with_its_configuration(run):
    for part in ("", "checkpoints", "checkpoints/16"):
        model, processor, config = load_run(run[0] / part)
        assert_same(model, run[1])
        assert config == RECIPE and processor.image_config == RECIPE.images


def test_urls_are_of_runs(run, exported, tmp_path, capsys):
    """A URL goes to `load_run`, which names the stores that cannot be reached from here."""
    for read in (stepjax.load, load_run):
        with pytest.raises(CheckpointError, match="nowhere://bucket/run cannot be opened .*: give a local path, or"):
            read("nowhere://bucket/run")
    assert main(["generate", "nowhere://bucket/run", "--prompt", "?"]) == 1
    assert "nowhere://bucket/run cannot be opened" in capsys.readouterr().err
    main(["convert", str(exported), str(tmp_path / "orbax")])
    with pytest.raises(CheckpointError, match="is a converted checkpoint and no run"):
        load_run(tmp_path / "orbax")


# What an exported run has beside its weights -------------------------------------------------------------------------


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
    assert "its tokenizer is not the one that the model was trained with" in capsys.readouterr().err
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


# Text processors -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nHelp<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_text_processor_needs_none_of_the_image_tokens(tmp_path):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw.model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257}')
    processor = TextProcessor.from_directory(tmp_path)
    example = processor.process_prompt([{"role": "user", "content": "Grüße"}])
    text = "<|im_start|>system\nHelp<|im_end|>\n<|im_start|>user\nGrüße<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(example.tokens, skip_special=False) == text
    assert (processor.stop_ids, processor.vocab_size) == ((257,), 258)
    assert list(example.tokens).count(256) == 3  # of one id each
    assert not example.loss_weights.any() and set(example.feature_index) == {-1}
    for content, part in (("Grüße", "are more than the limit of 10"), ("x" * 10_000, "at least")):
        with pytest.raises(ContextLengthError, match=part):
            processor.process_prompt([{"role": "user", "content": content}], max_tokens=10)


def test_templates_fail_in_words(tmp_path):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(TokenError, match="has no chat template"):
        TextProcessor(raw).render([])
    refusing = TextProcessor(raw, chat_template="{{ raise_exception('no system turns') }}")
    with pytest.raises(TokenError, match="refuses the conversation: no system turns"):
        refusing.render([])
    escaping = TextProcessor(raw, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(TokenError, match="cannot render"):
        escaping.render([])
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        TextProcessor.from_directory(tmp_path)
