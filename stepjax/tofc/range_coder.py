"""An integer range coder (rANS, Duda 1311.2540) whose lanes step together in NumPy.

Legend: S symbols, W lanes.

A state x codes a symbol of frequency f and cumulated frequency c, both of 2^16, by

    encode    x <- floor(x / f) 2^16 + x mod f + c
    decode    slot = x mod 2^16 finds the symbol;  x <- f floor(x / 2^16) + slot - c

The last symbol encoded is the first decoded. A lane keeps its state in [2^24, 2^40): before encoding it moves a word of
16 bits to the stream if the state would overflow, and decoding takes it back. Lanes share one stream of words.

A Python loop would take a microsecond a symbol; NumPy takes ten a step, for all lanes at once. But a lane costs its
first state, 24 bits, and that its last has no known length, 4 bits. So the first states hold data too: the symbols that
are decoded last, the head, are coded in one long integer (the same equations, without words), and its digits are the
first states. That leaves 4 to 5 bits a lane. Few symbols are all head.

    head only    0 | the integer
    with lanes   lanes, varint | symbols in the head, varint | last states: 4 bits of length, then the bits | words

Decoding ends with an empty stream, lanes in [2^24, 2^25) and a head of 1, or the stream was not made by `encode`. That
is no checksum: the frame has one.
"""

import bisect
import functools
from collections.abc import Sequence

import numpy as np

from stepjax.errors import CorruptStreamError

PRECISION = 16  # bits of a frequency
TOTAL = 1 << PRECISION
_MASK = TOTAL - 1
_LOW = 24  # a lane's state has at least this many bits after its leading one
_FLOOR = 1 << _LOW

# Decoding is bounded by these before it allocates anything: a hostile stream costs no more than a good one.
MAX_HEAD = 4096  # symbols
MAX_HEAD_BYTES = 1024  # the loop's time is the product of both
MAX_STEPS = 2048
MAX_LANES = 1 << 12
MAX_SYMBOLS = MAX_STEPS * MAX_LANES


class FrequencyTables:
    """Integer distributions. Table t gives symbol s `frequencies[t][s]` of 65,536.

    Raises:
        ValueError: a frequency is not positive, or a table's do not add up.
    """

    def __init__(self, frequencies: Sequence[np.ndarray]):
        certain = np.array([TOTAL])  # fills the last step of the lanes: it leaves a state as it is
        tables = [np.asarray(table, np.int64) for table in (*frequencies, certain)]
        for index, table in enumerate(tables):
            if table.ndim != 1 or table.min(initial=0) < 0 or not table.all() or table.sum() != TOTAL:
                raise ValueError(f"frequencies[{index}]={table}: must be positive and add up to {TOTAL}")
        sizes = np.array([len(table) for table in tables])
        self.certain = len(frequencies)
        self.first = np.cumsum(sizes) - sizes  # place of each table's first symbol
        self.sizes = sizes
        self.frequency = np.concatenate(tables)
        # Cumulated over all tables, so a multiple of 2^16 plus that within the table: one search serves every table.
        self.key = np.cumsum(self.frequency) - self.frequency

    @functools.cached_property
    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """First places, frequencies and keys as lists, which the loop of the head reads faster than arrays."""
        return self.first.tolist(), self.frequency.tolist(), self.key.tolist()

    def bits(self, symbols_S: np.ndarray, tables_S: np.ndarray) -> np.ndarray:
        """The information [S] of symbols, which coding them costs within a few bytes in all."""
        return PRECISION - np.log2(self.frequency[self.first[tables_S] + symbols_S])


