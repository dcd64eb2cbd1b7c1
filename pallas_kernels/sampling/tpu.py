"""Sampling in one pass over the logits in HBM, for TPU.

Legend: B rows, V vocabulary, W words of the bitmask; R = 8 rows of a block; L = 128 lanes.

A block's rows, 8 x V, are copied into VMEM whole, the next block's while this one is worked on. All other passes are
over VMEM:
 1. Unpack, and keep the 4 largest logits of every lane of 16 interleaved parts of the vocabulary: 8192 candidates.
 2. Masses and sums, by chunk.
 3. Only if top-k or top-p is on in a row of the block: bisect for the thresholds among the candidates. They hold all
    tokens above the floor, the largest of the 4th largest logits. In the rare block where a threshold is not above it,
    bisect over the vocabulary.
 4. Only if top-k or top-p binds in a row: sum the kept tokens' masses by chunk.
The drawn token is then found from these sums, by 16 chunks, by one, by one vector of it.

A pass keeps its sums by lane, token i in lane i % 128, and reduces over lanes once at its end.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check
from pallas_kernels.chips import current_chip
from pallas_kernels.sampling import bitmask, parameters, selection, wide
from pallas_kernels.sampling.parameters import Parameters, Sample
from pallas_kernels.sampling.selection import Draw, Measure
from pallas_kernels.sampling.vectors import (
    CHUNK,
    LANES,
    ROWS,
    VECTORS,
    accumulate,
    fold,
    lane_sum,
    lanes,
    over_lanes,
    spread,
    tile,
    vectors,
)
from pallas_kernels.sampling.wide import Wide

PARTS = 16  # of the vocabulary: chunk i is in part i % 16
LARGEST = 4  # kept of a part's lane
CANDIDATES = PARTS * LARGEST // VECTORS  # in chunks; they follow the vocabulary's
GROUP = 16  # chunks whose sums are looked at together
COLLECT_UNROLL = {False: 1, True: 4}  # if masked, to hide how long the bitmask's permutations take
WEIGH_UNROLL = 2
_WORDS = CHUNK // bitmask.WORD  # of the bitmask for a chunk
_SPARE_VMEM = 4 << 20  # for what the compiler spills and the small blocks


def sample(
    logits_BV: jax.Array,
    rows: Parameters,
    allowed_BW: jax.Array | None,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Sample:
    batch, vocab_size = logits_BV.shape
    chunks = pl.cdiv(vocab_size, CHUNK)
    words = pl.cdiv(vocab_size, LANES * bitmask.WORD) * LANES
    scratch = [
        ((ROWS, (chunks + CANDIDATES) * CHUNK), jnp.float32),
        ((ROWS, (chunks + CANDIDATES) * CHUNK), jnp.int32),
        ((pl.cdiv(chunks, GROUP) * GROUP, ROWS, LANES), jnp.int32),
    ]
    windows = 2 * ROWS * (chunks * CHUNK * logits_BV.dtype.itemsize + (4 * words if allowed_BW is not None else 0))
    vmem_bytes = windows + sum(4 * math.prod(shape) for shape, _ in scratch) + _SPARE_VMEM
    chip = current_chip()
    check(
        vmem_bytes <= chip.vmem_mib << 20,
        f"logits_BV has a vocabulary of {vocab_size} in {logits_BV.dtype}: 8 rows take {vmem_bytes >> 20} MiB of "
        f"vector memory and {chip.name} has {chip.vmem_mib}; use implementation='xla'",
    )

    # What a block has beyond the last row is arbitrary. Its parameters are zero, which is invalid: nothing is searched.
    packed = jnp.pad(_pack(rows), ((0, -batch % ROWS), (0, 0)))
    operands = [packed, logits_BV]
    in_specs = [_rows_of(len(Parameters._fields)), _rows_of(vocab_size)]
    if allowed_BW is not None:
        allowed_BW = jax.lax.bitcast_convert_type(allowed_BW, jnp.int32)
        operands.append(jnp.pad(allowed_BW, ((0, 0), (0, words - bitmask.words_for(vocab_size)))))
        in_specs.append(_rows_of(words))
    outputs = [jnp.int32, jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.float32, jnp.float32]
    token, logit, top, total_high, total_low, raw_top, raw_sum = pl.pallas_call(
        partial(_kernel, vocab_size=vocab_size, masked=allowed_BW is not None),
        grid=(pl.cdiv(batch, ROWS),),
        in_specs=in_specs,
        out_specs=[_rows_of(1)] * len(outputs),
        out_shape=[jax.ShapeDtypeStruct((batch, 1), dtype) for dtype in outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes),
        cost_estimate=pl.CostEstimate(
            flops=40 * batch * vocab_size,
            transcendentals=2 * batch * vocab_size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands),
        ),
        interpret=interpret,
        name="sample",
    )(*operands)
    return parameters.finish(
        rows,
        tokens_B=token[:, 0],
        logits_B=logit[:, 0],
        top_B=top[:, 0],
        total_B=Wide(total_high[:, 0], total_low[:, 0]),
        raw_top_B=raw_top[:, 0],
        raw_sum_B=raw_sum[:, 0],
    )


def _rows_of(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((ROWS, width), lambda i: (i, 0))


def _pack(rows: Parameters) -> jax.Array:
    """[B, fields] int32, one block to copy."""
    inverse_temperature = jax.lax.bitcast_convert_type(rows.inverse_temperature, jnp.int32)
    return jnp.stack([inverse_temperature, *rows[1:]], axis=1)


def _unpack(packed: jax.Array) -> Parameters:
    columns = [spread(packed[:, i : i + 1]) for i in range(packed.shape[1])]
    return Parameters(jax.lax.bitcast_convert_type(columns[0], jnp.float32), *columns[1:])


def _kernel(rows_ref: Any, logits_ref: Any, *refs: Any, vocab_size: int, masked: bool) -> None:
    allowed_ref: Any = refs[0] if masked else None
    token_ref, logit_ref, top_ref, high_ref, low_ref, raw_top_ref, raw_sum_ref = refs[-10:-3]
    x_ref, mass_ref, sums_ref = refs[-3:]
    rows = _unpack(rows_ref[...])
    chunks = x_ref.shape[1] // CHUNK - CANDIDATES

    raw_top, top, floor = _collect(logits_ref, allowed_ref, x_ref, vocab_size)
    raw_top_ref[...], top_ref[...] = raw_top[:, :1], top[:, :1]
    raw_top, top = parameters.finite(raw_top), parameters.finite(top)
    raw_sum, all_mass, at_min_p = _weigh(raw_top, top, rows, logits_ref, x_ref, mass_ref, sums_ref)
    raw_sum_ref[...] = raw_sum[:, :1]

    def select(first: Any, floor: jax.Array) -> Draw:
        measure = partial(_measure, x_ref, mass_ref, first, first + jnp.where(first == 0, chunks, CANDIDATES))
        return selection.select(
            rows, logits_ref.dtype, top=top, floor=floor, all_mass=all_mass, at_min_p=at_min_p, measure=measure
        )

    def again(state: tuple[jax.Array, jax.Array, Draw]) -> tuple[jax.Array, jax.Array, Draw]:
        first, floor, _ = state
        return jnp.int32(0), jnp.full_like(floor, -jnp.inf), select(first, floor)

    # One trip in nearly all blocks, over the candidates; a second one over the vocabulary.
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    nothing = Draw(floor, floor, zeros, zeros, Wide(zeros, zeros), Wide(zeros, zeros), zeros)
    state = (jnp.int32(chunks), floor, nothing)
    draw = jax.lax.while_loop(lambda state: ~jnp.all(state[2].found != 0), again, state)[2]
    high_ref[...], low_ref[...] = draw.total.high[:, :1], draw.total.low[:, :1]

    @pl.when(~jnp.all(draw.unfiltered != 0))
    def sum_filtered() -> None:
        low, high = tile(draw.low), tile(draw.high)

        def step(chunk: Any, _: None) -> None:
            x = x_ref[:, lanes(chunk)]
            mass = fold(jnp.add, jnp.where((x >= low) & (x < high), mass_ref[:, lanes(chunk)], 0))
            sums_ref[chunk] = jnp.where(draw.unfiltered != 0, sums_ref[chunk], mass)

        jax.lax.fori_loop(0, chunks, step, None)

    token, logit = _locate(draw, x_ref, mass_ref, sums_ref)
    token_ref[...], logit_ref[...] = token[:, :1], logit[:, :1]


def _collect(logits_ref: Any, allowed_ref: Any, x_ref: Any, vocab_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Copy the logits to x_ref as float32, -inf for banned tokens and up to the chunk's end, then the candidates.

    Returns the largest logits, the largest allowed ones, and the floor below which candidates are missing.
    """
    lowest = jnp.full((ROWS, LANES), -jnp.inf)
    width = LARGEST * LANES
    start = x_ref.shape[1] - PARTS * width
    x_ref[:, start:] = jnp.full((ROWS, PARTS * width), -jnp.inf)

    def collect(chunk: Any, raw: jax.Array, raw_top: jax.Array) -> jax.Array:
        place = pl.ds(pl.multiple_of(start + chunk % PARTS * width, LANES), width)
        part = x_ref[:, place]
        x = _without_banned(allowed_ref, chunk, raw)
        x_ref[:, lanes(chunk)] = x  # after that load: the compiler keeps them in order, and would wait
        largest = [part[:, i * LANES : (i + 1) * LANES] for i in range(LARGEST)]
        for rest in vectors(x):
            for i in range(LARGEST):
                largest[i], rest = jnp.maximum(largest[i], rest), jnp.minimum(largest[i], rest)
        x_ref[:, place] = jnp.concatenate(largest, axis=1)
        return raw_top if allowed_ref is None else jnp.maximum(raw_top, fold(jnp.maximum, raw))

    def copy_and_collect(chunk: Any, raw_top: jax.Array) -> jax.Array:
        return collect(chunk, logits_ref[:, lanes(chunk)].astype(jnp.float32), raw_top)

    # The last chunk may be cut short by the vocabulary's end: there the copy differs.
    raw_top, whole = lowest, vocab_size // CHUNK
    if whole > 0:
        unroll = COLLECT_UNROLL[allowed_ref is not None]
        raw_top = jax.lax.fori_loop(0, whole, copy_and_collect, raw_top, unroll=unroll)
    if whole * CHUNK < vocab_size:
        x_ref[:, lanes(whole)] = jnp.full((ROWS, CHUNK), -jnp.inf)
        x_ref[:, whole * CHUNK : vocab_size] = logits_ref[:, whole * CHUNK :].astype(jnp.float32)
        raw_top = collect(jnp.int32(whole), x_ref[:, lanes(whole)], raw_top)

    tops, floors = lowest, lowest
    for first in range(start, x_ref.shape[1], width):
        tops = jnp.maximum(tops, x_ref[:, first : first + LANES])
        floors = jnp.maximum(floors, x_ref[:, first + width - LANES : first + width])
    top = spread(jnp.max(tops, axis=1, keepdims=True))
    floor = spread(jnp.max(floors, axis=1, keepdims=True))
    return top if allowed_ref is None else spread(jnp.max(raw_top, axis=1, keepdims=True)), top, floor


