"""Digests of arrays: of the values alone, however they are cut, and changed by any bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stepjax.training.digests import _on_devices, add_up, digests, part_digest

SHAPES = [(), (1,), (0, 3), (70_000,), (3, 1000, 70), (70_000, 3), (2, 70_000), (2, 3, 4, 5)]


def values(shape, dtype):
    return np.asarray(np.random.default_rng(0).normal(size=shape) * 50).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_host_and_device_agree_on_any_shape_and_in_any_parts(dtype):
    arrays = {str(shape): values(shape, dtype) for shape in SHAPES}
    found = digests({name: jnp.asarray(x) for name, x in arrays.items()})
    assert list(found.values()) == [int(x) for x in _on_devices([jnp.asarray(x) for x in arrays.values()])]
    for x, digest in zip(arrays.values(), found.values(), strict=True):
        assert part_digest(x, (0,) * x.ndim, x.shape) == digest
        for axis in range(x.ndim):
            parts = np.array_split(x, 3, axis)
            starts = np.cumsum([0, *(part.shape[axis] for part in parts)])
            at = [tuple(int(start) * (i == axis) for i in range(x.ndim)) for start in starts]
            sums = [part_digest(part, start, x.shape) for part, start in zip(parts, at, strict=False)]
            assert add_up(sums) == digest


@pytest.mark.parametrize("spec", [P(), P("a", "b"), P(("a", "b")), P(None, "a")])
def test_shardings_do_not_change_it(spec):
    x = values((16, 8), "float32")
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("a", "b"))
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    assert digests({"x": sharded}) == digests({"x": jnp.asarray(x)}) == {"x": int(_on_devices([sharded])[0])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_any_bit_and_any_exchange_changes_it(dtype):
    x = values((5, 7), "bfloat16").astype(jnp.dtype(dtype))  # the low bits of wide types are zero
    digest = part_digest(x, (0, 0), x.shape)
    data = bytearray(x.tobytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(data), x.dtype).reshape(x.shape)
        assert part_digest(changed, (0, 0), x.shape) != digest
        data[bit // 8] ^= 1 << bit % 8
    for other in (
        x[::-1],
        x[:, ::-1],
        np.roll(x, 1),
        np.zeros_like(x),
        np.where(np.arange(7) < 3, x, 0).astype(x.dtype),
    ):
        assert part_digest(other, (0, 0), x.shape) != digest
