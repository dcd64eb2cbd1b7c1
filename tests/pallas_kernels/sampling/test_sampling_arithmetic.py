"""The integer arithmetic and the generator of sampling, each against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sampling import selection, wide
from pallas_kernels.sampling.parameters import threefry_2x32


def make_wide(values):
    return wide.Wide(*(jnp.array([f(v) for v in values], jnp.int32) for f in (lambda v: v >> 16, lambda v: v & 0xFFFF)))


def as_ints(a):
    return [int(high) * 65536 + int(low) for high, low in zip(a.high, a.low, strict=True)]


def as_words(values):
    return jnp.asarray(np.array(values, np.uint32).view(np.int32))


@pytest.fixture
def numbers():
    """Wides of all sizes, the ends among them."""
    rng = np.random.default_rng(0)
    return [int(rng.integers(0, 1 << int(rng.integers(1, 48)))) for _ in range(400)] + [
        0,
        1,
        65535,
        65536,
        (1 << 47) - 1,
    ]


def test_add_subtract_less(numbers):
    other = [n // 3 for n in numbers]
    a, b = make_wide(numbers), make_wide(other)
    assert as_ints(wide.subtract(a, b)) == [x - y for x, y in zip(numbers, other, strict=True)]
    assert as_ints(wide.add(b, b)) == [2 * y for y in other]
    assert wide.less(b, a).tolist() == [y < x for x, y in zip(numbers, other, strict=True)]
    assert wide.less(a, a).sum() == 0


def test_split_takes_the_sign_bit_as_a_digit():
    assert as_ints(wide.split(as_words([0, 65536, 1 << 31, (1 << 32) - 1]))) == [0, 65536, 1 << 31, (1 << 32) - 1]


def test_to_float(numbers):
    np.testing.assert_allclose(wide.to_float(make_wide(numbers)), np.array(numbers, np.float64), rtol=2.0**-23)


def test_times():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 1 << 19, 300), rng.integers(0, 1 << 28, 300)
    a[0], b[0] = (1 << 19) - 1, 1 << 28
    assert as_ints(wide.times(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))) == (a * b).tolist()


@pytest.mark.parametrize("words", (1, 2))
def test_fraction(numbers, words):
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, 1 << 32, len(numbers), dtype=np.uint64) for _ in range(words)]
    parts[-1][:3] = 0, (1 << 32) - 1, 1 << 31
    factors = [sum(int(part[i]) << 32 * j for j, part in enumerate(parts)) for i in range(len(numbers))]
    products = [n * f for n, f in zip(numbers, factors, strict=True)]
    down = wide.fraction(make_wide(numbers), [as_words(part) for part in parts])
    up = wide.fraction(make_wide(numbers), [as_words(part) for part in parts], round_up=True)
    assert as_ints(down) == [p >> 32 * words for p in products]
    assert as_ints(up) == [-(-p >> 32 * words) for p in products]


def test_ratio_and_ceil_ratio():
    rng = np.random.default_rng(3)
    count = rng.integers(1, 1 << 19, 500)
    mass = rng.integers(1, (1 << 28) + 1, 500)
    mass[:2], count[:2] = 1 << 28, ((1 << 19) - 1, 1)
    products = (count * mass).tolist()
    counts, masses = jnp.asarray(count, jnp.int32), jnp.asarray(mass, jnp.int32)
    assert wide.ratio(make_wide(products), counts).tolist() == mass.tolist()
    assert wide.ceil_ratio(make_wide(products), masses).tolist() == count.tolist()
    assert wide.ceil_ratio(
        make_wide([p - int(m) + 1 for p, m in zip(products, mass, strict=True)]), masses
    ).tolist() == (count.tolist())
    more = [p + 1 for p in products]
    assert wide.ceil_ratio(make_wide(more), masses).tolist() == (count + 1).tolist()


def test_threefry_vectors():
    """The known answers of the authors' Random123 library."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, want in cases:
        got = threefry_2x32(*(tuple(jnp.uint32(x) for x in pair) for pair in (key, counter)))
        assert tuple(int(x) for x in got) == want


def test_keys_order_as_the_numbers_and_come_back():
    rng = np.random.default_rng(4)
    largest = float(jnp.finfo(jnp.float32).max)
    x = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500), [0, largest, -largest]])
    x = jnp.sort(jnp.concatenate([jnp.asarray(x, jnp.float32), jnp.array([-jnp.inf, jnp.inf])]))
    keys = selection.key_of(x)
    assert ((keys[1:] > keys[:-1]) == (x[1:] > x[:-1])).all()
    np.testing.assert_array_equal(selection.value_of(keys), x)
    assert (selection.value_of(keys[:-1] + 1) > x[:-1]).all()