def _weigh(
    raw_top: jax.Array, top: jax.Array, rows: Parameters, logits_ref: Any, x_ref: Any, mass_ref: Any, sums_ref: Any
) -> tuple[jax.Array, Wide, Measure]:
    """Put masses into mass_ref and, of the tokens that pass min-p, sums by chunk into sums_ref.

    Returns the sum of exp(logit - raw_top) over all tokens, the mass of all, and the Measure of those that pass min-p.
    """
    chunks, vocab_size = x_ref.shape[1] // CHUNK - CANDIDATES, logits_ref.shape[1]
    whole = vocab_size // CHUNK
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    none = Wide(zeros, zeros)
    wide_raw_top, top, inverse_temperature = tile(raw_top), tile(top), tile(rows.inverse_temperature)
    min_mass = tile(rows.min_mass)

    def weigh(chunk: Any, carry: tuple[Wide, jax.Array, Wide]) -> tuple[Wide, jax.Array, Wide]:
        all_mass, count, kept_mass = carry
        mass = parameters.masses(x_ref[:, lanes(chunk)], top, inverse_temperature)
        mass_ref[:, lanes(chunk)] = mass
        kept = mass >= min_mass
        sums = fold(jnp.add, jnp.where(kept, mass, 0))
        sums_ref[chunk] = sums
        all_mass = accumulate(all_mass, fold(jnp.add, mass))
        return all_mass, count + fold(jnp.add, kept.astype(jnp.int32)), accumulate(kept_mass, sums)

    def step(chunk: Any, carry: tuple) -> tuple:
        raw = logits_ref[:, lanes(chunk)].astype(jnp.float32)
        return carry[0] + fold(jnp.add, jnp.exp(raw - wide_raw_top)), weigh(chunk, carry[1])

    raw_sum, sums = jnp.zeros((ROWS, LANES), jnp.float32), (none, zeros, none)
    if whole > 0:
        raw_sum, sums = jax.lax.fori_loop(0, whole, step, (raw_sum, sums), unroll=WEIGH_UNROLL)
    raw_sum = jnp.sum(raw_sum, axis=1, keepdims=True)
    if whole < chunks:
        rest = logits_ref[:, whole * CHUNK :].astype(jnp.float32)
        raw_sum += jnp.sum(jnp.exp(rest - raw_top[:, :1]), axis=1, keepdims=True)
        sums = weigh(whole, sums)
    for chunk in range(chunks, sums_ref.shape[0]):
        sums_ref[chunk] = zeros

    def weigh_candidates(chunk: Any, _: None) -> None:
        mass_ref[:, lanes(chunk)] = parameters.masses(x_ref[:, lanes(chunk)], top, inverse_temperature)

    jax.lax.fori_loop(chunks, chunks + CANDIDATES, weigh_candidates, None)
    all_mass, count, kept_mass = sums
    return spread(raw_sum), over_lanes(all_mass), _finish_measure(count, kept_mass)


