"""`stepjax.load` of every kind of directory, onto one device and onto a mesh; exported runs are complete."""

import jax
import numpy as np
import pytest
import tokenizers
from tiny_recipe import config as RECIPE

import stepjax
from stepjax.cli import main
from stepjax.config import MeshConfig, NumericsConfig
from stepjax.errors import CheckpointError, ContextLengthError, TokenError
from stepjax.interop.load import load_model, load_run, open_checkpoint
from stepjax.interop.text_processor import TextProcessor
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL
from stepjax.processing.processor import Processor
from stepjax.sharding import make_mesh, shardings

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")


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


def test_an_exported_run_loads_to_the_same_model_and_prompts(run, exported, reconverted):
    messages = [{"role": "user", "content": "1 + 1?"}]
    expected = stepjax.load(run[0])[1].process_prompt(messages).tokens
    for directory in (exported, reconverted):
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


@pytest.fixture(params=["hf", "orbax", "run"])
def directory(request, run, exported, reconverted):
    """One of every kind."""
    return {"hf": exported, "orbax": reconverted, "run": run[0]}[request.param]


def test_parameters_go_straight_to_their_shardings(run, directory):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    model, _ = stepjax.load(directory, numerics=RECIPE.numerics, mesh=mesh)
    assert_same(model, run[1])
    for leaf, layout in zip(jax.tree.leaves(model), jax.tree.leaves(shardings(model, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    kernel = model.decoder.blocks.mlp.up_kernel[...]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 2


def test_types_are_cast_as_they_are_read(run, directory):
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
    with pytest.raises(CheckpointError, match="has 745 ids, but the model only 512 embeddings"):
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


def test_urls_are_of_runs(reconverted, capsys):
    """A URL goes to `load_run`, which names the stores that cannot be reached from here."""
    for read in (stepjax.load, load_run):
        with pytest.raises(CheckpointError, match="nowhere://bucket/run cannot be opened .*: give a local path, or"):
            read("nowhere://bucket/run")
    assert main(["generate", "nowhere://bucket/run", "--prompt", "?"]) == 1
    assert "nowhere://bucket/run cannot be opened" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is a converted checkpoint, not a run"):
        load_run(reconverted)


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
