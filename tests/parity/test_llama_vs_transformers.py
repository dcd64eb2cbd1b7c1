"""The decoder as a Llama (no head norms, tied embeddings) against Transformers' LlamaForCausalLM, in float32.

Legend: B rows, T tokens.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from stepjax.config import NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_config import decoder_config_from_hf
from stepjax.interop.hf_layout import decoder_tensors
from stepjax.interop.hf_match import fill
from stepjax.models.qwen3 import Qwen3

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")


@pytest.fixture(scope="module", params=["llama", "smollm-like"])
def reference(request):
    grouped = request.param == "smollm-like"
    config = transformers.LlamaConfig(
        vocab_size=89,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2 if grouped else 6,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_theta=10_000.0 if grouped else 500_000.0,
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def test_logits_of_tied_llama(reference, tmp_path):
    reference.config.save_pretrained(tmp_path)
    config = decoder_config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config.tie_embeddings and not config.qk_norm
    abstract = jax.eval_shape(lambda: Qwen3(config, FLOAT32, rngs=nnx.Rngs(0)))
    # As in the file: a tied head is not stored.
    weights = {key: value.numpy() for key, value in reference.state_dict().items() if key != "lm_head.weight"}
    decoder = fill(abstract, decoder_tensors(config, prefix=""), weights.__getitem__, weights)

    tokens_BT = np.random.default_rng(0).integers(0, 89, (2, 17))
    positions_BT = np.broadcast_to(np.arange(17), tokens_BT.shape)
    hidden_BTD, _ = decoder(decoder.embed(tokens_BT), positions_BT)
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens_BT)).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(decoder.logits(hidden_BTD), theirs, rtol=0, atol=1e-4)


def test_scaled_rotary_positions_are_refused(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64}
    transformers.LlamaConfig(rope_scaling=scaling).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="llama3"):
        decoder_config_from_hf(json.loads((tmp_path / "config.json").read_text()))
