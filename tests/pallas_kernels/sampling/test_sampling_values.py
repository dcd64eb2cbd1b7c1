"""The XLA and the TPU sampler draw what the reference draws, and their log-probabilities are the distribution's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from sampling_cases import assert_same, by_reference, kept_probabilities, mixed_rows, rows, tpu, xla

from pallas_kernels.sampling import sample
from pallas_kernels.sampling import tpu as kernel

BOTH = pytest.mark.parametrize("draw", (xla, tpu), ids=("xla", "tpu"))


@pytest.mark.parametrize(
    "batch, vocab_size",
    (  # more than one group of chunks with a ragged end and a block that is not full; two chunks
        (60, 17500),
        (16, 1500),
        pytest.param(33, 77, marks=pytest.mark.slow),  # less than a vector
        pytest.param(24, 16384, marks=pytest.mark.slow),
        pytest.param(8, 1024, marks=pytest.mark.slow),
        pytest.param(5, 1, marks=pytest.mark.slow),
    ),
)
def test_agrees_with_the_reference(batch, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits_BV = rng.standard_normal((batch, vocab_size)) * rng.choice([1, 3, 8], size=(batch, 1))
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    arguments = mixed_rows(rng, batch, vocab_size)
    want = by_reference(logits_BV, arguments)
    assert (np.asarray(want.tokens_B) >= 0).all()
    assert_same(xla(logits_BV, **arguments), want)
    assert_same(tpu(logits_BV, **arguments), want)


@pytest.mark.slow
def test_many_rows_agree_with_the_reference():
    """At this size a difference of one unit in one of a thousand rows' masses would be found."""
    rng = np.random.default_rng(11)
    logits_BV = jnp.asarray(rng.standard_normal((1024, 5000)) * rng.choice([1, 2, 4], size=(1024, 1)), jnp.float32)
    for _ in range(4):
        arguments = mixed_rows(rng, 1024, 5000)
        want = by_reference(logits_BV, arguments)
        assert_same(xla(logits_BV, **arguments), want)
        assert_same(tpu(logits_BV, **arguments), want)


def test_thresholds_below_the_candidates():
    """When the kept tokens crowd in one lane of one part, the kernel falls back to the whole vocabulary."""
    rng = np.random.default_rng(5)
    vocab_size, batch = 17500, 60
    logits_BV = rng.standard_normal((batch, vocab_size))
    lane = np.arange(5, kernel.CHUNK, kernel.LANES)  # one lane's tokens in chunk 0
    assert len(lane) > kernel.LARGEST
    logits_BV[::2, lane] += 20 + rng.standard_normal(len(lane))
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    for filters in ({"top_k": 7}, {"top_p": 0.97}, {"top_k": 3000, "top_p": [0.9, 1.0] * 30}):
        arguments = rows(batch, temperature=2.0, **filters)
        want = by_reference(logits_BV, arguments)
        assert_same(tpu(logits_BV, **arguments), want)
        assert_same(xla(logits_BV, **arguments), want)


@BOTH
def test_ties(draw):
    """Of tied tokens the lowest ids are kept, and the kept ones are drawn alike."""
    batch, vocab_size = 16, 1500

    def drawn_of(logits_BV, **parameters):
        samples = [draw(logits_BV, **rows(batch, seed=seed, **parameters)) for seed in range(5)]
        return np.concatenate([sample.tokens_B for sample in samples])

    logits_BV = jnp.zeros((batch, vocab_size)).at[:, 1400].set(1.0).at[:, 7].set(-1.0)
    assert set(drawn_of(logits_BV, top_k=4, temperature=3.0)) == {1400, 0, 1, 2}
    drawn = draw(
        logits_BV, **rows(batch, top_k=9, min_p=0.2, temperature=0.5)
    ).tokens_B  # the others have e^-2 of its mass
    assert set(drawn.tolist()) == {1400}

    half = draw(jnp.zeros((batch, vocab_size)), **rows(batch, top_p=4 / 1500))
    assert set(half.tokens_B.tolist()) == {0, 1, 2, 3}
    np.testing.assert_allclose(half.sampling_log_probs_B, np.log(1 / 4), rtol=1e-6)
    nearly_all = drawn_of(jnp.zeros((batch, vocab_size)), top_k=1499)
    assert max(nearly_all) > 1300 and len(set(nearly_all)) > 70


