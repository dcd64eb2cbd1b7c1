"""Chunks of a divided row: where they attend, that the work is equal, and what the devices exchange."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.config import MeshConfig
from stepjax.models import attention
from stepjax.models.attention import attend, flash_attention
from stepjax.models.context_parallel import balanced
from stepjax.sharding import make_mesh, spec

B, N, H = 1, 2, 4


def chunks_of_devices(parts, length):
    """(index of the first query, number of queries) of each call on each device, as the kernel would get them."""

    def of_device(q_BTNH):
        starts = []

        def part(q_BCNH, first, _):
            starts.append(jnp.stack([jnp.asarray(first, jnp.int32), q_BCNH.shape[1]]))
            return q_BCNH

        out_BTNH = balanced(part, q_BTNH, None, "length")
        return out_BTNH, jnp.stack(starts)[None]

    mesh = make_mesh(MeshConfig(fsdp=1, context=parts), jax.devices()[:parts])
    queries_BTNH = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32)[None, :, None, None], (B, length, N, H))
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            of_device, in_specs=spec(None, "length"), out_specs=(spec(None, "length"), spec("length")), check_vma=False
        )
        out_BTNH, starts = jax.jit(sharded)(queries_BTNH)
    np.testing.assert_array_equal(out_BTNH, queries_BTNH)  # every chunk is back in its place
    return np.asarray(starts)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_every_device_has_an_early_and_a_late_chunk_and_as_many_keys_to_see(parts):
    starts = chunks_of_devices(parts, 2 * parts * 4)
    assert sorted(starts[..., 0].ravel()) == list(range(0, 2 * parts * 4, 4))
    seen = (starts[..., 0] + starts[..., 1]).sum(axis=1)  # keys up to the last query of each chunk
    assert set(seen) == {seen[0]}


def test_a_length_that_does_not_halve_stays_in_place():
    starts = chunks_of_devices(2, 6)
    assert starts[:, :, 0].ravel().tolist() == [0, 3]


def by_xla(*args, implementation, **options):
    return flash_attention(*args, implementation="xla", **options)


def test_keys_are_gathered_once_and_their_gradients_scattered_in_their_own_size(monkeypatch):
    """No device holds the queries of others: besides the keys and values only halves of its own travel."""
    mesh = make_mesh(MeshConfig(fsdp=1, context=4), jax.devices()[:4])
    heads, kv_heads, length = 8, 2, 64

    def loss(q, k, v):
        out = attend(q, k, v, causal=True, length_axis="length", implementation="tpu")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct((B, length, n, H), jnp.float32) for n in (heads, kv_heads, kv_heads)]
    layout = jax.sharding.NamedSharding(mesh, spec("batch", "length", None, None))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for x in shapes]
    monkeypatch.setattr(attention, "flash_attention", by_xla)  # the kernel itself does not run on CPUs
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=layout).lower(*shapes).compile()
    text = compiled.as_text()
    moved = re.findall(
        r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    sizes = {}
    for shape, operation in moved:
        for dims in re.findall(r"f32\[([\d,]+)\]", shape):
            sizes.setdefault(operation, set()).add(int(np.prod([int(d) for d in dims.split(",")])))
    kv, q = B * length * kv_heads * H, B * length * heads * H
    assert sizes.get("all-gather") == {kv}
    assert sizes.get("reduce-scatter", set()) | sizes.get("all-reduce", set()) <= {kv, kv // 4}
    assert sizes.get("collective-permute") == {q // 8}
