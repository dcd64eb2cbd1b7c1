"""Load-balanced causal attention of a row sharded over several devices.

Legend: B rows, T query tokens of a device, N query heads, H head dim.

Early queries see few keys, late ones many: if c devices hold consecutive parts, the last has nearly twice the mean work
and all others wait for it. So the row is cut into 2c chunks, and during attention device i holds chunks i and
2c - 1 - i. Two ppermutes move the chunks into place and two move them back; the keys are all-gathered anyway, and are
a quarter as wide as the queries (grouped queries). Outside attention the layout stays consecutive.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from stepjax.sharding import axis_index, axis_size, ppermute

# (a chunk's queries, index of the first one in the row, their segment ids) -> attention output
PartAttention = Callable[[jax.Array, int | jax.Array, jax.Array | None], jax.Array]


def balanced(attend: PartAttention, q_BTNH: jax.Array, ids_BT: jax.Array | None, axis: str) -> jax.Array:
    """Attention of this device's queries, [B, T, N, H]. Call it inside `jax.shard_map` over the sharded axis."""
    parts, length = axis_size(axis), q_BTNH.shape[1]
    if parts % 2 or length % 2:
        # Odd counts: no two permutations give every device an early and a late chunk.
        return attend(q_BTNH, axis_index(axis) * length, ids_BT)

    half, me = length // 2, axis_index(axis)
    early, late = me, 2 * parts - 1 - me
    # First halves are the even chunks: those in the first half of the row go to even devices, the others to odd ones.
    results = []
    for which, chunk in ((0, jnp.where(me % 2 == 0, early, late)), (1, jnp.where(me % 2 == 0, late, early))):
        there = [_place(2 * device + which, parts) for device in range(parts)]
        back = [there.index(device) for device in range(parts)]
        own = slice(which * half, (which + 1) * half)
        q_BCNH = ppermute(q_BTNH[:, own], axis, there)
        ids_BC = None if ids_BT is None else ppermute(ids_BT[:, own], axis, there)
        results.append(ppermute(attend(q_BCNH, chunk * half, ids_BC), axis, back))
    return jnp.concatenate(results, axis=1)


def _place(chunk: int, parts: int) -> int:
    """The device that computes a chunk's attention."""
    return chunk if chunk < parts else 2 * parts - 1 - chunk