@BOTH
def test_log_probs_are_those_of_float64(draw):
    rng = np.random.default_rng(6)
    batch, vocab_size = 16, 1500
    logits_BV = jnp.asarray(3 * rng.standard_normal((batch, vocab_size)), jnp.float32)
    filters = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02}
    for chosen in ({}, {"temperature": 1.7}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, filters):
        got = draw(logits_BV, **rows(batch, **chosen))
        x_BV = np.asarray(logits_BV, np.float64)
        log_softmax_BV = x_BV - np.log(np.exp(x_BV).sum(1, keepdims=True))
        row, tokens_B = np.arange(batch), np.asarray(got.tokens_B)
        np.testing.assert_allclose(got.log_probs_B, log_softmax_BV[row, tokens_B], rtol=2e-6, atol=2e-6)
        p_BV = np.stack([kept_probabilities(x, **chosen) for x in x_BV])
        assert (p_BV[row, tokens_B] > 0).all()
        np.testing.assert_allclose(got.sampling_log_probs_B, np.log(p_BV[row, tokens_B]), rtol=1e-5, atol=1e-5)


@BOTH
def test_rows_do_not_see_each_other(draw):
    """The same token and log-probabilities in another order, another batch size, and beside other rows."""
    rng = np.random.default_rng(7)
    batch, vocab_size = 16, 1500
    logits_BV = jnp.asarray(3 * rng.standard_normal((batch, vocab_size)), jnp.float32)
    arguments = mixed_rows(rng, batch, vocab_size)
    together = draw(logits_BV, **arguments)

    def at(index):
        return draw(logits_BV[index], **{name: values[index] for name, values in arguments.items()})

    order = rng.permutation(batch)
    jax.tree.map(np.testing.assert_array_equal, at(order), jax.tree.map(lambda x: x[order], together))
    few = np.array([3, 11, 12])
    jax.tree.map(np.testing.assert_array_equal, at(few), jax.tree.map(lambda x: x[few], together))
    others = logits_BV.at[1::2].set(jnp.nan)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::2], b[::2]), draw(others, **arguments), together)


def test_seed_and_position_address_the_draw():
    logits_BV = jnp.zeros((64, 1500))
    arguments = rows(64)
    seeds_B2 = jnp.full((64, 2), 3, jnp.uint32)
    same = arguments | {"seeds_B2": seeds_B2, "positions_B": jnp.full(64, 9, jnp.int32)}
    assert len(set(xla(logits_BV, **same).tokens_B.tolist())) == 1
    others = {"low": seeds_B2.at[:, 0].set(jnp.arange(64)), "high": seeds_B2.at[:, 1].set(jnp.arange(64))}
    for changed in ({"seeds_B2": others["low"]}, {"seeds_B2": others["high"]}, {"positions_B": jnp.arange(64)}):
        assert len(set(xla(logits_BV, **same | changed).tokens_B.tolist())) > 50


@BOTH
def test_parameters_do_not_recompile(draw):
    logits_BV = jnp.zeros((16, 1500))
    draw(logits_BV, **rows(16))
    compiled = draw._cache_size()
    draw(logits_BV, **rows(16, seed=1, temperature=0.0, top_k=3, top_p=0.5, min_p=0.1))
    assert draw._cache_size() == compiled


def test_kernel_has_no_races_and_reads_only_what_it_wrote():
    """In an interpreter where fresh memory is NaN, an access outside an array raises, and races are noticed."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    rng = np.random.default_rng(9)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, num_cores_or_threads=2)
    draw = jax.jit(partial(sample, implementation="tpu", interpret=interpret))
    logits_BV = jnp.asarray(3 * rng.standard_normal((9, 1100)), jnp.float32)
    arguments = mixed_rows(rng, 9, 1100)
    assert_same(draw(logits_BV, **arguments), by_reference(logits_BV, arguments))
    assert not interpret_pallas_call.races.races_found
