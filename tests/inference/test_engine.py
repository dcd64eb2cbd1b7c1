"""The engine: its tokens are the model's, whatever else is under way, and its memory is accounted for.

Legend: V vocabulary.
"""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from stepjax.config import MeshConfig
from stepjax.errors import BusyError, ConfigError, RequestError
from stepjax.inference import programs, runner
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.output import completions
from stepjax.inference.request import SamplingParams
from stepjax.models.step_vl import stretched
from stepjax.sharding import make_mesh

NEW = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
SAMPLED = SamplingParams(seed=5, max_tokens=NEW)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6] * 5  # two and a half pages


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def greedy(engine, prompts):
    return [completion for (completion,) in engine.generate(prompts, GREEDY)]


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def assert_all_free(engine):
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert not engine.has_work


def test_greedy_is_the_argmax_of_the_uncached_forward(greedy, prompts, uncached):
    for completion, prompt in zip(greedy, prompts, strict=True):
        assert len(completion.tokens) == NEW and completion.finish_reason == "length"
        assert completion.num_prompt_tokens == len(prompt.tokens)
        for step, token in enumerate(completion.tokens):
            assert token == np.argmax(uncached(prompt, completion.tokens[:step])), (prompt.name, step)
    assert len(set(tokens_of(greedy))) == 3


def test_a_request_alone_gives_what_it_gives_among_others(make_engine, engine, prompts):
    """Greedy and sampled, with everything about the schedule changed: order, company, chunks, pages, steps, caching."""
    wishes = [dataclasses.replace(SAMPLED, seed=i, top_p=0.9) for i in range(3)]
    together = [tokens_of(c) for c in engine.generate(prompts, wishes)]
    for other in (
        make_engine(max_sequences=1),
        make_engine(prefix_caching=False, prefill_tokens=16, view_batch=1),
        make_engine(decode_steps=3, page_size=32),
    ):
        assert [tokens_of(c) for c in other.generate(prompts[::-1], wishes[::-1])] == together[::-1]
        assert_all_free(other)


def test_samples_depend_on_seed_sample_and_position_alone(engine):
    (four,) = engine.generate([TEXT], dataclasses.replace(SAMPLED, n=4))
    assert len(set(tokens_of(four))) == 4
    (two,) = engine.generate([TEXT], dataclasses.replace(SAMPLED, n=2))
    assert tokens_of(two) == tokens_of(four)[:2]
    (longer,) = engine.generate([TEXT], dataclasses.replace(SAMPLED, max_tokens=NEW + 4))
    assert longer[0].tokens[:NEW] == four[0].tokens
    # Equal prompts of one list differ, and so do requests without a seed, which say the one they drew.
    assert len({c.tokens for (c,) in engine.generate([TEXT] * 3, SAMPLED)}) == 3
    ((one,),) = engine.generate([TEXT], SamplingParams(max_tokens=NEW))
    ((other,),) = engine.generate([TEXT], SamplingParams(max_tokens=NEW))
    assert one.tokens != other.tokens
    ((again,),) = engine.generate([TEXT], SamplingParams(max_tokens=NEW, seed=one.seed))
    assert again.tokens == one.tokens


@pytest.mark.slow
def test_samples_follow_the_tempered_distribution(make_engine, prompts, uncached):
    """1,024 first tokens against softmax(logits / temperature)."""
    logits_V, draws, temperature = uncached(prompts[1], ()), 1024, 2.0
    engine = make_engine(max_sequences=16)
    params = SamplingParams(temperature=temperature, n=draws, max_tokens=1, seed=0)
    counts = Counter(c.tokens[0] for c in engine.generate([prompts[1]], params)[0])
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    expected_V = draws * weights_V / weights_V.sum()
    seen = expected_V >= 5
    assert seen.sum() >= 5, "the distribution is spread enough to tell"
    observed_V = np.array([counts[token] for token in range(len(logits_V))])
    chi2 = np.sum((observed_V - expected_V)[seen] ** 2 / expected_V[seen])
    assert chi2 < seen.sum() + 5 * np.sqrt(2 * seen.sum())  # five standard deviations