def encode(tables: FrequencyTables, symbols_S: np.ndarray, tables_S: np.ndarray) -> bytes:
    """Codes a symbol of a table at a time. The caller knows that the symbols are in their tables."""
    place_S = tables.first[tables_S] + symbols_S
    frequency_S, start_S = tables.frequency[place_S], tables.key[place_S] & _MASK
    assert len(place_S) <= MAX_SYMBOLS, len(place_S)
    lanes = _num_lanes(len(place_S), float(np.sum(PRECISION - np.log2(frequency_S))))
    head, head_symbols = _encode_head(frequency_S, start_S, lanes)
    if not lanes:
        return b"\0" + head.to_bytes((head.bit_length() + 7) // 8, "little")

    rest = len(place_S) - head_symbols
    fill = -rest % lanes
    frequency_TW = np.append(frequency_S[:rest], np.full(fill, TOTAL)).reshape(-1, lanes)
    start_TW = np.append(start_S[:rest], np.zeros(fill, np.int64)).reshape(-1, lanes)
    limit_TW, gain_TW = frequency_TW << _LOW, TOTAL - frequency_TW
    x_W = np.array([_FLOOR | (head >> (_LOW * lane)) & (_FLOOR - 1) for lane in range(lanes)], np.int64)
    words = []
    for frequency_W, start_W, limit_W, gain_W in zip(
        frequency_TW[::-1], start_TW[::-1], limit_TW[::-1], gain_TW[::-1], strict=True
    ):
        (full,) = (x_W >= limit_W).nonzero()
        if len(full):
            overflow = x_W[full]
            words.append(overflow)
            x_W[full] = overflow >> PRECISION
        quotient_W = x_W // frequency_W
        quotient_W *= gain_W
        x_W += quotient_W
        x_W += start_W
    packed, length = 0, 0
    for x in x_W.tolist():
        mantissa_bits = x.bit_length() - 1
        packed |= ((mantissa_bits - _LOW) | ((x ^ (1 << mantissa_bits)) << 4)) << length
        length += 4 + mantissa_bits
    stream = np.concatenate([*words[::-1], np.zeros(0, np.int64)]) & _MASK
    prefix = varint(lanes) + varint(head_symbols)
    return prefix + packed.to_bytes((length + 7) // 8, "little") + stream.astype("<u2").tobytes()


def decode(tables: FrequencyTables, data: bytes, tables_S: np.ndarray) -> np.ndarray:
    """The symbols [S] of the given tables.

    Raises:
        CorruptStreamError: `encode` did not make this of as many symbols of these tables.
    """
    if not data:
        raise CorruptStreamError("stream: no byte left for the range coder; send it again")
    if data[0] == 0:
        if len(tables_S) > MAX_HEAD or not 1 < len(data) <= 1 + MAX_HEAD_BYTES or not data[-1]:
            raise CorruptStreamError(f"stream: {len(data)} bytes cannot hold {len(tables_S)} symbols; send it again")
        places = _decode_head(tables, int.from_bytes(data[1:], "little"), tables_S)
        return np.array(places, np.int64) - tables.first[tables_S]

    lanes, position = read_varint(data, 0)
    head_symbols, position = read_varint(data, position)
    rest = len(tables_S) - head_symbols
    if not 0 < rest <= lanes * MAX_STEPS or lanes > MAX_LANES or head_symbols > MAX_HEAD:
        raise CorruptStreamError(f"stream: {lanes} lanes, {head_symbols} first symbols; send it again")
    x_W, position = _read_states(data, position, lanes)
    if (len(data) - position) % 2:
        raise CorruptStreamError("stream: half a word at the end; send it again")
    words = np.frombuffer(data, "<u2", offset=position).astype(np.int64)

    base_TW = np.append(tables_S[:rest], np.full(-rest % lanes, tables.certain)).reshape(-1, lanes) << PRECISION
    place_TW = np.empty(base_TW.shape, np.int64)
    frequency, key, used = tables.frequency, tables.key, 0
    for base_W, place_W in zip(base_TW, place_TW, strict=True):
        slot_W = x_W & _MASK
        slot_W += base_W
        np.subtract(key.searchsorted(slot_W, "right"), 1, out=place_W)
        x_W >>= PRECISION
        x_W *= frequency.take(place_W)
        x_W += slot_W
        x_W -= key.take(place_W)
        (empty,) = (x_W < _FLOOR).nonzero()
        if len(empty):
            taken = words[used : used + len(empty)]
            if len(taken) < len(empty):
                raise CorruptStreamError("stream: ends before its symbols do; send it again")
            x_W[empty] = (x_W[empty] << PRECISION) | taken
            used += len(empty)
    if used < len(words) or (x_W < _FLOOR).any() or (x_W >= 2 * _FLOOR).any():
        raise CorruptStreamError("stream: its symbols end before it does; send it again")
    head = sum((x - _FLOOR) << (_LOW * lane) for lane, x in enumerate(x_W.tolist()))
    places = place_TW.reshape(-1)[:rest]
    places = np.append(places, np.array(_decode_head(tables, head, tables_S[rest:]), np.int64))
    return places - tables.first[tables_S]


def _num_lanes(symbols: int, bits: float) -> int:
    """Lanes for so many symbols of so many bits in all; 0 for a head only.

    A lane costs 4 to 5 bits and saves steps, of a hundredth of a millisecond each: 0.6 % of the stream go into lanes,
    and more where there would be more than 1280 steps.
    """
    if symbols <= MAX_HEAD and bits <= 8 * (MAX_HEAD_BYTES - 8):
        return 0
    return min(max(int(bits / 800), -(-symbols // 1280), 2), MAX_LANES)


def _encode_head(frequency_S: np.ndarray, start_S: np.ndarray, lanes: int) -> tuple[int, int]:
    """The last symbols in one integer, and their number: all without lanes, else as many as fit into the states."""
    head, count = 1, 0
    limit = _LOW * lanes - PRECISION if lanes else 1 << 62
    kept = slice(-1, -1 - MAX_HEAD, -1)
    for frequency, start in zip(frequency_S[kept].tolist(), start_S[kept].tolist(), strict=True):
        if head.bit_length() > limit or count == len(frequency_S) - 1 and lanes:
            break
        quotient, remainder = divmod(head, frequency)
        head = (quotient << PRECISION) + remainder + start
        count += 1
    return head, count


def _decode_head(tables: FrequencyTables, head: int, tables_S: np.ndarray) -> list[int]:
    first, frequencies, keys = tables.lists
    places = []
    for table in tables_S.tolist():
        slot = (head & _MASK) + (table << PRECISION)
        place = bisect.bisect_right(keys, slot, first[table], first[table + 1]) - 1
        head = frequencies[place] * (head >> PRECISION) + slot - keys[place]
        places.append(place)
    if head != 1:
        raise CorruptStreamError("stream: its symbols do not end where it does; send it again")
    return places


def _read_states(data: bytes, position: int, lanes: int) -> tuple[np.ndarray, int]:
    """The states [W] in which `encode` left the lanes, and where the words begin."""
    packed = int.from_bytes(data[position : position + 6 * lanes], "little")
    length, states = 0, []
    for _ in range(lanes):
        mantissa_bits = _LOW + ((packed >> length) & 15)
        length += 4
        states.append((1 << mantissa_bits) | ((packed >> length) & ((1 << mantissa_bits) - 1)))
        length += mantissa_bits
    end = position + (length + 7) // 8
    if end > len(data):
        raise CorruptStreamError("stream: ends within its first states; send it again")
    return np.array(states, np.int64), end


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the high bit."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A value of at most 28 bits in its shortest form, and the position after it.

    Raises:
        CorruptStreamError: there is none.
    """
    value = 0
    for index, byte in enumerate(data[position : position + 4]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            if byte == 0 and index:
                break
            return value, position + index + 1
    raise CorruptStreamError(f"stream: no number at byte {position}; send it again")
