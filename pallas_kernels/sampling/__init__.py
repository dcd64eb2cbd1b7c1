"""Choose the next token of many rows: temperature, top-k, top-p, min-p, banned tokens, with log-probabilities.

Legend: B rows, V vocabulary, W = ceil(V / 32) words of the bitmask.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.sampling import bitmask, tpu, xla
from pallas_kernels.sampling.parameters import MAX_VOCAB_SIZE, Sample, prepare

__all__ = ["Sample", "pack_bitmask", "sample"]

pack_bitmask = bitmask.pack


def sample(
    logits_BV: jax.Array,
    *,
    seeds_B: jax.Array,
    positions_B: jax.Array,
    temperature_B: jax.Array | None = None,
    top_k_B: jax.Array | None = None,
    top_p_B: jax.Array | None = None,
    min_p_B: jax.Array | None = None,
    allowed_BW: jax.Array | None = None,
    implementation: Literal["xla", "tpu"] = "xla",
    interpret: bool | pltpu.InterpretParams = False,
) -> Sample:
    """Draw a token for every row.

    The filters apply in the order of Hugging Face's generation: bans, temperature, top-k, top-p of the mass that top-k
    has left, min-p; `reference.py` defines each to the last bit. Every row has its own parameters, and they are traced:
    no value of them compiles anything anew. `None` is "off" for all rows.

    A token is a function of its row's logits, parameters, seed and position: not of the other rows, their number or
    order, nor of the implementation and its blocks. It comes from integer arithmetic but for one exp a token, so that
    implementations agree bit for bit where their exp does, as on a CPU. Where the last bits of two platforms' exp
    differ, some masses differ by a few units in 2^28, and a drawn token differs only if the end of a filter or the
    point drawn falls into such a difference. Log-probabilities are float32 and may differ in their last bits.

    Args:
      logits_BV: float32 or bfloat16 [B, V], as the model gives them. -inf is a token that cannot be drawn.
      seeds_B: uint32 [B], or [B, 2] for seeds of 64 bits: the request's.
      positions_B: int32 [B]: the position of the token to draw, or any number that a request uses once.
      temperature_B: float32 [B]; 1 is off. 0 takes the most likely token, of tied ones the lowest id.
      top_k_B: int32 [B]; 0, negative, V and more are off. Exactly k tokens are kept: of those tied for the last places
        the lowest ids.
      top_p_B: float32 [B] in [0, 1]; 1 is off. At least one token is kept; 0 takes the most likely one.
      min_p_B: float32 [B] in [0, 1]; 0 is off.
      allowed_BW: int32 or uint32 [B, W]: bit i % 32 of word i // 32 is set if token i may be drawn, as XGrammar and
        llguidance write it (`pack_bitmask` makes one from a mask of bools).
      implementation: "tpu" reads the logits from HBM once; "xla" runs on every platform.
      interpret: run the TPU kernel in interpret mode, for tests.

    Returns:
      A Sample of
        tokens_B: int32 [B].
        log_probs_B: float32 [B], of the tokens under softmax(logits_BV): whatever the temperature, filters and bans.
        sampling_log_probs_B: float32 [B], of the tokens under the distribution they were drawn from; 0 where greedy.
      A row in which no token is allowed, or all allowed logits are -inf, has token -1 and log-probabilities -inf. A row
      with a NaN or +inf among its logits, banned ones included, or with a parameter out of range (a temperature
      negative or not finite, top_p or min_p outside [0, 1]) has token -1 and log-probabilities NaN.

    Raises:
      ArgumentError: a shape or dtype differs from the above; the vocabulary is empty, has more than 524,287 tokens, or
        does not fit the vector memory of the TPU compiled for.
    """
    check_choice("implementation", implementation, ("xla", "tpu"))
    check(
        implementation == "tpu" or not interpret,
        f"interpret is {interpret!r} with implementation {implementation!r}; only 'tpu' can be interpreted",
    )
    check_shape("logits_BV", logits_BV, (None, None), "[B, V]")
    check_dtype("logits_BV", logits_BV, jnp.float32, jnp.bfloat16)
    rows, vocab_size = logits_BV.shape
    check(rows > 0, "logits_BV has no rows; call with at least one")
    check(
        0 < vocab_size <= MAX_VOCAB_SIZE,
        f"logits_BV has a vocabulary of {vocab_size}; it must be 1 to {MAX_VOCAB_SIZE}, for its mass to fit 47 bits",
    )
    if seeds_B.ndim == 2:
        check_shape("seeds_B", seeds_B, (rows, 2), "[B] or [B, 2]")
    else:
        check_shape("seeds_B", seeds_B, (rows,), "[B] or [B, 2]")
    check_dtype("seeds_B", seeds_B, jnp.uint32)
    given = {
        "positions_B": (positions_B, 0, jnp.int32),
        "temperature_B": (temperature_B, 1, jnp.float32),
        "top_k_B": (top_k_B, 0, jnp.int32),
        "top_p_B": (top_p_B, 1, jnp.float32),
        "min_p_B": (min_p_B, 0, jnp.float32),
    }
    arrays = []
    for name, (array, off, dtype) in given.items():
        array = jnp.full((rows,), off, dtype) if array is None else array
        check_shape(name, array, (rows,), "[B]")
        check_dtype(name, array, dtype)
        arrays.append(array)
    if allowed_BW is not None:
        check_shape("allowed_BW", allowed_BW, (rows, bitmask.words_for(vocab_size)), "[B, ceil(V / 32)]")
        check_dtype("allowed_BW", allowed_BW, jnp.int32, jnp.uint32)

    parameters = prepare(vocab_size, seeds_B, *arrays)
    if implementation == "tpu":
        return tpu.sample(logits_BV, parameters, allowed_BW, interpret=interpret)
    return xla.sample(logits_BV, parameters, allowed_BW)
