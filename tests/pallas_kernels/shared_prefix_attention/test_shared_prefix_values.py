"""Both implementations compute what the reference says, whatever the lengths, the groups and the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from shared_prefix_cases import Shape, check_against_reference, make_step

from pallas_kernels.shared_prefix_attention import PageTables, Tiling, shared_prefix_attention

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")


@functools.cache
def compiled(shape: Shape, implementation: str):
    """A jitted step; the TPU kernel is interpreted with memory that is NaN until it is written."""
    options = {} if implementation == "xla" else {"tiling": shape.tiling, "interpret": INTERPRET}
    return jax.jit(functools.partial(shared_prefix_attention, implementation=implementation, **options))


def run(f, *arguments):
    """Wait for the result: the interpreter's callbacks use JAX, and can hang behind what is dispatched meanwhile."""
    return jax.block_until_ready(f(*jax.block_until_ready(arguments)))


RAGGED = [
    (300, [0, 1, 15]),  # three blocks of prefix
    (0, [100]),  # a sequence of its own
    (17, [16, 17, 40, 130]),
    (1, [0]),
    (128, [3]),
    (0, [1]),
]
MANY = [(40, [i % 19 * (i % 3) for i in range(70)]), (150, [0, 5] * 8), (16, [31, 32, 33]), (0, [20]), (33, [1])]
SHAPES = {
    "grouped queries": (Shape(B=12, P=5), RAGGED),
    "one head each, pages of 64, two heads a pass": (
        Shape(B=12, P=5, N=2, T=64, prefix_pages=5, suffix_pages=3, tiling=Tiling(256, 128, 1, 2)),
        RAGGED,
    ),
    "eight queries a head, 96 wide, bfloat16": (
        Shape(B=12, P=5, N=8, K=1, H=96, dtype=jnp.bfloat16, tiling=Tiling(256, 256, 1, 1)),
        RAGGED,
    ),
    "heads over two cores, two a pass, bfloat16": (
        Shape(B=12, P=5, N=16, K=4, dtype=jnp.bfloat16, tiling=Tiling(128, 128, 2, 2)),
        RAGGED,
    ),
    "subgroups of 64, 6, 16, 3 and 1": (Shape(B=92, P=5, K=1, N=4, prefix_pages=10, suffix_pages=3), MANY),
}


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference(name, implementation):
    shape, lengths = SHAPES[name]
    step = make_step(shape, lengths)
    check_against_reference(run(compiled(shape, implementation), *step), *step)


SMALL = Shape(B=6, P=2, K=1, N=4, prefix_pages=9, suffix_pages=2)
SMALL_LENGTHS = [(140, [0, 17, 5]), (20, [1, 32])]
BOTH = pytest.mark.parametrize("implementation", ["xla", "tpu"])


@BOTH
def test_only_shapes_are_compiled_in(implementation):
    """Other lengths, groups, pages and order: the same program, and right."""
    step = compiled(SMALL, implementation)
    batches = [
        SMALL_LENGTHS,
        [],
        [(0, [3]), (9, [0, 0, 2, 16])],
        [(144, [32]), (1, [1])],
        [(0, [32]), (0, [1]), (0, [7])],
    ]
    for seed, lengths in enumerate(batches):
        arguments = make_step(SMALL, lengths, seed)
        check_against_reference(run(step, *arguments), *arguments)
    assert step._cache_size() == 1


@BOTH
def test_unused_rows_give_zeros(implementation):
    q_BNH, kv, tables = make_step(SMALL, SMALL_LENGTHS)
    q_BNH = q_BNH.at[5].set(jnp.nan)
    out_BNH = run(compiled(SMALL, implementation), q_BNH, kv, tables)
    assert (out_BNH[5] == 0).all() and jnp.isfinite(out_BNH).all()


@BOTH
def test_rows_may_come_in_any_order(implementation):
    """Sequences of a group need not be neighbours, nor groups in order; the result follows the rows."""
    step = compiled(SMALL, implementation)
    q_BNH, kv, tables = make_step(SMALL, SMALL_LENGTHS)
    out_BNH = run(step, q_BNH, kv, tables)
    order_B = np.array([4, 2, 5, 3, 0, 1])
    shuffled = PageTables(
        tables.prefix_pages_PM[::-1],
        tables.prefix_lengths_P[::-1],
        jnp.where(tables.group_of_B < 0, -1, 1 - tables.group_of_B)[order_B],
        tables.suffix_pages_BM[order_B],
        tables.suffix_lengths_B[order_B],
    )
    shuffled_BNH = run(step, q_BNH[order_B], kv, shuffled)
    np.testing.assert_allclose(shuffled_BNH, out_BNH[order_B], atol=1e-6, rtol=0)


@BOTH
def test_sequences_do_not_disturb_one_another(implementation):
    """A step of the whole batch equals steps of one sequence each, and equals itself, bit by bit."""
    step = compiled(SMALL, implementation)
    q_BNH, kv, tables = make_step(SMALL, SMALL_LENGTHS)
    out_BNH = run(step, q_BNH, kv, tables)
    again_BNH = run(step, q_BNH, kv, tables)
    assert (out_BNH == again_BNH).all()
    for b in (1, 3):
        alone_B = jnp.arange(SMALL.B) == b
        alone = tables._replace(
            group_of_B=jnp.where(alone_B, tables.group_of_B, -1),
            suffix_lengths_B=jnp.where(alone_B, tables.suffix_lengths_B, 0),
        )
        alone_BNH = run(step, q_BNH, kv, alone)
        np.testing.assert_allclose(alone_BNH[b], out_BNH[b], atol=1e-6, rtol=0)


@BOTH
def test_bad_tables_stay_inside_the_pool(implementation):
    """Wild page numbers, lengths and groups are clamped: no access outside (the interpreter would raise), and the
    sequences whose own entries are good get what they should."""
    step = compiled(SMALL, implementation)
    q_BNH, kv, tables = make_step(SMALL, SMALL_LENGTHS)
    kv = jnp.nan_to_num(kv)
    out_BNH = run(step, q_BNH, kv, tables)
    wild = tables._replace(
        prefix_lengths_P=tables.prefix_lengths_P.at[1].set(10**8),
        group_of_B=tables.group_of_B.at[0].set(7),
        suffix_pages_BM=tables.suffix_pages_BM.at[0].set(jnp.array([-5, 10**6])).at[5].set(-1),
        suffix_lengths_B=tables.suffix_lengths_B.at[0].set(32).at[5].set(10**9),
    )
    wild_BNH = run(step, q_BNH, kv, wild)
    np.testing.assert_allclose(wild_BNH[1:3], out_BNH[1:3], atol=1e-6, rtol=0)
    assert jnp.isfinite(wild_BNH).all()


def test_no_data_races():
    """The copies into a buffer, and its readers and the clearing of its end, are in order; so on two cores too."""
    shape = Shape(B=4, P=2, K=2, N=2, H=8, prefix_pages=25, suffix_pages=2, tiling=Tiling(128, 128, 2, 1))
    step = make_step(shape, [(400, [0, 17]), (20, [1])])
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    f = functools.partial(shared_prefix_attention, implementation="tpu", tiling=shape.tiling, interpret=interpret)
    out_BNH = run(jax.jit(f), *step)
    assert jnp.isfinite(out_BNH).all()
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found