def test_log_probabilities_are_the_models(engine, prompts, uncached):
    params = SamplingParams(temperature=0.5, top_k=3, seed=1, max_tokens=4, logprobs=5)
    ((completion,),) = engine.generate([prompts[0]], params)
    for step, entry in enumerate(completion.logprobs):
        logits_V = uncached(prompts[0], completion.tokens[:step]).astype(np.float64)
        logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
        assert entry.token == completion.tokens[step]
        assert entry.logprob == pytest.approx(logprobs_V[entry.token], abs=1e-4)
        best = np.argsort(-logits_V)[:5]
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in entry.top], logprobs_V[best], atol=1e-4)
        kept = np.exp(logits_V[best[:3]] / 0.5)
        assert np.exp(entry.sampling_logprob) == pytest.approx(
            np.exp(logits_V[entry.token] / 0.5) / kept.sum(), abs=1e-4
        )


# Sharing --------------------------------------------------------------------------------------------------------------


def test_samples_of_a_request_hold_one_copy_of_its_prompt(make_engine):
    engine = make_engine(prefix_caching=False)
    engine.submit(TEXT, dataclasses.replace(SAMPLED, n=4))
    engine.step(), engine.step()
    stats = engine.stats()
    assert stats.running == 4
    # Two full pages for all, and the unfinished third of each.
    assert stats.pages_used == 2 + 4
    assert stats.prompt_tokens == len(TEXT)
    while engine.has_work:
        engine.step()
    assert_all_free(engine)


def test_shared_pages_do_not_change_what_is_drawn(make_engine):
    shared, alone = make_engine(), make_engine(max_sequences=1, prefix_caching=False)
    (samples,) = shared.generate([TEXT], dataclasses.replace(SAMPLED, n=6))
    (expected,) = alone.generate([TEXT], dataclasses.replace(SAMPLED, n=6))
    assert tokens_of(samples) == tokens_of(expected)


def test_groups_are_found_when_a_sequence_comes_or_goes(make_engine, monkeypatch):
    found = []
    find = runner.group_by_prefix
    monkeypatch.setattr(runner, "group_by_prefix", lambda *arguments: found.append(find(*arguments)) or found[-1])
    engine = make_engine()
    params = dataclasses.replace(SAMPLED, n=3, max_tokens=20)  # into the page after the next
    engine.submit(TEXT, params)
    for _ in range(15):
        engine.step()
    assert [[(len(group.members), group.num_pages) for group in groups] for groups in found] == [[(3, 2)]]
    engine.submit(TEXT, dataclasses.replace(GREEDY, max_tokens=1))
    while engine.has_work:
        engine.step()
    # With the newcomer for one step, and then without it.
    assert [[(len(group.members), group.num_pages) for group in groups] for groups in found[1:]] == [[(4, 2)], [(3, 2)]]


def test_prompts_that_begin_alike_find_each_others_pages(make_engine):
    engine = make_engine()
    ((first,),) = engine.generate([TEXT], GREEDY)
    ((again,),) = engine.generate([TEXT], GREEDY)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)
    assert again.tokens == first.tokens
    # The answer's pages too, as for the next turn of a conversation.
    ((turn,),) = engine.generate([[*TEXT, *first.tokens, 7, 7]], GREEDY)
    assert turn.num_cached_tokens == 32  # 40 + 8 tokens, the last of which was never read
    changed = [*TEXT]
    changed[20] = 8
    ((other,),) = engine.generate([changed], GREEDY)
    assert other.num_cached_tokens == 16


def test_equal_tokens_with_other_pixels_are_another_prompt(make_engine, make_example):
    engine = make_engine()
    one = make_example(9, (1, 1), 14, seed=1)
    other = dataclasses.replace(one, crops=one.crops + 1)
    first = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)
    a, b, c = (completion.logprobs[0].logprob for (completion,) in engine.generate([one, other, one], first))
    assert a == pytest.approx(c, abs=1e-6) and abs(a - b) > 1e-3
    assert engine.stats().images_encoded == 3  # the crop of each, and one global view