def _measure(x_ref: Any, mass_ref: Any, first: Any, last: Any, threshold: jax.Array) -> Measure:
    """How many logits of chunks [first, last) are at or above `threshold`, and their mass."""
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    threshold = tile(threshold)

    def step(chunk: Any, carry: tuple[jax.Array, Wide]) -> tuple[jax.Array, Wide]:
        kept = x_ref[:, lanes(chunk)] >= threshold
        mass = fold(jnp.add, jnp.where(kept, mass_ref[:, lanes(chunk)], 0))
        return carry[0] + fold(jnp.add, kept.astype(jnp.int32)), accumulate(carry[1], mass)

    return _finish_measure(*jax.lax.fori_loop(first, last, step, (zeros, Wide(zeros, zeros))))


def _locate(draw: Draw, x_ref: Any, mass_ref: Any, sums_ref: Any) -> tuple[jax.Array, jax.Array]:
    """The drawn tokens and their logits: the group of chunks, the chunk, the vector, the lane."""
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

    sums = wide.split(sums_ref[...])
    groups = Wide(*(jnp.sum(part.reshape(-1, GROUP, ROWS, LANES), axis=1) for part in sums))
    group, target = _advance(draw.target, over_lanes(groups))

    mass = jnp.zeros((GROUP, ROWS, LANES), jnp.int32)
    for i in range(ROWS):
        mass = jnp.where(row == i, sums_ref[pl.ds(group[i, 0] * GROUP, GROUP)], mass)
    place, target = _advance(target, over_lanes(wide.split(mass)))
    chunk = jnp.minimum(group * GROUP + place, x_ref.shape[1] // CHUNK - CANDIDATES - 1)

    x = jnp.full((ROWS, CHUNK), -jnp.inf)
    mass = jnp.zeros((ROWS, CHUNK), jnp.int32)
    for i in range(ROWS):
        of_row = lanes(chunk[i, 0])
        x = jnp.where(tile(row) == i, x_ref[:, of_row], x)
        mass = jnp.where(tile(row) == i, mass_ref[:, of_row], mass)
    kept = (x >= tile(draw.low)) & (x < tile(draw.high)) & (mass >= tile(draw.min_mass))
    masses = vectors(jnp.where(kept, mass, 0))
    vector, target = _advance(target, over_lanes(wide.split(jnp.stack(masses))))

    x_of_vector, mass_of_vector = jnp.full((ROWS, LANES), -jnp.inf), jnp.zeros((ROWS, LANES), jnp.int32)
    for i, x_of_i in enumerate(vectors(x)):
        x_of_vector = jnp.where(vector == i, x_of_i, x_of_vector)
        mass_of_vector = jnp.where(vector == i, masses[i], mass_of_vector)
    upto = wide.split(mass_of_vector)
    for distance in (1, 2, 4, 8, 16, 32, 64):
        before = Wide(*(jnp.where(lane >= distance, pltpu.roll(part, distance, axis=1), 0) for part in upto))
        upto = wide.add(upto, before)
    passed = (~wide.less(target, upto)).astype(jnp.int32)
    drawn = jnp.minimum(spread(jnp.sum(passed, axis=1, keepdims=True)), LANES - 1)
    logit = spread(jnp.max(jnp.where(lane == drawn, x_of_vector, -jnp.inf), axis=1, keepdims=True))
    return chunk * CHUNK + vector * LANES + drawn, logit


def _advance(target: Wide, masses: Wide) -> tuple[jax.Array, Wide]:
    """Which of the parts that follow each other holds the target, and the target within it; masses [N, R, L]."""
    zeros = jnp.zeros_like(target.low)
    upto = before = Wide(zeros, zeros)
    index = zeros
    for i in range(masses.low.shape[0]):
        upto = wide.add(upto, Wide(masses.high[i], masses.low[i]))
        beyond = ~wide.less(target, upto)
        index += beyond.astype(jnp.int32)
        before = wide.where(beyond, upto, before)
    return jnp.minimum(index, masses.low.shape[0] - 1), wide.subtract(target, before)


def _without_banned(allowed_ref: Any, chunk: Any, x: jax.Array) -> jax.Array:
    """A chunk's logits, -inf where the bitmask, if there is one, has no bit."""
    if allowed_ref is None:
        return x
    chunks_of_vector = LANES // _WORDS
    words = allowed_ref[:, pl.ds(pl.multiple_of(chunk // chunks_of_vector * LANES, LANES), LANES)]
    first = chunk % chunks_of_vector * _WORDS
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    allowed = []
    for i in range(VECTORS):
        index = first + i * (LANES // bitmask.WORD) + lane // bitmask.WORD
        word = jnp.take_along_axis(words, index, axis=1, mode="promise_in_bounds")
        allowed.append(jax.lax.shift_right_logical(word, lane % bitmask.WORD) & 1)
    return jnp.where(jnp.concatenate(allowed, axis=1) != 0, x, -jnp.inf)


def _finish_measure(count: jax.Array, mass: Wide) -> Measure:
    return Measure(lane_sum(count), over_lanes(mass))
