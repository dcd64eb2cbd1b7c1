"""Reference semantics of sampling: sort the tokens, apply the filters one by one, draw from the remaining masses.

Legend: B rows, V vocabulary.

For each row, in this order:
 1. Temperature: a token's weight is exp((logit - largest) / temperature). Its mass is the weight in units of 2^-28,
    rounded to an integer. All later steps use integers, so no result depends on the order of a sum. A token with less
    than 2^-29 of the most likely one's probability has no mass and is never drawn.
 2. Rank the tokens by descending logit, ties by ascending id.
 3. Top-k keeps the first k.
 4. Top-p keeps the shortest prefix whose mass is at least top_p times the mass left by top-k.
 5. Min-p keeps tokens whose mass is at least min_p times the first one's.
 6. Threefry-2x32 turns the key (seed) and the counter (position, 0) into 64 bits u. The token is the first, in id
    order, whose cumulative mass exceeds u / 2^64 of the kept mass. If only some of several tied tokens were kept, they
    come last in that order.

We draw one uniform number per row, not Gumbel noise per token: its random bits alone would take a TPU about 60 vector
operations for every 1024 tokens and rows, more than all the rest, and 32 bits per token give no finer tail than masses.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sampling import parameters, wide
from pallas_kernels.sampling.parameters import UNLIMITED, Parameters, Sample


def sample(logits_BV: jax.Array, rows: Parameters) -> Sample:
    """Only outside jit: uses 64-bit and Python integers."""
    top_B = jnp.max(logits_BV, axis=1)
    mass_BV = parameters.masses(logits_BV, parameters.finite(top_B)[:, None], rows.inverse_temperature[:, None])
    defined_B = (rows.valid != 0) & jnp.all(logits_BV < jnp.inf, axis=1)

    draws = []
    for i, (x_V, mass_V) in enumerate(zip(np.asarray(logits_BV), np.asarray(mass_BV), strict=True)):
        row = Parameters(*(np.asarray(values_B)[i].item() for values_B in rows))
        draws.append(_draw(x_V, mass_V.astype(np.int64), row) if defined_B[i] and top_B[i] > -jnp.inf else (0, 0))
    tokens_B = np.array([token for token, _ in draws], np.int32)
    kept_B = [kept for _, kept in draws]
    return parameters.finish(
        rows,
        tokens_B=jnp.asarray(tokens_B),
        logits_B=logits_BV[np.arange(len(draws)), tokens_B],
        top_B=top_B,
        sum_B=jnp.sum(jnp.exp(logits_BV - parameters.finite(top_B)[:, None]), axis=1),
        kept_mass_B=wide.Wide(
            jnp.array([kept >> 16 for kept in kept_B], jnp.int32),
            jnp.array([kept & 0xFFFF for kept in kept_B], jnp.int32),
        ),
    )


def _draw(x_V: np.ndarray, mass_V: np.ndarray, row: Parameters) -> tuple[int, int]:
    """The token, and the mass of all tokens kept."""
    ids_V = np.arange(len(x_V))
    kept = np.lexsort((ids_V, -x_V))
    if row.top_k != UNLIMITED:
        kept = kept[: row.top_k]
    if row.nucleus:
        total = int(mass_V[kept].sum())
        wanted = -(-total * (row.top_p % (1 << 32)) >> 32)  # rounded up
        kept = kept[: np.searchsorted(np.cumsum(mass_V[kept]), max(wanted, 1)) + 1]
    kept = kept[mass_V[kept] >= row.min_mass]

    tied = x_V == x_V[kept[-1]]
    comes_last = tied[kept] & (np.sum(tied[kept]) < np.sum(tied))
    order = kept[np.lexsort((kept, comes_last))]
    total = int(mass_V[order].sum())
    random = (row.random_high % (1 << 32) << 32) + row.random_low % (1 << 32)
    return int(order[np.searchsorted(np.cumsum(mass_V[order]), total * random >> 64, side="right")]), total
