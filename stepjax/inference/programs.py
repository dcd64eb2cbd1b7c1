"""The compiled functions of the engine. Their shapes depend only on the engine's configuration, never on requests.

    encode     image views -> rows of the feature store
    prefill    chunks of prompts -> their pages
    copy       pages -> pages, for samples that continue from a prompt's last, partial page
    decode     one or more tokens of every sequence -> their pages, and the next tokens

Legend: B sequences or rows, C tokens of a row, E views, Q features of a view, R rows of the feature store, D width,
S pages of the pool (of all layers), X pages to copy, I decoding steps, L top_logprobs, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sampling import Sample, sample
from pallas_kernels.shared_prefix_attention import PageTables
from stepjax.config import NumericsConfig
from stepjax.models.attention import resolve
from stepjax.models.paged_cache import NO_PAGE, Chunks, PagedCache
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import NO_FEATURE, StepVL
from stepjax.sharding import constrain, spec, target_platform


class Rows(NamedTuple):
    """Decoding inputs per sequence; unused rows have a suffix length of 0."""

    tokens_B: Any  # last token of each sequence, not yet in the cache
    positions_B: Any  # positions of these tokens
    seeds_B2: Any  # uint32
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any


class Drawn(NamedTuple):
    """The tokens of a call and their log-probabilities, [I, B]; top_logprobs are [I, B, L]."""

    tokens_IB: Any
    logprobs_IB: Any
    sampling_logprobs_IB: Any
    top_tokens_IBL: Any
    top_logprobs_IBL: Any


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A model as a flat list. Programs that run for milliseconds cannot wait for nnx to flatten hundreds of modules."""

    arrays: list[jax.Array]
    structure: "Structure"

    @classmethod
    def of(cls, model: StepVL | Qwen3) -> "Packed":
        arrays, structure = jax.tree.flatten(model)
        return cls(arrays, Structure(structure))


class Structure:
    """A tree structure with a fast comparison."""

    def __init__(self, structure: Any):
        self.structure, self._hash = structure, hash(structure)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.structure == other.structure)


def unpacked(model: "Packed | StepVL | Qwen3") -> Any:
    return jax.tree.unflatten(model.structure.structure, model.arrays) if isinstance(model, Packed) else model


def decoder_of(model: StepVL | Qwen3) -> Qwen3:
    return model.decoder if isinstance(model, StepVL) else model


@partial(jax.jit, donate_argnames="store_RD")
def encode(model: Packed | StepVL, store_RD: jax.Array, views_EX: jax.Array, rows_EQ: jax.Array) -> jax.Array:
    """Returns the store with the views' features in `rows_EQ`; out-of-range rows are dropped (padding)."""
    features_QD = unpacked(model).encode_views(views_EX[None])[0]
    return store_RD.at[rows_EQ.reshape(-1)].set(features_QD.astype(store_RD.dtype), mode="drop")


@partial(jax.jit, donate_argnames="pool_S2KTW")
def prefill(
    model: Packed | StepVL | Qwen3,
    pool_S2KTW: jax.Array,
    store_RD: jax.Array,
    tokens_BC: jax.Array,
    feature_rows_BC: jax.Array,
    chunks: Chunks,
) -> jax.Array:
    """Returns the pool with the chunks' keys and values. `feature_rows_BC` has rows of the store, or NO_FEATURE."""
    decoder = decoder_of(unpacked(model))
    x_BCD = decoder.embed(tokens_BC)
    features_BCD = store_RD[jnp.maximum(feature_rows_BC, 0)].astype(x_BCD.dtype)
    x_BCD = jnp.where(feature_rows_BC[..., None] == NO_FEATURE, x_BCD, features_BCD)
    x_BCD = constrain(x_BCD, None, None, "act_embed")
    positions_BC = chunks.start_B[:, None] + jnp.arange(tokens_BC.shape[1])
    cache = PagedCache(pool_S2KTW, chunks)
    _, cache = decoder(x_BCD, positions_BC, None, cache)
    assert cache is not None
    return cache.pool_S2KTW


