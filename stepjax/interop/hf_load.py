"""Public safetensors into a model, one parameter at a time."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ImageConfig, NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.arrays import packed
from stepjax.interop.hf_directory import HFDirectory
from stepjax.interop.hf_layout import Tensor
from stepjax.interop.hf_match import Place, Shaped, match, places
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL
from stepjax.sharding import parameter_name, shardings


def fill(
    abstract: Any,
    tensors: Iterable[Tensor],
    read: Callable[[str], np.ndarray],
    stored: Mapping[str, Shaped],
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """The model of `abstract`'s structure and types with the values that `read` returns for the keys of `stored`.

    With a mesh, every parameter goes to its sharding before the next one is read.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or given twice; all of them are named, and
            nothing has been read.
        ConfigError: a parameter does not divide over the mesh.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    layouts = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(abstract, mesh))
    wanted = {
        parameter_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
        for (path, leaf), layout in zip(leaves, layouts, strict=True)
    }
    return jax.tree.unflatten(structure, read_parameters(wanted, tensors, read, stored).values())


def read_parameters(
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[Tensor],
    read: Callable[[str], np.ndarray],
    stored: Mapping[str, Shaped],
) -> dict[str, jax.Array]:
    """The wanted parameters by name, in order; each goes to its sharding, if it has one, before the next one is read.

    Raises:
        CheckpointError: as `fill`.
    """
    parts: dict[str, list[tuple[Place, str]]] = {}
    for place, key in match(places(tensors, {name: leaf.shape for name, leaf in wanted.items()}), stored):
        parts.setdefault(place.tensor.name, []).append((place, key))
    values = {}
    for name, leaf in wanted.items():
        value = _parameter(parts[name], leaf, read)
        if leaf.sharding is None:
            values[name] = jnp.asarray(value)
        else:
            values[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
    return values


def _parameter(parts: list[tuple[Place, str]], leaf: Any, read: Callable[[str], np.ndarray]) -> np.ndarray:
    value = np.empty(leaf.shape, leaf.dtype)
    for place, key in parts:
        ours = packed(place.tensor.to_ours(read(key)), value.dtype)
        if place.tensor.is_copy:
            check_copy(key, ours, value)
        elif place.layer is None:
            value = ours.reshape(leaf.shape)
        else:
            value[place.layer] = ours
    return value


def check_copy(key: str, values: np.ndarray, original: np.ndarray) -> None:
    """Raises CheckpointError where a tied head is not what it is tied to."""
    if not np.array_equal(values, original):
        raise CheckpointError(f"{key} differs from the embeddings that it is tied to: set tie_word_embeddings to false")


def read_hf(
    directory: HFDirectory, numerics: NumericsConfig | None = None, mesh: jax.sharding.Mesh | None = None
) -> StepVL | Qwen3:
    """The model of an opened directory; see `fill`."""
    spec = directory.spec
    return fill(spec.abstract(numerics), spec.tensors(), directory.read, directory.entries, mesh)


def load_hf(directory: str | Path, numerics: NumericsConfig | None = None) -> tuple[StepVL, ImageConfig]:
    """The STEP3-VL model in a Hugging Face directory, and its image configuration. `stepjax.load` reads more kinds.

    Raises:
        CheckpointError: the directory or a file in it is not usable; what is wrong is named.
    """
    source = HFDirectory(directory)
    if source.spec.images is None:
        raise CheckpointError(f"{directory} holds a text model: load it with stepjax.load")
    model = read_hf(source, numerics)
    assert isinstance(model, StepVL)
    return model, source.spec.images
