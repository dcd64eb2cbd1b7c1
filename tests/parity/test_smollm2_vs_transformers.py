"""Real weights: SmolLM2-135M-Instruct against Transformers, in float32.

The weights come from a package index, where one can be reached; the tests are skipped where not.

Legend: B rows, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepjax
from benchmarks.smollm2 import UnavailableError, smollm2
from stepjax.config import NumericsConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
TOLERANCE = 1e-3
NEW_TOKENS = 200
MESSAGES = [{"role": "user", "content": "Explain in a few sentences why the sky is blue. Then write a haiku about it."}]


@pytest.fixture(scope="module")
def directory():
    try:
        return smollm2()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def ours(directory):
    return stepjax.load(directory, numerics=FLOAT32)


@jax.jit
def logits(model, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD, _ = model(model.embed(tokens_BT), positions_BT)
    return model.logits(hidden_BTD)


def test_prompts(theirs, ours):
    expected = theirs[1].apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours[1].process_prompt(MESSAGES).tokens.tolist() == expected
    text = "Grüße, 你好 and 3.14\n\n  indented"
    assert ours[1].encode(text) == theirs[1](text)["input_ids"]
    assert ours[1].decode(ours[1].encode(text)) == text


def test_logits(theirs, ours):
    model, processor = ours
    tokens_BT = processor.process_prompt(MESSAGES).tokens[None]
    with torch.no_grad():
        expected = theirs[0](torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(logits(model, tokens_BT), expected, rtol=0, atol=TOLERANCE)


def test_greedy_text(theirs, ours):
    model, processor = ours
    prompt_T = processor.process_prompt(MESSAGES).tokens
    prompt_BT = torch.tensor(prompt_T[None], dtype=torch.long)
    theirs[0].generation_config.eos_token_id = None  # go on after the answer
    with torch.no_grad():
        expected = (
            theirs[0]
            .generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=NEW_TOKENS, do_sample=False)[
                0, len(prompt_T) :
            ]
            .numpy()
        )
    assert len(expected) == NEW_TOKENS
    # Greedy text is the same if, after every beginning of it, the next token is the likeliest: one pass tells.
    scores_1TV = logits(model, np.concatenate([prompt_T, expected[:-1]])[None])
    chosen = np.asarray(jnp.argmax(scores_1TV[0, len(prompt_T) - 1 :], axis=-1))
    np.testing.assert_array_equal(chosen, expected)
    assert processor.decode(chosen) == theirs[1].decode(expected, skip_special_tokens=True)
