"""Exported adapters, as PEFT loads them on the exported base: the merged model's logits, and not the base's.

Legend: B rows, T tokens.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_sft import config as TINY

import stepjax
from stepjax.cli import main
from stepjax.config import InitConfig, LoraConfig, NumericsConfig
from stepjax.config_file import to_json
from stepjax.interop.adapters import base_digests
from stepjax.models import lora
from stepjax.models.step_vl import abstract_model
from stepjax.training.checkpoint import Checkpointer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
LORA = LoraConfig(rank=3, alpha=7.0)
DECODER = dataclasses.replace(TINY.model.decoder, num_layers=3)
BASE = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, decoder=DECODER))
TOKENS_BT = np.random.default_rng(0).integers(0, DECODER.vocab_size, (3, 40))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, randomized):
    """Directories: the run with adapters, and the base as a whole and its decoder, by name."""
    top = tmp_path_factory.mktemp("exported")
    base = randomized(abstract_model(BASE.model, BASE.numerics))
    with Checkpointer(top / "base/checkpoints", keep=1, config=to_json(BASE)) as checkpointer:
        checkpointer.save(1, {"model": base}, {}, wait=True)
    config = dataclasses.replace(BASE, init_from=InitConfig(path=str(top / "base")), lora=LORA)
    adapters = randomized(jax.eval_shape(lambda: lora.init_adapters(LORA, base, 0)), seed=1, spread=0.2)
    with Checkpointer(top / "run/checkpoints", keep=1, config=to_json(config)) as checkpointer:
        checkpointer.save(1, {"model": adapters}, {}, about=base_digests(base), wait=True)
    assert main(["convert", str(top / "base"), str(top / "all")]) == 0
    assert main(["convert", str(top / "base"), str(top / "decoder"), "--part", "decoder"]) == 0
    assert main(["convert", str(top / "run"), str(top / "adapters"), "--adapters"]) == 0
    assert main(["convert", str(top / "run"), str(top / "merged"), "--part", "decoder"]) == 0
    return top


def our_logits(directory):
    model, _ = stepjax.load(directory, numerics=FLOAT32)
    decoder = getattr(model, "decoder", model)
    positions_BT = np.broadcast_to(np.arange(TOKENS_BT.shape[1]), TOKENS_BT.shape)
    hidden_BTD, _ = decoder(decoder.embed(TOKENS_BT), positions_BT)
    return np.asarray(decoder.logits(hidden_BTD))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS_BT)).logits.numpy()


@pytest.mark.parametrize("base", ["decoder", "all"])
def test_peft_reloads_the_adapters_on_the_exported_base(exported, base):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported / base, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
    )
    of_base, expected = their_logits(theirs), our_logits(exported / "run")
    np.testing.assert_allclose(of_base, our_logits(exported / "base"), rtol=0, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(theirs, exported / "adapters")
    found = their_logits(adapted)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    assert np.abs(found - of_base).max() > 0.1 * np.abs(of_base).max(), "not the base alone"
    merged = their_logits(adapted.merge_and_unload())
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_every_tensor_of_ours_has_its_place(exported):
    """PEFT warns of keys that it does not know, and leaves those out that it misses."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported / "decoder", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(theirs, exported / "adapters")
    names = peft.get_peft_model_state_dict(adapted).keys()
    assert names == load_file(exported / "adapters/adapter_model.safetensors").keys() and len(names) == 2 * 7 * 3
    fields = json.loads((exported / "adapters/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(exported / "base")


def test_the_merged_export_is_transformers_merged_model(exported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    expected = our_logits(exported / "run")
    np.testing.assert_allclose(their_logits(theirs), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("base", ["decoder", "all"])
def test_what_peft_saves_is_merged(exported, base, tmp_path, capsys):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported / base, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
    )
    lora_config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, lora_config)
    expected = their_logits(adapted)
    adapted.save_pretrained(tmp_path / "saved")
    arguments = ["convert", str(exported / base), str(tmp_path / "ours"), "--merge", str(tmp_path / "saved")]
    assert main(arguments) == 0
    np.testing.assert_allclose(our_logits(tmp_path / "ours"), expected, rtol=0, atol=2e-4 * np.abs(expected).max())
