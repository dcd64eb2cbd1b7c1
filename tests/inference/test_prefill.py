"""Prefill of several prompts at once: the same answers as one by one, in few calls of few shapes."""

import dataclasses

import jax
import numpy as np
import pytest

from stepjax.config import ImageConfig, MeshConfig, ModelConfig, NumericsConfig
from stepjax.inference import programs
from stepjax.inference.config import EngineConfig
from stepjax.inference.feature_store import ViewShape
from stepjax.inference.prefill import MAX_READS, PrefillArrays, PrefillShapes
from stepjax.inference.request import SamplingParams
from stepjax.models.paged_cache import make_pool
from stepjax.models.step_vl import abstract_model
from stepjax.sharding import make_mesh

PARAMS = SamplingParams(seed=5, max_tokens=6)
SYSTEM = [7, 3, 9, 1] * 12  # three pages, more than a row
BATCHED = dict(prefill_tokens=128, max_sequences=8, view_batch=8)  # up to four rows of 32 tokens


@pytest.fixture(scope="module")
def engine(make_engine):
    """Of the tests that look at answers alone."""
    return make_engine(**BATCHED)


@pytest.fixture
def counted(make_engine, monkeypatch):
    """An engine, and the calls of its programs in order."""
    engine = make_engine(**BATCHED)
    calls = []

    def record(name, size):
        call = getattr(engine._runner, name)
        monkeypatch.setattr(engine._runner, name, lambda *args: (calls.append((name, size(*args))), call(*args))[1])

    record("_prefill", lambda arrays: arrays.tokens_BC.shape)
    record("_encode", lambda pixels_EHWC, rows_EQ: len(pixels_EHWC))
    record("copy", len)
    record("decode", len)
    return engine, calls


@pytest.fixture(scope="module")
def alone(make_engine):
    """A function from prompts to their answers, each computed alone and without a cache of prefixes."""
    engine = make_engine(max_sequences=1, prefix_caching=False)

    def answers(prompts, params=PARAMS):
        wishes = [dataclasses.replace(params, seed=params.seed + i) for i in range(len(prompts))]
        return [tokens_of(engine.generate([p], [wish])[0]) for p, wish in zip(prompts, wishes, strict=True)]

    return answers


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def some(seed, length):
    return np.random.default_rng(seed).integers(0, 55, length).tolist()


@pytest.mark.parametrize(
    "lengths",
    [(5, 6, 7, 8), (33, 32, 31, 1), (100, 3, 70), (2, 100, 40, 3, 64), (1, 1), (65,) * 6],
    ids=str,
)
def test_answers_do_not_depend_on_what_is_computed_together(engine, alone, lengths):
    prompts = [some([i, *lengths], length) for i, length in enumerate(lengths)]
    assert [tokens_of(c) for c in engine.generate(prompts, PARAMS)] == alone(prompts)


def test_images_and_text_are_computed_together(engine, alone, make_example):
    views = [(), ((1, 2),), ((0, 0), (2, 1)), (), ((1, 1),), ((0, 0),)]
    prompts = [make_example(3 + 4 * i, *each, 5, seed=i) for i, each in enumerate(views)]
    assert [tokens_of(c) for c in engine.generate(prompts, PARAMS)] == alone(prompts)


@pytest.mark.parametrize("changes", [{}, {"prefix_caching": False}, {"cache_tokens": 12 * 16}], ids=str)
def test_prompts_that_begin_alike(make_engine, alone, changes):
    """They share pages as soon as one of them has computed these; also where samples have to give way."""
    engine = make_engine(**BATCHED | changes)
    prompts = [SYSTEM + some(i, 3 + 9 * i) for i in range(5)] + [SYSTEM[:40] + some(9, 20), SYSTEM]
    params = dataclasses.replace(PARAMS, n=2, max_tokens=20)
    assert [tokens_of(c) for c in engine.generate(prompts, params)] == alone(prompts, params)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert (stats.preemptions > 0) == ("cache_tokens" in changes)


def test_a_common_prefix_is_computed_once(counted):
    engine, calls = counted
    prompts = [SYSTEM + some(i, 9) for i in range(4)]
    completions = [c for (c,) in engine.generate(prompts, dataclasses.replace(PARAMS, max_tokens=2))]
    prefills = [size for name, size in calls if name == "_prefill"]
    assert prefills == [(1, 64), (4, 32)]  # the first prompt, then the rest of the others
    assert [c.num_cached_tokens for c in completions] == [0] + [len(SYSTEM)] * 3
    stats = engine.stats()
    assert stats.cached_prompt_tokens == 3 * len(SYSTEM)
    assert stats.prompt_tokens == sum(map(len, prompts))


def test_a_short_common_prefix_is_not_worth_another_call(counted):
    engine, calls = counted
    engine.generate([SYSTEM[:16] + some(i, 9) for i in range(4)], dataclasses.replace(PARAMS, max_tokens=2))
    assert [size for name, size in calls if name == "_prefill"] == [(4, 32)]


