"""The one table from logical axes to mesh axes. No other file names a mesh axis.

Every parameter carries the logical axes of its own dimensions (`nnx.Param(..., axes=("embed", "mlp"))`); dimensions in
front of them are layer stacks. Activations are pinned where it matters with `constrain`. The same code runs on one CPU
device and on a pod: on one device the mesh has one device and every rule still applies.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh that `config` asks for, over all devices by default."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(*logical_axes: str | None) -> PartitionSpec:
    """Partition of an array whose dimensions have these logical axes (None: not partitioned)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pin the layout of an activation to the mesh in scope; without a mesh (plain single-device use) return it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def _params(tree: Any) -> Iterator[tuple[str, nnx.Param]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def param_axes(param: nnx.Param) -> tuple[str, ...]:
    """Logical axes of a parameter, the layer stack included."""
    axes = param.get_metadata()["axes"]
    return ("layers",) * (len(param.shape) - len(axes)) + tuple(axes)


def model_shardings(model: Any, mesh: Mesh) -> Any:
    """Shardings of a model (or of an abstract one), in a tree of its structure.

    Raises:
        ConfigError: a dimension is not divisible by the mesh axes it is spread over; the parameter is named.
    """
    for name, param in _params(model):
        for dim, axis in zip(param.shape, param_axes(param), strict=True):
            mesh_axes = RULES[axis]
            names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
            parts = int(np.prod([mesh.shape[n] for n in names], dtype=int))
            if dim % parts:
                raise ConfigError(
                    f"parameter {name} has {dim} entries along {axis!r}, which do not divide over the {parts} devices of "
                    f"mesh axes {names}; make those mesh axes smaller"
                )

    def sharding(param):
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(*param_axes(param))), param)

    return jax.tree.map(sharding, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