def test_images_are_encoded_once(make_engine, make_example):
    engine = make_engine(prefix_caching=False)
    example = make_example(2, (1, 2), 3, seed=4)
    engine.generate([example], GREEDY)
    assert engine.stats().images_encoded == 3
    engine.generate([example] * 3, GREEDY)
    stats = engine.stats()
    assert (stats.images_encoded, stats.images_cached) == (3, 9)


def test_features_give_way_to_those_of_other_images(make_engine, make_example, uncached):
    """A store that holds one prompt's features at a time."""
    engine = make_engine(feature_cache_tokens=6)
    examples = [make_example(2, (1, 2), 3, seed=s) for s in range(4)]
    for example, (completion,) in zip(examples, engine.generate(examples, GREEDY), strict=True):
        assert completion.tokens[0] == np.argmax(uncached(example, ()))
    assert engine.stats().images_encoded == 12


# Memory ---------------------------------------------------------------------------------------------------------------


def test_under_memory_pressure_sequences_wait_give_way_and_say_the_same(make_engine):
    plenty, scarce = make_engine(), make_engine(cache_tokens=5 * 16)
    prompts = [[i, *range(1, 20)] for i in range(6)]
    params = dataclasses.replace(SAMPLED, max_tokens=30)
    expected = [tokens_of(c) for c in plenty.generate(prompts, params)]
    assert [tokens_of(c) for c in scarce.generate(prompts, params)] == expected
    assert scarce.stats().preemptions > 0
    assert_all_free(scarce)


@pytest.mark.slow
def test_samples_that_give_way_say_the_same(make_engine, make_example):
    prompt = make_example(3, (1, 1), 20, seed=8)
    params = dataclasses.replace(SAMPLED, max_tokens=40, n=4)
    (expected,) = make_engine().generate([prompt], params)
    scarce = make_engine(cache_tokens=8 * 16, feature_cache_tokens=5)
    (samples,) = scarce.generate([prompt], params)
    assert tokens_of(samples) == tokens_of(expected)
    assert scarce.stats().preemptions > 0
    assert_all_free(scarce)


def test_a_cancelled_request_frees_its_pages_at_once(make_engine):
    engine = make_engine(prefix_caching=False)
    kept = engine.submit(TEXT, GREEDY)
    gone = engine.submit(TEXT, dataclasses.replace(SAMPLED, n=5))
    for _ in range(4):
        engine.step()
    before = engine.stats().pages_used
    deltas = engine.cancel(gone)
    assert [(d.sample, d.finish_reason) for d in deltas] == [(i, "cancelled") for i in range(5)]
    assert engine.stats().pages_used == 3 < before
    assert engine.cancel(gone) == []
    finished = []
    while engine.has_work:
        finished += [d for d in engine.step() if d.finish_reason]
    assert [(d.request_id, d.finish_reason) for d in finished] == [(kept, "length")]
    assert_all_free(engine)


def test_samples_that_wait_with_their_leader_are_counted_and_go_with_it(make_engine):
    engine = make_engine(max_waiting=10, prefill_tokens=16)
    engine.submit(TEXT, dataclasses.replace(SAMPLED, n=4), request_id="running")
    engine.submit(TEXT[1:], dataclasses.replace(SAMPLED, n=6), request_id="waiting")
    with pytest.raises(BusyError, match="10 of at most .* samples are waiting"):
        engine.submit(TEXT, GREEDY)
    engine.step()  # computes a part of the prompts of the two leaders
    assert (engine.stats().running, engine.stats().waiting) == (2, 8)
    assert len(engine.cancel("waiting")) == 6
    assert (engine.stats().running, engine.stats().waiting) == (1, 3)
    engine.update_weights(engine.model)  # the leader gives way, and those that follow it with it
    assert (engine.stats().running, engine.stats().waiting) == (0, 4)
    while engine.stats().running < 4:
        engine.step()
    assert engine.stats().waiting == 0
    assert len(engine.cancel("running")) == 4
    assert_all_free(engine)