def test_prompts_go_on_when_the_one_that_computes_their_prefix_is_cancelled(make_engine, alone):
    engine = make_engine(prefill_tokens=32)
    prompts = [SYSTEM * 2 + some(i, 9) for i in range(3)]
    names = [engine.submit(p, dataclasses.replace(PARAMS, seed=5 + i)) for i, p in enumerate(prompts)]
    engine.step()
    assert [s.computed for s in engine._scheduler.running] == [32, 0, 0]
    engine.cancel(names[0])
    tokens = dict.fromkeys(names, ())
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.tokens
    assert [tokens[name] for name in names[1:]] == [t for (t,) in alone(prompts)[1:]]


def test_fresh_prompts_with_images_take_few_calls(counted, make_example):
    """A step computes four prompts and starts all of their samples."""
    engine, calls = counted
    prompts = [make_example(3, (2, 1), 4, seed=i) for i in range(4)]
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, dataclasses.replace(PARAMS, seed=i, n=2))
    engine.step()
    assert calls == [("_encode", 8), ("_encode", 4), ("_prefill", (4, 32)), ("copy", 4), ("decode", 8)]


def test_a_step_computes_no_more_than_its_budget(counted, make_example):
    """While others decode: a long prompt is computed in parts, and views count as what they cost."""
    engine, calls = counted
    engine.submit([1, 2, 3], dataclasses.replace(PARAMS, max_tokens=40))
    engine.step()
    for i in range(3):
        engine.submit(make_example(90, (2, 1), 20, seed=i), PARAMS)
    costs = {("_encode", 8): 8 * engine._runner.view_shapes["crop"].cost}
    costs["_encode", 4] = 4 * engine._runner.view_shapes["global"].cost
    for _ in range(6):
        calls.clear()
        engine.step()
        prefilled = sum(np.prod(size) for name, size in calls if name == "_prefill")
        encoded = sum(costs.get(call, 0) for call in calls)
        assert prefilled <= 128 and (encoded < 128 or not prefilled)
        assert sum(name == "_encode" for name, _ in calls) <= 1, "a full batch costs more than the budget"
        assert calls[-1][0] == "decode"


@pytest.mark.parametrize("most", [1, 16, 32, 64, 100, 512, 2048])
@pytest.mark.parametrize("whole", [False, True])
def test_shapes_are_few_and_hold_every_part(most, whole):
    shapes = PrefillShapes(EngineConfig(prefill_tokens=most), 512, reads_whole_rows=whole)
    widths = len(shapes.widths)
    found = list(shapes)
    assert len(found) == len(set(found)) <= widths * (len(shapes.chunk_sizes) + 3)
    assert max(rows * tokens for rows, tokens, _ in found) == most
    for rows, tokens, width in found:
        assert rows * tokens <= most and (rows == 1 or rows * width * 64 <= MAX_READS or not whole)
    for rows in range(1, shapes.max_rows + 1):
        for longest in (1, 100, 1024, 5000, 32_768):
            if shapes.fits(rows, longest):
                assert rows * longest <= MAX_READS
    assert not shapes.fits(shapes.max_rows + 1, 1)


def test_views_of_a_call_cost_as_much_as_a_full_prefill():
    large = {kind: ViewShape.of(kind, ModelConfig(), ImageConfig(), EngineConfig()) for kind in ("crop", "global")}
    assert [shape.batch_sizes for shape in large.values()] == [[1, 2], [1]]
    assert 512 < large["global"].cost and large["global"].cost > 2 * large["crop"].cost
    more = EngineConfig(prefill_tokens=8192)
    assert ViewShape.of("crop", ModelConfig(), ImageConfig(), more).batch_sizes == [4, 16, 32]
    assert ViewShape.of("crop", ModelConfig(), ImageConfig(), EngineConfig(view_batch=6)).batch_sizes == [4, 6]


@pytest.mark.parametrize("rows", [1, 4])
def test_prefill_compiles_for_a_tpu(rows, monkeypatch):
    """Rows are read one at a time, so the copy of a row's pages does not grow with their number."""
    pytest.importorskip("libtpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # libtpu aborts on flags for CPUs
    from stepjax.planning.topologies import find

    decoder = dataclasses.replace(ModelConfig().decoder, num_layers=2, vocab_size=1024)
    config, numerics = dataclasses.replace(ModelConfig(), decoder=decoder), NumericsConfig(param_dtype="bfloat16")
    device = find("v5e-1").devices()[:1]
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), device)
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)

    pages, width = 256, 32
    pool = jax.eval_shape(lambda: make_pool(decoder, pages, 64, jax.numpy.bfloat16, "tpu"))
    store = jax.ShapeDtypeStruct((64, decoder.width), jax.numpy.bfloat16)
    arguments = abstract((abstract_model(config, numerics).decoder, pool, store, *PrefillArrays.empty(rows, 32, width)))
    with jax.set_mesh(mesh):
        compiled = programs.prefill.lower(*arguments).compile()
    copy_of_row = 2 * width * 64 * decoder.num_kv_heads * decoder.head_dim * 2
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool.size * 2, "the pool is written in place"
    assert memory.temp_size_in_bytes < 4 * copy_of_row + 2**25
