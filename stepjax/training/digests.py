"""Digests of arrays, to verify that an array reads back as it was saved.

A digest is the sum, modulo 2^32, of all words of an array, each times an odd number derived from its index. It always
detects one changed word, and misses any other change with probability 2^-32. Parts of an array can be summed in any
order and place, so the digest depends only on the values, never on shardings or chunks.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

_ODD = 0x9E3779B1  # 2^32 / the golden ratio: spreads indices over all bits
_MODULUS = 1 << 32
_PIECE = 1 << 16  # words at a time on the host: fits its cache


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The digest of every array. All processes must call this, and get the same digests.

    Computed on the arrays' devices in one pass over their memory; only the sums go to the host.
    """
    values = list(arrays.values())
    if all(device.platform == "cpu" for array in values for device in array.sharding.device_set):
        # XLA compiles this to slow loops on CPUs; NumPy reads the same memory.
        sums = np.array([_here(array) for array in values], np.uint32)
        if jax.process_count() > 1:
            sums = np.asarray(multihost_utils.process_allgather(sums)).sum(axis=0, dtype=np.uint32)
    else:
        sums = jax.device_get(_on_devices(values))
    return {name: int(total) for name, total in zip(arrays, sums, strict=True)}


def part_digest(values: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The contribution, modulo 2^32, of the part starting at `start` in an array of shape `shape`."""
    words = _words(values)
    strides = _strides((*shape, *words.shape[values.ndim :]))
    return _sum(words, sum(a * b for a, b in zip(start, strides, strict=False)), strides) % _MODULUS


def add_up(parts: list[int]) -> int:
    """The digest of an array from its parts' contributions."""
    return sum(parts) % _MODULUS


def _here(array: jax.Array) -> int:
    """The contribution of this process's shards, counting each replicated shard once."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    starts = [tuple(index.indices(n)[0] for index, n in zip(s.index, array.shape, strict=True)) for s in shards]
    return add_up([part_digest(np.asarray(s.data), a, array.shape) for s, a in zip(shards, starts, strict=True)])


@jax.jit
def _on_devices(arrays: list[jax.Array]) -> list[jax.Array]:
    def digest(array: jax.Array) -> jax.Array:
        array = array.astype(jnp.uint8) if array.dtype == bool else array
        words = jax.lax.bitcast_convert_type(array, f"uint{8 * min(4, array.dtype.itemsize)}").astype(jnp.uint32)
        index = jnp.uint32(0)
        for axis, stride in enumerate(_strides(words.shape)):
            index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % _MODULUS)
        return jnp.sum(_weighed(words, index * np.uint32(_ODD)), dtype=jnp.uint32)

    return [digest(array) for array in arrays]


def _weighed(words: Any, spread: Any) -> Any:
    # Fold the high half into the low one, which is zero for bfloat16 values held in float32.
    return (words ^ (words >> np.uint32(16))) * (spread | np.uint32(1))


def _words(values: np.ndarray) -> np.ndarray:
    """The bits as words of at most 32 bits; wider values become two words along a new last axis."""
    if values.dtype.itemsize <= 4:
        return values.view(f"u{values.dtype.itemsize}")
    return np.ascontiguousarray(values)[..., None].view(np.uint32)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def _sum(words: np.ndarray, base: int, strides: tuple[int, ...]) -> int:
    if words.size > _PIECE:
        rows = _PIECE // words[0].size
        if not rows:
            return sum(_sum(row, base + i * strides[0], strides[1:]) for i, row in enumerate(words))
        if rows < len(words):
            starts = range(0, len(words), rows)
            return sum(_sum(words[i : i + rows], base + i * strides[0], strides) for i in starts)
    spread = _spread(words.shape, strides) + np.uint32(base * _ODD % _MODULUS)
    return int(np.sum(_weighed(words.astype(np.uint32, copy=False), spread), dtype=np.uint32))


@functools.lru_cache(maxsize=16)
def _spread(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Every index relative to the first, times `_ODD`."""
    index = np.zeros(shape, np.uint32)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        along = np.arange(size, dtype=np.uint64) * np.uint64(stride % _MODULUS) % np.uint64(_MODULUS)
        index += along.astype(np.uint32).reshape(-1, *[1] * (len(shape) - axis - 1))
    return index * np.uint32(_ODD)
