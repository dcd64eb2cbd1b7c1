"""Loads stored tensors into a model's parameters, and reports all missing, unexpected and misshapen ones at once."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.errors import CheckpointError
from stepjax.interop.bounds import packed
from stepjax.interop.hf_layout import Tensor, disk_key
from stepjax.sharding import named_leaves, shardings

_NAMED = 100  # listed per kind of problem; a model of another size has thousands

Abstract = Mapping[str, jax.ShapeDtypeStruct]  # parameters by name


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """A public tensor and the parameter (or layer of a stacked one) that it fills."""

    key: str  # on disk
    tensor: Tensor
    layer: int | None
    shape: tuple[int, ...]  # of the public tensor


def places(tensors: Iterable[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """All public tensors of a model whose parameters have these shapes; layers of a parameter are consecutive."""
    found = []
    for tensor in tensors:
        shape = shapes[tensor.name]
        if tensor.stacked:
            public = tensor.hf_shape(shape[1:])
            found += [Place(tensor.key.format(layer=i), tensor, i, public) for i in range(shape[0])]
        else:
            found.append(Place(tensor.key, tensor, None, tensor.hf_shape(shape)))
    return found


def match(wanted: Iterable[Place], stored: Mapping[str, Shaped]) -> list[tuple[Place, str]]:
    """The places that a checkpoint fills, each with the tensor's key in the checkpoint.

    `stored` may use the keys of either public layout. Copies (`Tensor.is_copy`) are optional. Tables of rotary angles
    in old Llama checkpoints are ignored.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen or duplicated; names all of them.
    """
    keys = [key for key in stored if not key.endswith("rotary_emb.inv_freq")]
    by_disk_key = {disk_key(key): key for key in keys}
    repeated = [key for key in keys if by_disk_key[disk_key(key)] != key]
    missing, misshapen, found = [], [], []
    unexpected = dict.fromkeys(sorted(by_disk_key))
    for place in wanted:
        unexpected.pop(place.key, None)
        if place.key not in by_disk_key:
            missing += [] if place.tensor.is_copy else [place.key]
            continue
        key = by_disk_key[place.key]
        shape = tuple(stored[key].shape)
        if shape != place.shape:
            misshapen.append(f"{place.key} {shape} (expected {place.shape})")
        found.append((place, key))
    problems = [
        f"{label}: {_listed(entries)}"
        for label, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("in both public layouts", repeated),
        )
        if entries
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model; " + "; ".join(problems))
    return found


def _listed(entries: Collection[str]) -> str:
    more = len(entries) - _NAMED
    return ", ".join(islice(entries, _NAMED)) + (f" and {more:,} more" if more > 0 else "")


def abstract_parameters(model: Any, mesh: jax.sharding.Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and (with a mesh) sharding of every parameter of a model, by name, in order."""
    leaves = {name: jax.tree.leaves(leaf)[0] for name, leaf in named_leaves(model).items()}
    layouts = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(model, mesh))
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
        for (name, leaf), layout in zip(leaves.items(), layouts, strict=True)
    }


def fill(
    abstract: Any,
    tensors: Iterable[Tensor],
    read: Callable[[str], np.ndarray],
    stored: Mapping[str, Shaped],
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """Builds a model with the structure and dtypes of `abstract` from the tensors that `read` returns.

    With a mesh, each parameter is sharded before the next one is read.

    Raises:
        CheckpointError: as `match`, before anything is read; or a tied head differs from the embeddings.
        ConfigError: the mesh does not divide a parameter.
    """
    values = read_parameters(abstract_parameters(abstract, mesh), tensors, read, stored)
    return jax.tree.unflatten(jax.tree.structure(abstract), values.values())


def read_parameters(
    wanted: Abstract, tensors: Iterable[Tensor], read: Callable[[str], np.ndarray], stored: Mapping[str, Shaped]
) -> dict[str, jax.Array]:
    """The wanted parameters, by name, in order, sharded if `wanted` says so; see `fill`."""
    parts: dict[str, list[tuple[Place, str]]] = {}
    for place, key in match(places(tensors, {name: leaf.shape for name, leaf in wanted.items()}), stored):
        parts.setdefault(place.tensor.name, []).append((place, key))
    values = {}
    for name, leaf in wanted.items():
        value = np.empty(leaf.shape, leaf.dtype)
        for place, key in parts[name]:
            ours = packed(place.tensor.to_ours(read(key)), value.dtype)
            if place.tensor.is_copy:
                check_copy(key, ours, value)
            elif place.layer is None:
                value = ours.reshape(leaf.shape)
            else:
                value[place.layer] = ours
        if leaf.sharding is None:
            values[name] = jnp.asarray(value)
        else:
            values[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
    return values


def check_copy(key: str, values: np.ndarray, original: np.ndarray) -> None:
    """Raises CheckpointError if a tied head differs from its original."""
    if not np.array_equal(values, original):
        raise CheckpointError(f"{key} differs from the embeddings it is tied to: set tie_word_embeddings to false")
