"""Rows to sample from, shared by the tests. Legend: B rows, V vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sampling import Sample, reference, sample
from pallas_kernels.sampling.parameters import prepare

OFF = {"temperature_B": 1.0, "top_k_B": 0, "top_p_B": 1.0, "min_p_B": 0.0}
_DTYPES = {"top_k_B": jnp.int32}

xla = jax.jit(partial(sample, implementation="xla"))
tpu = jax.jit(partial(sample, implementation="tpu", interpret=True))


def rows(batch, *, seed=0, **parameters):
    """Keyword arguments of `sample` for `batch` rows; parameters are scalars for all rows or a value a row."""
    rng = np.random.default_rng(seed)
    seeds_B = rng.integers(0, 2**32, batch, dtype=np.uint32)
    arguments = {
        "seeds_B2": jnp.asarray(np.stack([seeds_B, seeds_B[::-1]], axis=1)),
        "positions_B": jnp.asarray(rng.integers(0, 32768, batch), jnp.int32),
    }
    for name, off in OFF.items():
        value = parameters.pop(name.removesuffix("_B"), off)
        arguments[name] = jnp.broadcast_to(jnp.asarray(value, _DTYPES.get(name, jnp.float32)), (batch,))
    assert not parameters
    return arguments


def mixed_rows(rng, batch, vocab_size):
    """Every row its own parameters, filters on and off in all combinations."""

    def pick(*choices):
        return rng.choice(choices, size=batch)

    return rows(
        batch,
        seed=int(rng.integers(1 << 30)),
        temperature=pick(0, 0.3, 1, 1, 2.5),
        top_k=pick(0, 0, 1, 5, 50, vocab_size - 1, vocab_size + 3),
        top_p=pick(1, 1, 0.9, 0.5, 0.99, 0.01, 0),
        min_p=pick(0, 0, 0, 0.1, 0.01, 1),
    )


def by_reference(logits_BV, arguments):
    """What `reference.sample` draws for the arguments of `sample`."""
    return reference.sample(logits_BV, prepare(logits_BV.shape[1], **arguments))


def assert_same(a: Sample, b: Sample):
    """The tokens to the bit, the log-probabilities to float32's rounding."""
    np.testing.assert_array_equal(a.tokens_B, b.tokens_B)
    np.testing.assert_allclose(a.log_probs_B, b.log_probs_B, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(a.sampling_log_probs_B, b.sampling_log_probs_B, rtol=1e-6, atol=2e-6)


def kept_probabilities(logits_V, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to draw from, in float64 and with nothing of the implementation: float64 [V]."""
    x_V = np.asarray(logits_V, np.float64)
    ranked = np.argsort(-x_V, kind="stable")
    p_V = np.exp((x_V - x_V.max()) / temperature)
    if top_k > 0:
        p_V[ranked[top_k:]] = 0
    p_V /= p_V.sum()
    before = np.cumsum(p_V[ranked]) - p_V[ranked]
    p_V[ranked[before >= top_p]] = 0
    p_V[p_V < min_p * p_V.max()] = 0
    return p_V / p_V.sum()
