"""Batched generation with a key-value cache: one prefill, then a compiled loop of single tokens.

Legend: B rows, T prompt tokens (padded on the right), S cache slots, G global-view slots, C crop slots, V vocabulary.

Shapes are rounded up to a few sizes, so that new prompts seldom compile. A sampled token depends on (seed, request,
position) alone, never on the other rows of its batch.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ImageConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack
from stepjax.errors import TokenError
from stepjax.models.qwen3 import make_cache
from stepjax.models.step_vl import StepVL
from stepjax.processing.tokens import Example


@dataclasses.dataclass(frozen=True)
class Generation:
    """A continuation: its tokens without the stop token, and why it ended."""

    tokens: tuple[int, ...]
    finish_reason: str  # "stop" or "length"


def generate(
    model: StepVL,
    prompts: list[Example],
    images: ImageConfig,
    *,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Generation]:
    """Continue every prompt, greedily at temperature 0. A request's number for the seed is its index in `prompts`.

    Raises:
        TokenError: a prompt is empty, or with its continuation longer than the model's positions.
    """
    if not prompts:
        return []
    for example in prompts:
        if not len(example.tokens):
            raise TokenError(f"prompt {example.name} has no tokens: there is nothing to continue")
    longest = max(prompts, key=lambda example: len(example.tokens))
    limit = model.config.decoder.max_positions
    if len(longest.tokens) + max_new_tokens > limit:
        raise TokenError(
            f"prompt {longest.name} has {len(longest.tokens)} tokens; with max_new_tokens={max_new_tokens} that is "
            f"more than the model's {limit} positions: shorten one of them"
        )
    budget = RowBudget(
        tokens=_round_up(len(longest.tokens), 64),
        global_views=_power_of_two(max(len(example.global_views) for example in prompts)),
        crops=_power_of_two(max(len(example.crops) for example in prompts), least=8),
        images=images,
    )
    rows = [pack_prompt(example, budget) for example in prompts]
    rows += [rows[0]] * (_power_of_two(len(rows)) - len(rows))  # compiled for a few batch sizes only
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    lengths_B = np.array([len(example.tokens) for example in prompts] + [0] * (len(rows) - len(prompts)), np.int32)

    tokens_BS, finished_B = _generate(
        model,
        arrays,
        lengths_B,
        jnp.asarray(stop_ids, jnp.int32),
        jnp.float32(temperature),
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
    )
    generations = []
    for row, finished in zip(np.asarray(tokens_BS)[: len(prompts)], np.asarray(finished_B), strict=False):
        stops = np.flatnonzero(np.isin(row, stop_ids))
        end = stops[0] if finished and len(stops) else len(row)
        generations.append(Generation(tuple(int(t) for t in row[:end]), "stop" if finished else "length"))
    return generations


def pack_prompt(example: Example, budget: RowBudget) -> dict[str, np.ndarray]:
    """A row that holds one example: the training layout, so that there is one layout."""
    return pack([Sample(example, domain=0)], budget)


@partial(jax.jit, static_argnames="max_new_tokens")
def _generate(model, arrays, lengths_B, stop_ids, temperature, key, *, max_new_tokens):
    rows, length = arrays["tokens_T"].shape
    slots, dtype = length + max_new_tokens, jnp.dtype(model.numerics.compute_dtype)

    def next_token(logits_BV, positions_B):
        def sample(request, position, logits_V):
            token_key = jax.random.fold_in(jax.random.fold_in(key, request), position)
            return jax.random.categorical(token_key, logits_V / jnp.maximum(temperature, 1e-6))

        greedy_B = jnp.argmax(logits_BV, axis=-1)
        sampled_B = jax.vmap(sample)(jnp.arange(rows), positions_B, logits_BV)
        return jnp.where(temperature > 0, sampled_B, greedy_B).astype(jnp.int32)

    # Right padding also enters the cache, behind the prompt: those slots are out of sight until a new token overwrites
    # them.
    cache = make_cache(model.config.decoder, rows, slots, dtype)
    positions_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))
    hidden_BTD, cache = model(
        tokens_BT=arrays["tokens_T"],
        positions_BT=positions_BT,
        feature_index_BT=arrays["feature_index_T"],
        global_views_BGHWC=arrays["global_views_GHWC"],
        crops_BCHWC=arrays["crops_CHWC"],
        cache=cache,
    )
    last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    token_B = next_token(model.decoder.logits(last_B1D)[:, 0], lengths_B)

    def unfinished(carry):
        step, _, _, done_B, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def decode(carry):
        step, token_B, cache, done_B, out_BS = carry
        out_BS = out_BS.at[:, step].set(token_B)
        done_B |= jnp.isin(token_B, stop_ids)
        positions_B = lengths_B + step
        x_B1D = model.decoder.embed(token_B[:, None])
        hidden_B1D, cache = model.decoder(x_B1D, positions_B[:, None], None, cache)
        token_B = next_token(model.decoder.logits(hidden_B1D)[:, 0], positions_B + 1)
        return step + 1, token_B, cache, done_B, out_BS

    out_BS = jnp.zeros((rows, max_new_tokens), jnp.int32)
    carry = (jnp.int32(0), token_B, cache, lengths_B == 0, out_BS)  # rows that only fill the batch are done
    *_, done_B, out_BS = jax.lax.while_loop(unfinished, decode, carry)
    return out_BS, done_B


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _power_of_two(n: int, least: int = 1) -> int:
    return 0 if n == 0 else max(least, 1 << (n - 1).bit_length())
