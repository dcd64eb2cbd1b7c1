"""Sampling in one pass over the logits in HBM, for TPU.

Legend: B rows, V vocabulary; R = 8 rows of a block; L = 128 lanes.

A block's rows, 8 x V, are copied to VMEM whole while the previous block is processed. All other passes read VMEM:
 1. Copy, and keep the 4 largest logits of every lane of 16 interleaved parts of the vocabulary: 8192 candidates.
 2. Masses and sums, by chunk.
 3. Only if top-k or top-p is on in a row of the block: bisect for the thresholds among the candidates. They include all
    tokens above the floor, the largest of the 4th largest logits. In the rare block with a threshold not above the
    floor, bisect over the vocabulary.
 4. Only if top-k or top-p binds in a row: sum the kept tokens' masses by chunk.
These sums locate the drawn token: first its 16 chunks, then its chunk, its vector and its lane.

A pass keeps its sums by lane, token i in lane i % 128, and reduces over lanes once at the end.

A vector is [R, L]; a chunk [R, CHUNK] is 8 vectors side by side. Row values fill a whole vector, equal in all lanes:
lane broadcasts left to the compiler cost a hundred cycles at every use.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check
from pallas_kernels.chips import current_chip
from pallas_kernels.sampling import parameters, selection, wide
from pallas_kernels.sampling.parameters import Parameters, Sample
from pallas_kernels.sampling.selection import Draw, Measure
from pallas_kernels.sampling.wide import Wide

ROWS = 8
LANES = 128
VECTORS = 8  # per chunk: their masses add up within 32 bits
CHUNK = VECTORS * LANES
PARTS = 16  # of the vocabulary: chunk i is in part i % 16
LARGEST = 4  # candidates kept per lane of a part
CANDIDATES = PARTS * LARGEST // VECTORS  # in chunks, after the vocabulary's chunks
GROUP = 16  # chunks per group when locating the token
WEIGH_UNROLL = 2
_SPARE_VMEM = 4 << 20  # for compiler spills and the small blocks


def sample(logits_BV: jax.Array, rows: Parameters, *, interpret: bool | pltpu.InterpretParams = False) -> Sample:
    batch, vocab_size = logits_BV.shape
    chunks = pl.cdiv(vocab_size, CHUNK)
    scratch = [
        ((ROWS, (chunks + CANDIDATES) * CHUNK), jnp.float32),
        ((ROWS, (chunks + CANDIDATES) * CHUNK), jnp.int32),
        ((pl.cdiv(chunks, GROUP) * GROUP, ROWS, LANES), jnp.int32),
    ]
    windows = 2 * ROWS * 4 * chunks * CHUNK
    vmem_bytes = windows + sum(4 * math.prod(shape) for shape, _ in scratch) + _SPARE_VMEM
    chip = current_chip()
    check(
        vmem_bytes <= chip.vmem_mib << 20,
        f"logits_BV has a vocabulary of {vocab_size}: 8 rows take {vmem_bytes >> 20} MiB of "
        f"vector memory, and {chip.name} has {chip.vmem_mib} MiB; use implementation='xla'",
    )

    # Rows past the end have arbitrary logits. Their parameters are zero, which is invalid, so they are not searched.
    packed = jnp.pad(_pack(rows), ((0, -batch % ROWS), (0, 0)))
    outputs = [jnp.int32, jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    token, logit, top, total, kept_high, kept_low = pl.pallas_call(
        partial(_kernel, vocab_size=vocab_size),
        grid=(pl.cdiv(batch, ROWS),),
        in_specs=[_rows_of(packed.shape[1]), _rows_of(vocab_size)],
        out_specs=[_rows_of(1)] * len(outputs),
        out_shape=[jax.ShapeDtypeStruct((batch, 1), dtype) for dtype in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes),
        cost_estimate=pl.CostEstimate(
            flops=40 * batch * vocab_size,
            transcendentals=2 * batch * vocab_size,
            bytes_accessed=4 * (packed.size + logits_BV.size),
        ),
        interpret=interpret,
        name="sample",
    )(packed, logits_BV)
    return parameters.finish(
        rows,
        tokens_B=token[:, 0],
        logits_B=logit[:, 0],
        top_B=top[:, 0],
        sum_B=total[:, 0],
        kept_mass_B=Wide(kept_high[:, 0], kept_low[:, 0]),
    )


def _rows_of(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((ROWS, width), lambda i: (i, 0))


def _pack(rows: Parameters) -> jax.Array:
    """[B, fields] int32, one block to copy."""
    inverse_temperature = jax.lax.bitcast_convert_type(rows.inverse_temperature, jnp.int32)
    return jnp.stack([inverse_temperature, *rows[1:]], axis=1)


def _unpack(packed: jax.Array) -> Parameters:
    columns = [_spread(packed[:, i : i + 1]) for i in range(packed.shape[1])]
    return Parameters(jax.lax.bitcast_convert_type(columns[0], jnp.float32), *columns[1:])


def _kernel(
    rows_ref: Any,
    logits_ref: Any,
    token_ref: Any,
    logit_ref: Any,
    top_ref: Any,
    sum_ref: Any,
    high_ref: Any,
    low_ref: Any,
    x_ref: Any,
    mass_ref: Any,
    sums_ref: Any,
    *,
    vocab_size: int,
) -> None:
    rows = _unpack(rows_ref[...])
    chunks = x_ref.shape[1] // CHUNK - CANDIDATES

    top, floor = _collect(logits_ref, x_ref, vocab_size)
    top_ref[...] = top[:, :1]
    top = parameters.finite(top)
    total, all_mass, at_min_p = _weigh(top, rows, logits_ref, x_ref, mass_ref, sums_ref)
    sum_ref[...] = total[:, :1]

    def select(first: Any, floor: jax.Array) -> Draw:
        measure = partial(_measure, x_ref, mass_ref, first, first + jnp.where(first == 0, chunks, CANDIDATES))
        return selection.select(rows, top=top, floor=floor, all_mass=all_mass, at_min_p=at_min_p, measure=measure)

    def again(state: tuple[jax.Array, jax.Array, Draw]) -> tuple[jax.Array, jax.Array, Draw]:
        first, floor, _ = state
        return jnp.int32(0), jnp.full_like(floor, -jnp.inf), select(first, floor)

    # Nearly always one iteration, over the candidates; rarely a second, over the vocabulary.
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    nothing = Draw(floor, floor, zeros, zeros, Wide(zeros, zeros), Wide(zeros, zeros), zeros)
    state = (jnp.int32(chunks), floor, nothing)
    draw = jax.lax.while_loop(lambda state: ~jnp.all(state[2].found != 0), again, state)[2]
    high_ref[...], low_ref[...] = draw.total.high[:, :1], draw.total.low[:, :1]

    @pl.when(~jnp.all(draw.unfiltered != 0))
    def sum_filtered() -> None:
        low, high = _tile(draw.low), _tile(draw.high)

        def step(chunk: Any, _: None) -> None:
            x = x_ref[:, _lanes(chunk)]
            mass = _fold(jnp.add, jnp.where((x >= low) & (x < high), mass_ref[:, _lanes(chunk)], 0))
            sums_ref[chunk] = jnp.where(draw.unfiltered != 0, sums_ref[chunk], mass)

        jax.lax.fori_loop(0, chunks, step, None)

    token, logit = _locate(draw, x_ref, mass_ref, sums_ref)
    token_ref[...], logit_ref[...] = token[:, :1], logit[:, :1]


def _collect(logits_ref: Any, x_ref: Any, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Copy the logits to x_ref, padded with -inf to whole chunks, and the candidates after them.

    Returns the largest logits, and the floor below which candidates are missing.
    """
    width = LARGEST * LANES
    start = x_ref.shape[1] - PARTS * width
    x_ref[:, start:] = jnp.full((ROWS, PARTS * width), -jnp.inf)

    def collect(chunk: Any, x: jax.Array) -> None:
        place = pl.ds(pl.multiple_of(start + chunk % PARTS * width, LANES), width)
        part = x_ref[:, place]
        x_ref[:, _lanes(chunk)] = x  # after that load: the compiler keeps the order, and the load would wait
        largest = [part[:, i * LANES : (i + 1) * LANES] for i in range(LARGEST)]
        for rest in _vectors(x):
            for i in range(LARGEST):
                largest[i], rest = jnp.maximum(largest[i], rest), jnp.minimum(largest[i], rest)
        x_ref[:, place] = jnp.concatenate(largest, axis=1)

    # The vocabulary may end inside the last chunk, which is copied differently.
    whole = vocab_size // CHUNK
    if whole > 0:
        jax.lax.fori_loop(0, whole, lambda chunk, _: collect(chunk, logits_ref[:, _lanes(chunk)]), None)
    if whole * CHUNK < vocab_size:
        x_ref[:, _lanes(whole)] = jnp.full((ROWS, CHUNK), -jnp.inf)
        x_ref[:, whole * CHUNK : vocab_size] = logits_ref[:, whole * CHUNK :]
        collect(jnp.int32(whole), x_ref[:, _lanes(whole)])

    tops = floors = jnp.full((ROWS, LANES), -jnp.inf)
    for first in range(start, x_ref.shape[1], width):
        tops = jnp.maximum(tops, x_ref[:, first : first + LANES])
        floors = jnp.maximum(floors, x_ref[:, first + width - LANES : first + width])
    return _spread(jnp.max(tops, axis=1, keepdims=True)), _spread(jnp.max(floors, axis=1, keepdims=True))