def test_requests_that_come_with_one_prompt_compute_it_once(make_engine, prompts):
    image = prompts[0]
    params = [dataclasses.replace(SAMPLED, seed=seed) for seed in range(4)]
    expected = [make_engine().generate([image], each)[0][0].tokens for each in params]
    engine = make_engine()
    together = engine.generate([image] * 4, params)
    assert [completion.tokens for (completion,) in together] == expected
    stats = engine.stats()
    length = len(image.tokens)
    # Each of the others finds all but the token that begins its answer, the unfinished page included.
    assert [completion.num_cached_tokens for (completion,) in together] == [0] + [length - 1] * 3
    assert stats.prompt_tokens - stats.cached_prompt_tokens == length + 3
    assert_all_free(engine)
    apart = make_engine(prefix_caching=False)
    assert [completion.tokens for (completion,) in apart.generate([image] * 4, params)] == expected
    assert apart.stats().cached_prompt_tokens == 0


def test_requests_go_on_when_the_one_that_computes_their_prompt_is_cancelled(make_engine):
    engine = make_engine(prefill_tokens=16)
    names = [engine.submit(TEXT, dataclasses.replace(SAMPLED, seed=seed)) for seed in range(4)]
    engine.step()  # a part of the prompt
    assert (engine.stats().running, engine.stats().waiting) == (1, 3)
    engine.cancel(names[0]), engine.cancel(names[2])
    assert (engine.stats().running, engine.stats().waiting) == (0, 2)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    for seed in (1, 3):
        [alone] = make_engine().generate([TEXT], dataclasses.replace(SAMPLED, seed=seed))
        assert tokens_of(completions(d for d in deltas if d.request_id == names[seed])) == tokens_of(alone)
    assert_all_free(engine)


def test_samples_go_on_when_their_leader_had_to_give_way(make_engine):
    params = dataclasses.replace(SAMPLED, n=5, max_tokens=3)
    (expected,) = make_engine().generate([TEXT], params)
    engine = make_engine(prefill_tokens=16)
    engine.submit(TEXT, params)
    engine.step()
    engine.update_weights(engine.model)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert tokens_of(completions(deltas)) == tokens_of(expected)
    assert_all_free(engine)


def test_a_leader_may_be_cancelled_before_its_samples_have_its_prompt(make_engine):
    """A sample ends while others of its request still wait for a place: they compute the prompt themselves."""
    engine = make_engine(max_sequences=2, prefix_caching=False)
    (samples,) = engine.generate([TEXT], dataclasses.replace(SAMPLED, n=5, max_tokens=2))
    (expected,) = make_engine().generate([TEXT], dataclasses.replace(SAMPLED, n=5, max_tokens=2))
    assert tokens_of(samples) == tokens_of(expected)


# Ends -----------------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_sample_and_is_left_out(engine, greedy, prompts):
    free = greedy[0].tokens
    stop = free[3]
    ((completion,),) = engine.generate([prompts[0]], dataclasses.replace(GREEDY, stop_ids=(stop,)))
    assert completion.tokens == free[: free.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_the_processors_stop_tokens_can_be_ignored(make_engine, make_words, greedy, prompts):
    token = greedy[1].tokens[2]
    engine = make_engine(make_words(token))
    ((stopped,),) = engine.generate([prompts[1]], GREEDY)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert stopped.tokens == greedy[1].tokens[: greedy[1].tokens.index(token)]
    ((free,),) = engine.generate([prompts[1]], dataclasses.replace(GREEDY, ignore_eos=True))
    assert free.tokens == greedy[1].tokens


def test_a_stop_string_ends_a_sample_and_its_text(make_engine, greedy, prompts):
    words = [f" w{token}" for token in greedy[0].tokens]
    stop = (words[2] + words[3])[1:]
    ((completion,),) = make_engine().generate([prompts[0]], dataclasses.replace(GREEDY, stop=("never", stop)))
    text = "".join(words)
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_deltas_add_up_to_the_completion(make_engine, prompts):
    engine = make_engine(decode_steps=3)
    request = engine.submit(prompts[0], dataclasses.replace(SAMPLED, logprobs=0, ignore_eos=True))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert {delta.request_id for delta in deltas} == {request}
    assert [len(delta.tokens) for delta in deltas] == [3, 3, 2]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    tokens = [token for delta in deltas for token in delta.tokens]
    assert "".join(delta.text for delta in deltas) == "".join(f" w{token}" for token in tokens)
    assert [entry.token for delta in deltas for entry in delta.logprobs] == tokens


def test_the_context_ends_a_sample(make_engine):
    engine = make_engine(max_context=48)
    ((completion,),) = engine.generate([TEXT], SamplingParams(temperature=0.0))
    assert len(completion.tokens) == 8 and completion.finish_reason == "length"


def test_the_cache_ends_a_sample_without_a_limit(make_engine):
    ((completion,),) = make_engine(cache_tokens=48).generate([TEXT], SamplingParams(temperature=0.0))
    assert len(completion.tokens) == 9 and completion.finish_reason == "length"


def test_logits_that_are_not_finite_end_a_sample_with_an_error(make_engine, small_model):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, small_model)
    ((completion,),) = make_engine(model=broken).generate([[1, 2, 3]], GREEDY)
    assert completion.finish_reason == "error" and "position 3" in completion.stop_reason


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([64], {}, "vocabulary of 64"),
        ([-1, 2], {}, "vocabulary of 64"),
        ([1] * 128, {}, "context of 128"),
        ([1] * 100, {"max_tokens": 29}, "context of 128"),
        ([1], {"stop_ids": (64,)}, "stop token 64"),
    ],
)
def test_what_can_never_be_served_is_refused(engine, prompt, params, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, SamplingParams(**params))
    assert_all_free(engine)


