"""The decoder against Transformers' Qwen3ForCausalLM with the same random weights, in float32.

Legend: B rows, T tokens, V vocabulary.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stepjax.config import NumericsConfig
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.interop.hf_config import decoder_config_from_hf
from stepjax.interop.hf_layout import decoder_tensors
from stepjax.interop.hf_match import fill
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import stretched

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
ROWS, TOKENS, VOCABULARY = 3, 21, 97


@pytest.fixture(scope="module")
def reference():
    """Five layers, four query heads a key-value head, a head dimension that is not width / heads, another theta."""
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        rope_theta=50_000.0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():  # norms away from one, and matrices large enough for attention to be sharp
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.fixture(scope="module")
def decoder(reference, tmp_path_factory):
    """Ours, with the configuration read from the file that Transformers writes."""
    directory = tmp_path_factory.mktemp("qwen3")
    reference.config.save_pretrained(directory)
    config = decoder_config_from_hf(json.loads((directory / "config.json").read_text()))
    assert (config.rope_theta, config.qk_norm, config.norm_eps) == (50_000.0, True, 1e-5)
    abstract = jax.eval_shape(lambda: Qwen3(config, FLOAT32, rngs=nnx.Rngs(0)))
    weights = {key: value.numpy() for key, value in reference.state_dict().items()}
    return fill(abstract, decoder_tensors(config, prefix=""), weights.__getitem__, weights)


@jax.jit
def our_logits(decoder, tokens_BT, positions_BT, segment_ids_BT=None):
    hidden_BTD, _ = decoder(decoder.embed(tokens_BT), positions_BT, segment_ids_BT)
    return decoder.logits(hidden_BTD)


def their_logits(reference, tokens_BT, **arguments):
    with torch.no_grad():
        return reference(torch.tensor(tokens_BT), **arguments).logits.numpy()


def close(ours, theirs):
    assert np.abs(theirs).max() > 1, "logits of a size that the tolerance means something for"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, TOKENS))


def test_logits(reference, decoder, tokens_BT):
    positions_BT = np.broadcast_to(np.arange(TOKENS), tokens_BT.shape)
    close(our_logits(decoder, tokens_BT, positions_BT), their_logits(reference, tokens_BT))


@pytest.mark.parametrize("attention_factor", [1.0, 1.07])
def test_logits_of_a_stretched_context(reference, decoder, tokens_BT, attention_factor):
    """YaRN, at positions that were trained and beyond them; the mixed frequencies are most of a head this small."""
    config = copy.deepcopy(reference.config)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 50_000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "attention_factor": attention_factor,
    }
    config.max_position_embeddings = 512
    theirs = transformers.Qwen3ForCausalLM(config).float().eval()
    theirs.load_state_dict(reference.state_dict())
    ours = stretched(decoder, 2.0, attention_factor=attention_factor)
    for first in (0, 400):
        positions_BT = np.broadcast_to(first + np.arange(TOKENS), tokens_BT.shape)
        expected = their_logits(theirs, tokens_BT, position_ids=torch.tensor(positions_BT.copy()))
        close(our_logits(ours, tokens_BT, positions_BT), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_padded_rows(reference, decoder, tokens_BT, side):
    """Our padding is segment 0; theirs is hidden by `attention_mask`."""
    lengths_B1 = np.array([[TOKENS], [9], [14]])
    slots_T = np.arange(TOKENS)
    real_BT = slots_T < lengths_B1 if side == "right" else slots_T >= TOKENS - lengths_B1
    positions_BT = np.maximum(np.cumsum(real_BT, axis=1) - 1, 0)
    ours = our_logits(decoder, tokens_BT, positions_BT, real_BT.astype(np.int32))
    theirs = their_logits(
        reference,
        tokens_BT,
        attention_mask=torch.tensor(real_BT.astype(np.int64)),
        position_ids=torch.tensor(positions_BT),
    )
    close(np.asarray(ours)[real_BT], theirs[real_BT])


def test_logits_of_packed_rows(reference, decoder, tokens_BT):
    """Our segments; an explicit additive mask and restarting position ids there. And each sequence by itself there."""
    lengths = [(7, 14), (5, 6, 10), (21,)]
    segment_ids_BT = np.stack([np.repeat(np.arange(len(row)) + 1, row) for row in lengths])
    positions_BT = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    ours = our_logits(decoder, tokens_BT, positions_BT, segment_ids_BT)
    visible_BTT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None]) & np.tri(TOKENS, dtype=bool)
    mask_B1TT = torch.where(torch.tensor(visible_BTT)[:, None], 0.0, torch.finfo(torch.float32).min)
    theirs = their_logits(reference, tokens_BT, attention_mask=mask_B1TT, position_ids=torch.tensor(positions_BT))
    close(ours, theirs)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for n in row_lengths:
            alone = their_logits(reference, tokens_BT[row : row + 1, start : start + n])
            close(ours[row, start : start + n], alone[0])
            start += n


def test_gradients_of_the_loss(reference, decoder, tokens_BT):
    positions_BT = np.broadcast_to(np.arange(TOKENS), tokens_BT.shape)

    @jax.jit
    @jax.value_and_grad
    def loss_and_grad(decoder):
        hidden_BTD, _ = decoder(decoder.embed(tokens_BT), positions_BT)
        log_probs_BTV = jax.nn.log_softmax(decoder.logits(hidden_BTD)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1))

    loss, grads = loss_and_grad(decoder)
    reference.zero_grad()
    labels = torch.tensor(tokens_BT)
    theirs = reference(labels, labels=labels).loss
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    gradients = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    expected = fill(
        jax.eval_shape(lambda: decoder), decoder_tensors(decoder.config, prefix=""), gradients.get, gradients
    )
    for (path, ours), value in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_greedy_generation(reference, decoder, tokens_BT):
    """Our engine against their `generate`."""
    lengths = (TOKENS, 9, 14)
    prompts = [tokens_T[:n] for tokens_T, n in zip(tokens_BT, lengths, strict=True)]
    engine = Engine(decoder, None, EngineConfig(max_sequences=4, max_context=64, page_size=16))
    ours = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24))
    for (completion,), tokens_T in zip(ours, prompts, strict=True):
        ids_1T = torch.tensor(tokens_T[None])
        theirs = reference.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(completion.tokens) == theirs[0, len(tokens_T) :].tolist()
