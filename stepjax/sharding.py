"""The one table from logical axes to mesh axes. No other file names a mesh axis.

Every parameter carries the logical axes of its dimensions (`nnx.Param(..., axes=("embed", "mlp"))`); leading dimensions
without one are layer stacks. `constrain` pins activations where it matters. The same code runs on one CPU device and on
a pod: a single device is a 1-device mesh, and every rule applies to it.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from stepjax.config import BatchConfig, MeshConfig
from stepjax.errors import ConfigError

MESH_AXES = ("slice", "data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations
    "batch": ("slice", "data", "fsdp"),  # rows of the batch, with their pixels
    "length": "context",
    "row_views": "context",  # of one row
    "views": ("slice", "data", "fsdp", "context"),  # of all rows: devices that share a row split its views
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
    "gate_up": None,
    "rank": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh of `config`, over all devices by default.

    Neighbours along an axis are physically close, closest along the last axis. The slice axis spans the slices of a
    multi-slice job.

    Raises:
        ConfigError: the axes do not multiply to the number of devices, or `slice` is not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and len(slices) != shape[0]:
        raise ConfigError(
            f"mesh.slice={shape[0]}: the devices belong to {len(slices)} slice(s); set mesh.slice to that"
        )
    if len(slices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (shape[0], 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        # Within one slice (or a simulation of several) all axes share the same links.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes (None: not partitioned)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in logical_axes))


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform of the current mesh, or JAX's default platform without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Number of shards of a logical axis on a mesh (by default the current one); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[mesh_axis] for mesh_axis in _mesh_axes(axis))


def axis_index(axis: str) -> int | jax.Array:
    """Inside `jax.shard_map`: which shard of a logical axis this device has."""
    return jax.lax.axis_index(_mesh_axes(axis)) if axis_size(axis) > 1 else 0


def ppermute(x: jax.Array, axis: str, destinations: Sequence[int]) -> jax.Array:
    """Inside `jax.shard_map`: sends shard i of a logical axis to shard destinations[i]."""
    return jax.lax.ppermute(x, _mesh_axes(axis), list(enumerate(destinations)))


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Inside `jax.shard_map`: concatenates the shards of a logical axis along `dim`. Its gradient reduce-scatters."""
    return jax.lax.all_gather(x, _mesh_axes(axis), axis=dim, tiled=True) if axis_size(axis) > 1 else x


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pin the sharding of an activation on the current mesh; without a mesh return it unchanged."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
    """Logical axes of a parameter, including the layer stack."""
    axes = param.get_metadata()["axes"]
    return ("layers",) * (len(param.shape) - len(axes)) + tuple(axes)