def test_stop_strings_without_a_processor_are_refused(small_model):
    with pytest.raises(RequestError, match="no processor"):
        Engine(small_model, None, EngineConfig(max_sequences=1)).submit([1], SamplingParams(stop=("x",)))


def test_prompts_beyond_the_cache_are_refused(make_engine, make_example):
    engine = make_engine(cache_tokens=48, feature_cache_tokens=4)
    with pytest.raises(RequestError, match="engine.cache_tokens"):
        engine.submit([1] * 40, SamplingParams(max_tokens=20))
    with pytest.raises(RequestError, match="engine.cache_tokens"):
        engine.submit([1] * 49)
    with pytest.raises(RequestError, match="engine.feature_cache_tokens"):
        engine.submit(make_example(2, (1, 2), 3), SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="ends within an image"):
        example = make_example(2, (0, 0), 3)
        cut = np.flatnonzero(example.feature_index >= 0)[-1] + 1
        engine.submit(
            dataclasses.replace(example, tokens=example.tokens[:cut], feature_index=example.feature_index[:cut]),
            SamplingParams(max_tokens=2),
        )


def test_a_text_model_refuses_images(make_engine, small_model, make_example):
    engine = make_engine(model=small_model.decoder)
    with pytest.raises(RequestError, match="reads text only"):
        engine.submit(make_example(2, (0, 0), 3))


def test_a_full_queue_refuses(make_engine):
    engine = make_engine(max_waiting=2)
    for i in range(2):
        engine.submit([1, 2], GREEDY, request_id=f"{i}")
    with pytest.raises(BusyError, match="2 of at most .* samples are waiting"):
        engine.submit([1, 2], GREEDY)
    with pytest.raises(RequestError, match="'1' is in use"):
        engine.submit([1, 2], GREEDY, request_id="1")


