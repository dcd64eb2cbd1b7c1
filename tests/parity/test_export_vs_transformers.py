"""What is exported from a training run, as Transformers reads it: the text decoder's logits, tokenizer and template.

Legend: B rows, T tokens.
"""

import jax
import numpy as np
import pytest
from tiny_recipe import config as RECIPE

import stepjax
from stepjax.cli import main
from stepjax.config import NumericsConfig
from stepjax.models.step_vl import abstract_model
from stepjax.training.checkpoint import Checkpointer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
MESSAGES = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n2"},
    {"role": "user", "content": "and 2 + 2?"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, randomized):
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    model = randomized(abstract_model(RECIPE.model, RECIPE.numerics))
    with Checkpointer(directory / "checkpoints", keep=1, config=RECIPE) as checkpointer:
        checkpointer.save(1, {"model": model}, {}, wait=True)
    return directory


@pytest.fixture(scope="module")
def decoder_directory(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "decoder"
    assert main(["convert", str(run), str(directory), "--part", "decoder"]) == 0
    return directory


def our_logits(model, tokens_BT):
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    decoder = getattr(model, "decoder", model)
    hidden_BTD, _ = decoder(decoder.embed(tokens_BT), positions_BT)
    return np.asarray(decoder.logits(hidden_BTD))


def test_the_decoder_of_a_run_has_equal_logits(run, decoder_directory):
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        decoder_directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens_BT = np.random.default_rng(0).integers(0, RECIPE.model.decoder.vocab_size, (3, 40))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens_BT)).logits.numpy()
    assert np.abs(expected).max() > 1
    for directory in (run, decoder_directory):
        model, _ = stepjax.load(directory, numerics=FLOAT32)
        np.testing.assert_allclose(our_logits(model, tokens_BT), expected, rtol=0, atol=1e-4)


def test_what_transformers_saves_again_is_read(decoder_directory, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(decoder_directory, dtype=torch.float32)
    saved = tmp_path / "saved"
    theirs.save_pretrained(saved, max_shard_size="30KB")
    assert len(list(saved.glob("*.safetensors"))) > 1
    assert main(["convert", str(saved), str(tmp_path / "orbax")]) == 0
    again, before = (stepjax.interop.load.open_checkpoint(path) for path in (tmp_path / "orbax", decoder_directory))
    load_model = stepjax.interop.load.load_model
    for one, other in zip(*(jax.tree.leaves(load_model(source)) for source in (again, before)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_the_tokenizer_and_the_template_write_our_prompts(run, decoder_directory, options):
    theirs = transformers.AutoTokenizer.from_pretrained(decoder_directory)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
    _, processor = stepjax.load(run)
    assert ids == processor.process_prompt(MESSAGES, **options).tokens.tolist()


def test_generation_ends_at_our_stop_tokens(run, decoder_directory):
    config = transformers.GenerationConfig.from_pretrained(decoder_directory)
    _, processor = stepjax.load(run)
    assert tuple(config.eos_token_id) == processor.tokenizer.stop_ids
    assert (config.temperature, config.top_p, config.top_k) == (1.0, 1.0, 0)