def parameter_name(path: tuple) -> str:
    """`decoder/blocks/mlp/up_kernel`, from the tree path of a parameter or of its array (".../value")."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, in tree order; an `nnx.Variable` is one leaf and keeps its metadata."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)
    pairs = [(parameter_name(path), leaf) for path, leaf in pairs if jax.tree.leaves(leaf)]
    named = dict(pairs)
    assert len(named) == len(pairs), "two leaves share a name"
    return named


def matching(pattern: str, names: list[str], field: str) -> list[str]:
    """The parameter names that contain a match of a regular expression, which is an option named `field`.

    Raises:
        ConfigError: the pattern is malformed, or none do.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field} pattern {pattern!r} is not a regular expression: {error}") from error
    matches = [name for name in names if regex.search(name)]
    if matches:
        return matches
    top_level = _unique(name.split("/")[0] for name in names)
    parts = _unique(part for name in names for part in name.split("/"))
    words = re.findall(r"\w+", pattern)
    close = _unique(
        match for word in words if word not in parts for match in difflib.get_close_matches(word, parts, n=2)
    )
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    raise ConfigError(
        f"{field} pattern {pattern!r} matches no parameter name.{hint} Names start with {', '.join(top_level)}."
    )


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a model or a train state (abstract or not), as a tree of the same structure.

    Parameters follow the table, as do optimizer moments, which keep their parameter's axes. Other arrays are
    replicated.

    Raises:
        ConfigError: a parameter's dimension is not divisible by its mesh axes.
    """

    def sharding(path, node):
        if not is_param(node):
            return NamedSharding(mesh, PartitionSpec())
        axes = param_axes(node)
        for dim, axis in zip(node.shape, axes, strict=True):
            _check_divides(parameter_name(path), dim, axis, mesh)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(*axes)), node)

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=is_param)


def _mesh_axes(axis: str) -> tuple[str, ...]:
    rule = RULES[axis]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def _check_divides(name: str, dim: int, axis: str, mesh: Mesh) -> None:
    parts = axis_size(axis, mesh)
    if dim % parts:
        raise ConfigError(
            f"parameter {name} has {dim} entries along {axis!r}, not divisible by the {parts} devices of mesh axes "
            f"{_mesh_axes(axis)}; make those mesh axes smaller"
        )


def check_batch(batch: BatchConfig, mesh: Mesh) -> None:
    """
    Raises:
        ConfigError: the rows of a micro-batch are not divisible by the devices that share the batch, or the tokens of a
            row by the devices that share a row.
    """
    parts = axis_size("batch", mesh)
    if batch.micro_rows % parts:
        raise ConfigError(
            f"batch.rows={batch.rows}: the rows of each of batch.accumulation={batch.accumulation} micro-batches must "
            f"be divisible by {parts} devices (mesh.slice x mesh.data x mesh.fsdp)"
        )
    parts = axis_size("length", mesh)
    if batch.tokens % parts:
        raise ConfigError(f"batch.tokens={batch.tokens}: must be divisible by {parts} devices (mesh.context)")


def check_heads_only(mesh: Mesh) -> None:
    """
    Raises:
        ConfigError: the mesh has several devices along an axis other than the heads' axis. All devices of an engine
            share one batch; for more batches, run one engine per part of the mesh.
    """
    other = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in _mesh_axes("heads")}
    if other:
        raise ConfigError(f"mesh {other}: an engine is sharded over {_mesh_axes('heads')} only; set the others to 1")


def data_parts(mesh: Mesh) -> list[Mesh]:
    """Splits the mesh along the batch axes: one mesh of the other axes for each part."""
    rows = MESH_AXES.index("context")
    grids = mesh.devices.reshape(-1, *[1] * rows, *mesh.devices.shape[rows:])
    return [Mesh(grid, mesh.axis_names, axis_types=(AxisType.Auto,) * len(MESH_AXES)) for grid in grids]


def engines_mesh(devices: Iterable[Any], tensor: int) -> Mesh:
    """The devices with those of an engine beside each other; `data_parts` gives the mesh of each.

    Raises:
        ConfigError: `rollout.tensor` does not divide the devices, or the devices of an engine belong to several
            processes.
    """
    # By process: neighbours on the torus, which `make_mesh` would choose, may belong to several.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    if len(ordered) % tensor:
        raise ConfigError(f"rollout.tensor={tensor}: must divide the {len(ordered)} devices")
    shape = MeshConfig(data=-1, fsdp=1, tensor=tensor).shape(len(ordered))
    mesh = Mesh(np.array(ordered).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    for part in data_parts(mesh):
        owners = {device.process_index for device in part.devices.flat}
        if len(owners) > 1:
            raise ConfigError(f"rollout.tensor={tensor}: an engine would span processes {sorted(owners)}; lower it")
    return mesh


def rows_here(mesh: Mesh, num_rows: int) -> list[int]:
    """The rows of the global batch that this process feeds to its devices, in order.

    Processes whose devices share rows (context or tensor axes that span hosts) feed the same rows.
    """
    layout = NamedSharding(mesh, spec("batch"))
    indices = layout.addressable_devices_indices_map((num_rows,)).values()
    parts = {index[0].indices(num_rows) for index in indices if index is not None}
    return [row for part in sorted(parts) for row in range(*part)]
