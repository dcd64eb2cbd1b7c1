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
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from stepjax.config import MeshConfig
from stepjax.errors import ConfigError

MESH_AXES = ("slice", "data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations
    "batch": ("slice", "data", "fsdp"),  # rows of the batch, and with them their pixels
    "length": "context",
    "row_views": "context",  # of one row
    "views": ("slice", "data", "fsdp", "context"),  # of all rows: devices that share a row share its views
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
    """The device mesh that `config` asks for, over all devices by default.

    Neighbours along an axis are near each other in the hardware, the last axis the nearest; the slice axis goes over
    the slices of a multi-slice job.

    Raises:
        ConfigError: the axes do not multiply to the number of devices, or `slice` is not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and len(slices) != shape[0]:
        raise ConfigError(f"mesh.slice={shape[0]}: the devices are of {len(slices)} slice(s); set mesh.slice to that")
    if len(slices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (shape[0], 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        # Where there is one slice, or a simulation of several, the axes share its wires.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(*logical_axes: str | None) -> PartitionSpec:
    """Partition of an array whose dimensions have these logical axes (None: not partitioned)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in logical_axes))


def target_platform() -> str:
    """What the computation in scope is compiled for, "cpu", "gpu" or "tpu": by the mesh, without one JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parts_of(axis: str) -> int:
    """Into how many parts the mesh in scope cuts a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_parts(axis, mesh)


def part_index(axis: str) -> int | jax.Array:
    """Inside `jax.shard_map`: which part of a logical axis this device has."""
    return jax.lax.axis_index(_mesh_axes(axis)) if parts_of(axis) > 1 else 0


def exchange(x: jax.Array, axis: str, destinations: Sequence[int]) -> jax.Array:
    """Inside `jax.shard_map`: part i of a logical axis goes to part destinations[i]."""
    return jax.lax.ppermute(x, _mesh_axes(axis), list(enumerate(destinations)))


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Inside `jax.shard_map`: all parts of a logical axis, joined along `dim`; gradients are summed and given back."""
    return jax.lax.all_gather(x, _mesh_axes(axis), axis=dim, tiled=True) if parts_of(axis) > 1 else x


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pin the layout of an activation to the mesh in scope; without a mesh (plain use) return it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
    """Logical axes of a parameter, the layer stack included."""
    axes = param.get_metadata()["axes"]
    return ("layers",) * (len(param.shape) - len(axes)) + tuple(axes)


def parameter_name(path: tuple) -> str:
    """`decoder/blocks/mlp/up_kernel`: of a parameter's path in a tree, or of its array's, which ends in `value`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, in tree order; an `nnx.Variable` is one leaf and keeps its metadata."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)
    pairs = [(parameter_name(path), leaf) for path, leaf in pairs if jax.tree.leaves(leaf)]
    named = dict(pairs)
    assert len(named) == len(pairs), "two leaves share a name"
    return named


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a model, a train state, or the abstract form of one, in a tree of its structure.

    Parameters, and optimizer moments that keep their parameter's axes, go by the table; other arrays are replicated.

    Raises:
        ConfigError: a dimension is not divisible by the mesh axes it is spread over; the parameter is named.
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


def num_parts(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a mesh cuts a logical axis."""
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in _mesh_axes(axis))


def check_heads_only(mesh: Mesh) -> None:
    """
    Raises:
        ConfigError: the mesh has devices along another axis than that of the heads. An engine decodes one batch, which
            all its devices share; for more batches, make an engine on a part of the devices each.
    """
    other = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in _mesh_axes("heads")}
    if other:
        raise ConfigError(f"mesh {other}: an engine spreads over {_mesh_axes('heads')} alone; set the others to 1")


def data_parts(mesh: Mesh) -> list[Mesh]:
    """The parts of a mesh along its axes for rows of the batch, each a mesh of all the other axes."""
    rows = MESH_AXES.index("context")
    grids = mesh.devices.reshape(-1, *[1] * rows, *mesh.devices.shape[rows:])
    return [Mesh(grid, mesh.axis_names, axis_types=(AxisType.Auto,) * len(MESH_AXES)) for grid in grids]


def rows_here(mesh: Mesh, num_rows: int) -> list[int]:
    """The rows of the global batch that this process's devices hold: what it has to feed them, in this order.

    Processes whose devices share rows (context and tensor axes that cross hosts) each feed the same ones.
    """
    layout = NamedSharding(mesh, spec("batch"))
    indices = layout.addressable_devices_indices_map((num_rows,)).values()
    parts = {index[0].indices(num_rows) for index in indices if index is not None}
    return [row for part in sorted(parts) for row in range(*part)]


def _check_divides(name: str, dim: int, axis: str, mesh: Mesh) -> None:
    parts = num_parts(axis, mesh)
    if dim % parts:
        raise ConfigError(
            f"parameter {name} has {dim} entries along {axis!r}, which do not divide over the {parts} devices of "
            f"mesh axes {_mesh_axes(axis)}; make those mesh axes smaller"
        )
