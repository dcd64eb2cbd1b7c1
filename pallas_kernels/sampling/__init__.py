"""Sample the next token of many rows: temperature, top-k, top-p, min-p, with log-probabilities.

Legend: B rows, V vocabulary.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.sampling import tpu, xla
from pallas_kernels.sampling.parameters import MAX_VOCAB_SIZE, Sample, prepare

__all__ = ["Sample", "sample"]


def sample(
    logits_BV: jax.Array,
    *,
    seeds_B2: jax.Array,
    positions_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    implementation: Literal["xla", "tpu"] = "xla",
    interpret: bool | pltpu.InterpretParams = False,
) -> Sample:
    """Draw a token for every row.

    The filters apply in the order of Hugging Face's generation: temperature, top-k, top-p of the mass that top-k
    leaves, min-p. `reference.py` defines each to the last bit. Every row has its own parameters. They are traced, so
    new values never recompile.

    A token is a function of its row's logits, parameters, seed and position: not of the other rows, their number or
    order, nor of the implementation and its blocks. Apart from one exp per token all arithmetic is integer, so
    implementations agree bit for bit if their exp does, as on a CPU. If the last bits of two platforms' exp differ,
    some masses differ by a few units in 2^28, and a drawn token differs only if the end of a filter or the drawn point
    falls into such a difference. Log-probabilities are float32 and may differ in their last bits.

    Args:
      logits_BV: float32, from the model. A token with logit -inf cannot be drawn.
      seeds_B2: uint32, the 64 bits of the sequence's seed.
      positions_B: int32, the position of the token to draw, or any number that a sequence uses once.
      temperature_B: float32; 1 is off. 0 takes the most likely token; of ties, the lowest id.
      top_k_B: int32; off if 0, negative, or at least V. Keeps exactly k tokens; of ties for the last places, the lowest
        ids.
      top_p_B: float32 in [0, 1]; 1 is off. Keeps at least one token; 0 takes the most likely one.
      min_p_B: float32 in [0, 1]; 0 is off.
      implementation: "tpu" reads the logits from HBM once; "xla" runs on every platform.
      interpret: run the TPU kernel in interpret mode, for tests.

    Returns:
      A Sample of
        tokens_B: int32 [B].
        log_probs_B: float32 [B], of the tokens under softmax(logits_BV), before temperature and filters.
        sampling_log_probs_B: float32 [B], of the tokens under the distribution they were drawn from; 0 if greedy.
      A row with only -inf logits has token -1 and log-probabilities -inf. A row with a NaN or +inf logit, or with a
      parameter out of range (temperature negative or not finite, top_p or min_p outside [0, 1]), has token -1 and
      log-probabilities NaN.

    Raises:
      ArgumentError: a shape or dtype differs from the above; the vocabulary is empty, has more than 524,287 tokens, or
        does not fit the target TPU's vector memory.
    """
    check_choice("implementation", implementation, ("xla", "tpu"))
    check(
        implementation == "tpu" or not interpret,
        f"interpret is {interpret!r} with implementation {implementation!r}; it is only for 'tpu'",
    )
    check_shape("logits_BV", logits_BV, (None, None), "[B, V]")
    check_dtype("logits_BV", logits_BV, jnp.float32)
    rows, vocab_size = logits_BV.shape
    check(rows > 0, "logits_BV has no rows; call with at least one")
    check(
        0 < vocab_size <= MAX_VOCAB_SIZE,
        f"logits_BV has a vocabulary of {vocab_size}; it must be 1 to {MAX_VOCAB_SIZE}, so that its mass fits 47 bits",
    )
    check_shape("seeds_B2", seeds_B2, (rows, 2), "[B, 2]")
    check_dtype("seeds_B2", seeds_B2, jnp.uint32)
    per_row = {
        "positions_B": (positions_B, jnp.int32),
        "temperature_B": (temperature_B, jnp.float32),
        "top_k_B": (top_k_B, jnp.int32),
        "top_p_B": (top_p_B, jnp.float32),
        "min_p_B": (min_p_B, jnp.float32),
    }
    for name, (array, dtype) in per_row.items():
        check_shape(name, array, (rows,), "[B]")
        check_dtype(name, array, dtype)

    parameters = prepare(vocab_size, seeds_B2, positions_B, temperature_B, top_k_B, top_p_B, min_p_B)
    if implementation == "tpu":
        return tpu.sample(logits_BV, parameters, interpret=interpret)
    return xla.sample(logits_BV, parameters)
