"""Generation: greedy equals an uncached loop, rows do not influence each other, and samples are addressed by position.

Legend: B rows, T tokens, V vocabulary.
"""

from collections import Counter

import jax
import numpy as np
import pytest

from stepjax.errors import TokenError
from stepjax.inference.generate import Generation, generate

NEW = 8  # tokens


@pytest.fixture(scope="module")
def prompts(make_example):
    """Text and two images with crops, text alone, one image without crops: rows of different lengths and views."""
    return [
        make_example(4, (1, 2), 3, (1, 1), 4, seed=1),
        make_example(6, seed=2),
        make_example(2, (0, 0), 5, seed=3),
    ]


@pytest.fixture(scope="module")
def uncached(small_model):
    """A function from a prompt and a continuation to the logits [V] that follow, without cache or padding of views."""

    @jax.jit
    def logits_TV(model, tokens_BT, feature_index_BT, global_views_BGHWC, crops_BCHWC):
        hidden_BTD, _ = model(
            tokens_BT=tokens_BT,
            positions_BT=np.arange(tokens_BT.shape[1])[None],
            feature_index_BT=feature_index_BT,
            global_views_BGHWC=global_views_BGHWC,
            crops_BCHWC=crops_BCHWC,
        )
        return model.decoder.logits(hidden_BTD)[0]

    def next_logits(example, continuation):
        length = len(example.tokens) + len(continuation)
        tokens_T = np.zeros(64, np.int32)  # causal: what follows is of no influence
        tokens_T[:length] = [*example.tokens, *continuation]
        index_T = np.full(64, -1, np.int32)
        index_T[: len(example.tokens)] = example.feature_index
        out = logits_TV(small_model, tokens_T[None], index_T[None], example.global_views[None], example.crops[None])
        return np.asarray(out)[length - 1]

    return next_logits


@pytest.fixture(scope="module")
def run(small_model, small_images):
    def generations(prompts, stop_ids=(), max_new_tokens=NEW, **settings) -> list[Generation]:
        return generate(
            small_model, prompts, small_images, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **settings
        )

    return generations


@pytest.fixture(scope="module")
def greedy(run, prompts):
    return run(prompts)


def test_greedy_is_the_argmax_of_the_uncached_forward(greedy, prompts, uncached):
    assert len(greedy) == len(prompts)
    for generation, prompt in zip(greedy, prompts, strict=True):
        assert len(generation.tokens) == NEW and generation.finish_reason == "length"
        for step, token in enumerate(generation.tokens):
            assert token == np.argmax(uncached(prompt, generation.tokens[:step])), (prompt.name, step)
    assert len({generation.tokens for generation in greedy}) == 3


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(run, greedy, prompts):
    for prompt, together in zip(prompts, greedy, strict=True):
        assert run([prompt]) == [together]


def test_stop_token_ends_a_row_and_is_left_out(run, greedy, prompts):
    """Stop at what row 0 says fourth (or where it says it first); the other rows go on unless they say it too."""
    stop = greedy[0].tokens[3]
    for generation, free in zip(run(prompts, stop_ids=(stop, 9999)), greedy, strict=True):
        stops = stop in free.tokens
        assert generation.tokens == free.tokens[: free.tokens.index(stop) if stops else NEW]
        assert generation.finish_reason == ("stop" if stops else "length")
    assert stop in greedy[0].tokens


def test_stop_at_the_last_permitted_token_is_a_stop(run, greedy, prompts):
    free = greedy[1].tokens
    last = next(step for step in range(NEW) if free.index(free[step]) == step and step >= 1)  # its first occurrence
    [generation] = run(prompts[1:2], stop_ids=(free[last],), max_new_tokens=last + 1)
    assert generation == Generation(free[:last], "stop")
    [generation] = run(prompts[1:2], stop_ids=(free[last],), max_new_tokens=last)
    assert generation == Generation(free[:last], "length")


def test_samples_depend_on_seed_request_and_position_alone(run, prompts):
    sampled = run(prompts, temperature=1.0, seed=5)
    assert run(prompts, temperature=1.0, seed=5) == sampled
    assert run(prompts, temperature=1.0, seed=6) != sampled
    # The same requests in other company and with other shapes: rows 0 and 1 keep their numbers.
    assert run(prompts[:2], temperature=1.0, seed=5) == sampled[:2]
    # A shorter run is a prefix, a longer one an extension.
    longer = run(prompts, temperature=1.0, seed=5, max_new_tokens=NEW + 3)
    assert [generation.tokens[:NEW] for generation in longer] == [generation.tokens for generation in sampled]
    # The same prompt under another number is another draw.
    assert len({generation.tokens for generation in run([prompts[1]] * 4, temperature=1.0, seed=5)}) == 4


def test_noise_is_addressed_by_position(run, make_example):
    """At a huge temperature the noise alone decides: it moves with the length of the prompt, whatever the prompt."""
    six, eight = (run([make_example(n, seed=n)], temperature=1e6, seed=5)[0].tokens for n in (6, 8))
    assert six[2:] == eight[:-2]
    assert len(set(six)) > NEW // 2


def test_samples_follow_the_tempered_distribution(run, prompts, uncached):
    """2,048 first tokens against softmax(logits / temperature)."""
    logits_V, draws, temperature = uncached(prompts[1], ()), 2048, 2.0
    counts = Counter(g.tokens[0] for g in run([prompts[1]] * draws, temperature=temperature, max_new_tokens=1))
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    expected_V = draws * weights_V / weights_V.sum()
    seen = expected_V >= 5
    assert seen.sum() >= 5, "the distribution is spread enough to tell"
    observed_V = np.array([counts[token] for token in range(len(logits_V))])
    chi2 = np.sum((observed_V - expected_V)[seen] ** 2 / expected_V[seen])
    assert chi2 < seen.sum() + 5 * np.sqrt(2 * seen.sum())  # five standard deviations


def test_low_temperature_is_greedy(run, greedy, prompts):
    assert run(prompts, temperature=1e-6, seed=1) == greedy


def test_no_prompts_give_no_generations(run):
    assert run([]) == []


def test_prompt_that_leaves_no_room_is_refused_by_name(run, prompts, small_config):
    length = len(prompts[0].tokens)
    room = small_config.decoder.max_positions - length
    with pytest.raises(TokenError, match=rf"example-1 has {length} tokens.*max_new_tokens={room + 1}.*128 positions"):
        run(prompts, max_new_tokens=room + 1)


def test_empty_prompt_is_refused_by_name(run, make_example):
    with pytest.raises(TokenError, match="example-7 has no tokens"):
        run([make_example(5), make_example(seed=7)])