def _weigh(
    top: jax.Array, rows: Parameters, logits_ref: Any, x_ref: Any, mass_ref: Any, sums_ref: Any
) -> tuple[jax.Array, Wide, Measure]:
    """Write masses to mass_ref, and their sums by chunk over the tokens that pass min-p to sums_ref.

    Returns the sum of exp(logit - top) over all tokens, their mass, and the Measure of those that pass min-p.
    """
    chunks, vocab_size = x_ref.shape[1] // CHUNK - CANDIDATES, logits_ref.shape[1]
    whole = vocab_size // CHUNK
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    none = Wide(zeros, zeros)
    wide_top, inverse_temperature, min_mass = _tile(top), _tile(rows.inverse_temperature), _tile(rows.min_mass)

    def weigh(chunk: Any, carry: tuple[Wide, jax.Array, Wide]) -> tuple[Wide, jax.Array, Wide]:
        all_mass, count, kept_mass = carry
        mass = parameters.masses(x_ref[:, _lanes(chunk)], wide_top, inverse_temperature)
        mass_ref[:, _lanes(chunk)] = mass
        kept = mass >= min_mass
        sums = _fold(jnp.add, jnp.where(kept, mass, 0))
        sums_ref[chunk] = sums
        all_mass = _accumulate(all_mass, _fold(jnp.add, mass))
        return all_mass, count + _fold(jnp.add, kept.astype(jnp.int32)), _accumulate(kept_mass, sums)

    def step(chunk: Any, carry: tuple) -> tuple:
        exps = jnp.exp(logits_ref[:, _lanes(chunk)] - wide_top)
        return carry[0] + _fold(jnp.add, exps), weigh(chunk, carry[1])

    total, sums = jnp.zeros((ROWS, LANES), jnp.float32), (none, zeros, none)
    if whole > 0:
        total, sums = jax.lax.fori_loop(0, whole, step, (total, sums), unroll=WEIGH_UNROLL)
    total = jnp.sum(total, axis=1, keepdims=True)
    if whole < chunks:
        total += jnp.sum(jnp.exp(logits_ref[:, whole * CHUNK :] - top[:, :1]), axis=1, keepdims=True)
        sums = weigh(whole, sums)
    for chunk in range(chunks, sums_ref.shape[0]):
        sums_ref[chunk] = zeros

    def weigh_candidates(chunk: Any, _: None) -> None:
        mass_ref[:, _lanes(chunk)] = parameters.masses(x_ref[:, _lanes(chunk)], wide_top, inverse_temperature)

    jax.lax.fori_loop(chunks, chunks + CANDIDATES, weigh_candidates, None)
    all_mass, count, kept_mass = sums
    return _spread(total), _over_lanes(all_mass), _finish_measure(count, kept_mass)


