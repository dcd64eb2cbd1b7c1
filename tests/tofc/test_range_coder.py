"""The range coder alone: what goes in comes out, at the price of its information, and nothing else does."""

import numpy as np
import pytest

from stepjax.errors import CorruptStreamError
from stepjax.tofc.range_coder import TOTAL, FrequencyTables, decode, encode, read_varint, varint
from stepjax.tofc.tables import NUM_SCALES, frequencies, laplace_frequencies

VALUES, RADII = laplace_frequencies()
TABLES = FrequencyTables(np.split(VALUES, np.cumsum(2 * RADII + 2)[:-1]))


def draw(count, low=0, high=NUM_SCALES, seed=0):
    """Symbols of tables low to high, as often as the tables say."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(low, high, count)
    slots = rng.integers(0, TOTAL, count)
    return TABLES.key.searchsorted((tables << 16) + slots, "right") - 1 - TABLES.first[tables], tables


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 1000, 4096, 4097, 10_001, 36_864])
@pytest.mark.parametrize("low, high", [(0, 1), (0, 30), (20, 40), (60, 64)], ids=str)
def test_symbols_come_back_at_the_price_of_their_information(count, low, high):
    symbols, tables = draw(count, low, high)
    data = encode(TABLES, symbols, tables)
    np.testing.assert_array_equal(decode(TABLES, data, tables), symbols)
    bits = TABLES.bits(symbols, tables).sum()
    # A head begins with less information than its first symbol's table has. A lane, one per 800 bits or 1280 symbols,
    # costs 5 bits, and its first state where there is nothing to fill it with.
    lanes = read_varint(data, 0)[0]
    assert lanes <= max(bits / 800, count / 1280 + 1, 2)
    assert len(data) <= bits / 8 + (4 if not lanes else 8 + 5 * lanes / 8 + max(28 * lanes - bits, 0) / 8)
    if bits > 8 * 3000:
        assert len(data) < 1.01 * bits / 8


def test_symbols_of_any_table_and_the_rarest_ones_come_back():
    tables = np.arange(5000) % NUM_SCALES
    for symbol in (np.zeros(5000, int), 2 * RADII[tables] + 1):
        np.testing.assert_array_equal(decode(TABLES, encode(TABLES, symbol, tables), tables), symbol)
    one = FrequencyTables([np.array([TOTAL])])  # a symbol without a choice costs nothing
    nothing = np.zeros(50_000, int)
    assert len(encode(one, nothing, nothing)) < 200
    np.testing.assert_array_equal(decode(one, encode(one, nothing, nothing), nothing), nothing)


@pytest.mark.parametrize("count", [40, 6000])
def test_a_damaged_stream_is_refused_or_gives_symbols_of_its_tables(count):
    symbols, tables = draw(count, 15, 30)
    data = encode(TABLES, symbols, tables)
    rng, refused = np.random.default_rng(1), 0
    damaged = [data[:end] for end in range(0, len(data), 1 + len(data) // 200)] + [data + b"\0", data + b"ab"]
    for _ in range(200):
        copy = bytearray(data)
        copy[rng.integers(len(copy))] ^= 1 << rng.integers(8)
        damaged.append(bytes(copy))
    for each in damaged:
        try:
            found = decode(TABLES, each, tables)
            assert ((found >= 0) & (found < TABLES.sizes[tables])).all()
        except CorruptStreamError:
            refused += 1
    assert refused > 0.95 * len(damaged)


@pytest.mark.parametrize("table", [[TOTAL - 1], [TOTAL, 0], [TOTAL + 1, -1], []], ids=str)
def test_frequencies_must_be_positive_and_add_up(table):
    with pytest.raises(ValueError, match=r"frequencies\[0\]"):
        FrequencyTables([np.array(table)])


def test_frequencies_follow_probabilities():
    counts = frequencies(np.array([[0.5, 0.25, 0.25, 0.0], [1e-9, 1.0, 0.0, 0.0]]))
    assert counts.dtype == np.uint16 and (counts.sum(axis=1, dtype=int) == TOTAL).all()
    np.testing.assert_allclose(counts[0] / TOTAL, [0.5, 0.25, 0.25, 0], atol=1e-4)
    assert counts[1].tolist() == [1, TOTAL - 3, 1, 1]


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**21 - 1, 2**28 - 1])
def test_numbers_have_one_form(value):
    assert read_varint(b"x" + varint(value) + b"y", 1) == (value, 1 + len(varint(value)))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff\xff\xff\xff\x01"], ids=bytes.hex)
def test_other_forms_of_numbers_are_refused(data):
    with pytest.raises(CorruptStreamError, match="no number"):
        read_varint(data, 0)