def test_generate_leaves_other_requests_their_deltas(make_engine):
    engine = make_engine()
    other = engine.submit(TEXT, GREEDY)
    with pytest.raises(RequestError, match="1 other requests are active.*use submit and step"):
        engine.generate([TEXT], GREEDY)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert {delta.request_id for delta in deltas} == {other}
    (alone,) = engine.generate([TEXT], GREEDY)
    assert tokens_of(completions(deltas)) == tokens_of(alone)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2)]
    + [("n", 0), ("max_tokens", 0), ("seed", 2**64), ("stop", ("",)), ("logprobs", 21)]
    + [("temperature", 1e39), ("temperature", 10**400), ("temperature", "1"), ("temperature", True), ("top_k", 2**31)]
    + [("top_k", 1.5), ("n", 2**16 + 1), ("max_tokens", 2**31), ("seed", 0.5), ("min_p", float("inf"))]
    + [
        ("stop", ("x",) * 17),
        ("stop", ("x" * 257,)),
        ("stop", "abc"),
        ("stop", (5,)),
        ("stop_ids", (-1,)),
        ("stop_ids", (1,) * 257),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


# Weights, shapes, meshes ----------------------------------------------------------------------------------------------


def test_new_weights_are_used_from_the_next_token_on(make_engine, small_model, prompts, uncached):
    other = jax.tree.map(lambda leaf: leaf * 0.9, small_model)
    engine = make_engine()
    engine.generate(prompts, GREEDY)
    engine.update_weights(other)
    fresh = [tokens_of(c) for c in make_engine(model=other).generate(prompts, GREEDY)]
    assert [tokens_of(c) for c in engine.generate(prompts, GREEDY)] == fresh

    # In the middle of a sample: what follows is what the new weights say after the same tokens.
    engine.update_weights(small_model)
    request = engine.submit(prompts[1], GREEDY)
    deltas = [delta for _ in range(5) for delta in engine.step()]
    engine.update_weights(other)
    while engine.has_work:
        deltas += engine.step()
    tokens = [token for delta in deltas if delta.request_id == request for token in delta.tokens]
    assert len(tokens) == NEW
    prefix = [*prompts[1].tokens, *tokens[:5]]
    ((rest,),) = make_engine(model=other).generate([prefix], dataclasses.replace(GREEDY, max_tokens=NEW - 5))
    assert tuple(tokens[5:]) == rest.tokens


def test_weights_of_another_shape_are_refused(make_engine, small_model):
    engine = make_engine()
    with pytest.raises(RequestError, match="weights"):
        engine.update_weights(jax.tree.map(lambda leaf: leaf[None], small_model))


def test_after_warm_up_nothing_compiles(make_engine, prompts, make_example):
    engine = make_engine(prefill_tokens=64)
    assert engine.warm_up() > 0
    before = programs.num_compiled()
    wishes = [dataclasses.replace(SAMPLED, n=1 + i % 3, logprobs=[None, 0, 3][i % 3], top_k=i) for i in range(12)]
    examples = [make_example(1 + i, *([(i % 3, i % 2)] * (i % 2)), 3 + 4 * i, seed=i) for i in range(12)]
    engine.generate(examples, wishes)
    assert programs.num_compiled() == before
    assert_all_free(engine)


@pytest.mark.parametrize("tensor", [2])
def test_a_mesh_gives_what_one_device_gives(make_engine, prompts, tensor):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), jax.devices()[:tensor])
    params = dataclasses.replace(SAMPLED, n=2)
    expected = [tokens_of(c) for c in make_engine().generate(prompts, params)]
    engine = make_engine(mesh=mesh)
    assert [tokens_of(c) for c in engine.generate(prompts, params)] == expected
    pool = engine._runner.pool_S2KTW
    assert pool.sharding.shard_shape(pool.shape)[2] == pool.shape[2] // tensor, "each device has its own heads"


def test_other_axes_than_the_heads_are_refused(make_engine):
    with pytest.raises(ConfigError, match="fsdp"):
        make_engine(mesh=make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))


def test_a_stretched_model_reads_on(small_model):
    long = stretched(small_model, 2.0)
    config = EngineConfig(max_sequences=1, page_size=16)
    assert Engine(long, None, config).max_context == 2 * Engine(small_model, None, config).max_context == 256
    ((completion,),) = Engine(long, None, config).generate([TEXT * 5], GREEDY)
    assert completion.num_prompt_tokens == 200 and len(completion.tokens) == NEW
    assert small_model.decoder.config.yarn_factor == 1.0, "the model it was made of is as it was"
    positions_BT = np.arange(200)[None]
    hidden_BTD, _ = long.decoder(long.decoder.embed(np.array([TEXT * 5])), positions_BT)
    assert completion.tokens[0] == int(np.argmax(long.decoder.logits(hidden_BTD)[0, -1]))
    with pytest.raises(ConfigError, match="already"):
        stretched(long, 2.0)
    with pytest.raises(ConfigError, match="factor=0.5"):
        stretched(small_model, 0.5)