@partial(jax.jit, donate_argnames="pool_S2KTW", static_argnames="num_layers")
def copy(pool_S2KTW: jax.Array, source_X: jax.Array, target_X: jax.Array, *, num_layers: int) -> jax.Array:
    """Returns the pool with pages copied in every layer; pairs with target NO_PAGE are dropped (padding)."""
    num_pages = pool_S2KTW.shape[0]
    first_L1 = jnp.arange(0, num_pages, num_pages // num_layers)[:, None]
    target_LX = jnp.where(target_X == NO_PAGE, num_pages, first_L1 + target_X)
    return pool_S2KTW.at[target_LX].set(pool_S2KTW[first_L1 + source_X], mode="drop")


@partial(jax.jit, donate_argnames="pool_S2KTW", static_argnames=("steps", "num_top"))
def decode(
    model: Packed | StepVL | Qwen3,
    pool_S2KTW: jax.Array,
    tables: PageTables,
    rows: Rows,
    *,
    steps: int,
    num_top: int,
) -> tuple[jax.Array, Drawn]:
    """Decodes `steps` tokens of every sequence; each depends only on its sequence, seed and position.

    The suffixes of `tables` include the first token written. Every written token needs a page, or NO_PAGE in its place;
    tokens sampled after a missing page are meaningless.
    """
    decoder = decoder_of(unpacked(model))
    in_use_B = tables.suffix_lengths_B > 0

    def step(carry, i):
        pool_S2KTW, tokens_B = carry
        seen = tables._replace(suffix_lengths_B=tables.suffix_lengths_B + i * in_use_B)
        x_B1D = constrain(decoder.embed(tokens_B[:, None]), None, None, "act_embed")
        cache = PagedCache(pool_S2KTW, seen)
        hidden_B1D, cache = decoder(x_B1D, (rows.positions_B + i)[:, None], None, cache)
        # In two steps; otherwise XLA gathers the output projection instead of the logits.
        logits_BV = constrain(decoder.logits(hidden_B1D)[:, 0], None, "vocab")
        logits_BV = constrain(logits_BV, None, None)
        drawn = _draw(logits_BV, rows, rows.positions_B + i + 1, decoder.numerics)
        top_BL, top_tokens_BL = jax.lax.top_k(logits_BV, num_top)
        top_BL = top_BL - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True) if num_top else top_BL
        # NaN logits yield token -1: the host must see it, the embedding must not.
        following_B = jnp.maximum(drawn.tokens_B, 0)
        assert cache is not None
        return (cache.pool_S2KTW, following_B), Drawn(*drawn, top_tokens_BL, top_BL)

    (pool_S2KTW, _), drawn = jax.lax.scan(step, (pool_S2KTW, rows.tokens_B), jnp.arange(steps))
    return pool_S2KTW, drawn


def _draw(logits_BV: jax.Array, rows: Rows, positions_B: jax.Array, numerics: NumericsConfig) -> Sample:
    """Samples the tokens for these positions. Every device of a mesh has all logits and draws the same tokens."""
    implementation = "tpu" if resolve(numerics.attention, target_platform()) == "tpu" else "xla"

    def of_device(logits_BV, rows, positions_B):
        return sample(
            logits_BV,
            seeds_B2=rows.seeds_B2,
            positions_B=positions_B,
            temperature_B=rows.temperature_B,
            top_k_B=rows.top_k_B,
            top_p_B=rows.top_p_B,
            min_p_B=rows.min_p_B,
            implementation=implementation,
        )

    if not jax.sharding.get_abstract_mesh().empty:  # the partitioner cannot see into a kernel
        of_device = jax.shard_map(of_device, in_specs=spec(), out_specs=spec(), check_vma=False)
    return of_device(logits_BV, rows, positions_B)


PROGRAMS: tuple[Any, ...] = (encode, prefill, copy, decode)


def num_compiled() -> int:
    """Programs compiled so far in this process, over all shapes and engines."""
    return sum(program._cache_size() for program in PROGRAMS)
