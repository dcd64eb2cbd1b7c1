"""The one table from logical axes to mesh axes. No other file names a mesh axis.

Every parameter carries the logical axes of its own dimensions (`nnx.Param(..., axes=("embed", "mlp"))`); dimensions in
front of them are layer stacks. Activations are pinned where it matters with `constrain`. The same code runs on one CPU
device and on a pod: on one device the mesh has one device and every rule still applies.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from stepjax.config import MeshConfig
from stepjax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations
    "batch": ("data", "fsdp"),  # rows of the batch, and with them their pixels
    "length": "context",
    "act_embed": None,
    # Parameters: one dimension over fsdp (gathered layer by layer), one over tensor
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    "pixels": None,
    "positions": None,
    "qkv": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh that `config` asks for, over all devices by default."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(*logical_axes: str | None) -> PartitionSpec:
    """Partition of an array whose dimensions have these logical axes (None: not partitioned)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in logical_axes))


def target_platform() -> str:
    """What the computation in scope is compiled for, "cpu", "gpu" or "tpu": by the mesh, without one JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def part_index(axis: str) -> int | jax.Array:
    """Inside `jax.shard_map`: which part of a logical axis this device has."""
    mesh_axes = _mesh_axes(axis)
    return jax.lax.axis_index(mesh_axes) if num_parts(axis, jax.sharding.get_abstract_mesh()) > 1 else 0


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pin the layout of an activation to the mesh in scope; without a mesh (plain use) return it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
    """Logical axes of a parameter, the layer stack included."""
    axes = param.get_metadata()["axes"]
    return ("layers",) * (len(param.shape) - len(axes)) + tuple(axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a model, a train state, or the abstract form of one, in a tree of its structure.

    Parameters, and optimizer moments that keep their parameter's axes, go by the table; other arrays are replicated.

    Raises:
        ConfigError: a dimension is not divisible by the mesh axes it is spread over; the parameter is named.
    """

    def sharding(path, node):
        if not _is_param(node):
            return NamedSharding(mesh, PartitionSpec())
        axes = param_axes(node)
        for dim, axis in zip(node.shape, axes, strict=True):
            _check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), dim, axis, mesh)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(*axes)), node)

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=_is_param)


def _mesh_axes(axis: str) -> tuple[str, ...]:
    rule = RULES[axis]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def num_parts(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a mesh cuts a logical axis."""
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in _mesh_axes(axis))


def _check_divides(name: str, dim: int, axis: str, mesh: Mesh) -> None:
    parts = num_parts(axis, mesh)
    if dim % parts:
        raise ConfigError(
            f"parameter {name} has {dim} entries along {axis!r}, which do not divide over the {parts} devices of "
            f"mesh axes {_mesh_axes(axis)}; make those mesh axes smaller"
        )