def _measure(x_ref: Any, mass_ref: Any, first: Any, last: Any, threshold: jax.Array) -> Measure:
    """The number and mass of logits at or above `threshold` in chunks [first, last)."""
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    threshold = _tile(threshold)

    def step(chunk: Any, carry: tuple[jax.Array, Wide]) -> tuple[jax.Array, Wide]:
        kept = x_ref[:, _lanes(chunk)] >= threshold
        mass = _fold(jnp.add, jnp.where(kept, mass_ref[:, _lanes(chunk)], 0))
        return carry[0] + _fold(jnp.add, kept.astype(jnp.int32)), _accumulate(carry[1], mass)

    return _finish_measure(*jax.lax.fori_loop(first, last, step, (zeros, Wide(zeros, zeros))))


def _locate(draw: Draw, x_ref: Any, mass_ref: Any, sums_ref: Any) -> tuple[jax.Array, jax.Array]:
    """The drawn tokens and their logits: finds the group of chunks, then the chunk, the vector, the lane."""
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

    sums = wide.split(sums_ref[...])
    groups = Wide(*(jnp.sum(part.reshape(-1, GROUP, ROWS, LANES), axis=1) for part in sums))
    group, target = _advance(draw.target, _over_lanes(groups))

    mass = jnp.zeros((GROUP, ROWS, LANES), jnp.int32)
    for i in range(ROWS):
        mass = jnp.where(row == i, sums_ref[pl.ds(group[i, 0] * GROUP, GROUP)], mass)
    place, target = _advance(target, _over_lanes(wide.split(mass)))
    chunk = jnp.minimum(group * GROUP + place, x_ref.shape[1] // CHUNK - CANDIDATES - 1)

    x = jnp.full((ROWS, CHUNK), -jnp.inf)
    mass = jnp.zeros((ROWS, CHUNK), jnp.int32)
    for i in range(ROWS):
        of_row = _lanes(chunk[i, 0])
        x = jnp.where(_tile(row) == i, x_ref[:, of_row], x)
        mass = jnp.where(_tile(row) == i, mass_ref[:, of_row], mass)
    kept = (x >= _tile(draw.low)) & (x < _tile(draw.high)) & (mass >= _tile(draw.min_mass))
    masses = _vectors(jnp.where(kept, mass, 0))
    vector, target = _advance(target, _over_lanes(wide.split(jnp.stack(masses))))

    x_of_vector, mass_of_vector = jnp.full((ROWS, LANES), -jnp.inf), jnp.zeros((ROWS, LANES), jnp.int32)
    for i, x_of_i in enumerate(_vectors(x)):
        x_of_vector = jnp.where(vector == i, x_of_i, x_of_vector)
        mass_of_vector = jnp.where(vector == i, masses[i], mass_of_vector)
    upto = wide.split(mass_of_vector)
    for distance in (1, 2, 4, 8, 16, 32, 64):
        before = Wide(*(jnp.where(lane >= distance, pltpu.roll(part, distance, axis=1), 0) for part in upto))
        upto = wide.add(upto, before)
    passed = (~wide.less(target, upto)).astype(jnp.int32)
    drawn = jnp.minimum(_spread(jnp.sum(passed, axis=1, keepdims=True)), LANES - 1)
    logit = _spread(jnp.max(jnp.where(lane == drawn, x_of_vector, -jnp.inf), axis=1, keepdims=True))
    return chunk * CHUNK + vector * LANES + drawn, logit


def _advance(target: Wide, masses: Wide) -> tuple[jax.Array, Wide]:
    """Which of N consecutive parts contains the target, and the target within it; masses [N, R, L]."""
    zeros = jnp.zeros_like(target.low)
    upto = before = Wide(zeros, zeros)
    index = zeros
    for i in range(masses.low.shape[0]):
        upto = wide.add(upto, Wide(masses.high[i], masses.low[i]))
        beyond = ~wide.less(target, upto)
        index += beyond.astype(jnp.int32)
        before = wide.where(beyond, upto, before)
    return jnp.minimum(index, masses.low.shape[0] - 1), wide.subtract(target, before)


def _finish_measure(count: jax.Array, mass: Wide) -> Measure:
    return Measure(_lane_sum(count), _over_lanes(mass))


def _lanes(chunk: Any) -> Any:
    return pl.ds(chunk * CHUNK if isinstance(chunk, int) else pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)


def _spread(x: jax.Array) -> jax.Array:
    """[R, 1] to [R, L]."""
    return jnp.broadcast_to(x, (ROWS, LANES))


def _tile(x: jax.Array) -> jax.Array:
    """[R, L] to [R, CHUNK]; free, because all vectors are the same."""
    return jnp.concatenate([x] * VECTORS, axis=1)


def _vectors(x: jax.Array) -> list[jax.Array]:
    """[R, CHUNK] to VECTORS arrays [R, L]."""
    return [x[:, i * LANES : (i + 1) * LANES] for i in range(VECTORS)]


def _fold(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[R, CHUNK] to [R, L], lane by lane, by tree reduction."""
    parts = _vectors(x)
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _accumulate(total: Wide, mass: jax.Array) -> Wide:
    """Add 32-bit masses without carrying: each adds less than 2^16 to the low part, which may exceed 16 bits."""
    part = wide.split(mass)
    return Wide(total.high + part.high, total.low + part.low)


def _over_lanes(mass: Wide) -> Wide:
    """The sum over lanes, broadcast to all of them, [..., R, L]."""
    mass = wide.normalized(*mass)
    return wide.normalized(_lane_sum(mass.high, long=True), _lane_sum(mass.low))


def _lane_sum(x: jax.Array, long: bool = False) -> jax.Array:
    """Like `_over_lanes`, of integers below 2^17 or, if `long`, 2^31; float32 adds 128 of 17 bits exactly."""
    if long:
        return (_lane_sum(x >> 16) << 16) + _lane_sum(x & 0xFFFF)
    return jnp.broadcast_to(jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True), x.shape).astype(jnp.int32)
