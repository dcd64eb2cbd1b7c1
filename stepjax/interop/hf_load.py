"""Read public safetensors into a model, one parameter at a time."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from stepjax.config import ImageConfig, NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_layout import Tensor, config_from_hf, disk_key, step_vl_tensors
from stepjax.models.step_vl import StepVL, abstract_model


def fill(abstract: Any, tensors: Iterable[Tensor], read: Callable[[str], np.ndarray], keys: Iterable[str]) -> Any:
    """The model of `abstract`'s structure with the values that `read` returns for public keys.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or given twice; all of them are named.
    """
    keys = list(keys)
    by_disk_key = {disk_key(key): key for key in keys}
    repeated = [key for key in keys if by_disk_key[disk_key(key)] != key]
    by_name = {tensor.name: tensor for tensor in tensors}
    missing, misshapen, used = [], [], set()

    def public(key: str) -> np.ndarray | None:
        used.add(key)
        if key not in by_disk_key:
            missing.append(key)
            return None
        return read(by_disk_key[key])

    def parameter(path, leaf):
        tensor = by_name[parameter_name(path)]
        layers = range(leaf.shape[0]) if tensor.stacked else [None]
        values = []
        for layer in layers:
            key = tensor.key if layer is None else tensor.key.format(layer=layer)
            value = public(key)
            if value is None:
                continue
            expected = tensor.hf_shape(leaf.shape[1:] if tensor.stacked else leaf.shape)
            if value.shape != expected:
                misshapen.append(f"{key} {value.shape} (expected {expected})")
                continue
            values.append(tensor.to_ours(value))
        if missing or misshapen:
            return leaf
        value = np.stack(values) if tensor.stacked else values[0]
        return jnp.asarray(value, leaf.dtype)

    model = jax.tree_util.tree_map_with_path(parameter, abstract)
    unexpected = sorted(set(by_disk_key) - used)
    problems = [
        f"{label}: {', '.join(entries)}"
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
    return model


def parameter_name(path: tuple) -> str:
    """`decoder/blocks/mlp/up_kernel` from a tree path that ends in the Variable's own `value`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def load_hf(directory: str | Path, numerics: NumericsConfig | None = None) -> tuple[StepVL, ImageConfig]:
    """The model in a Hugging Face directory (`config.json` and `*.safetensors`), and its image configuration.

    Raises:
        CheckpointError: the directory or a file in it is not usable; what is wrong is named.
    """
    directory = Path(directory)
    try:
        config, images = config_from_hf(json.loads((directory / "config.json").read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory}/config.json cannot be read: {error}") from error
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors")
    where = {}
    try:
        for file in files:
            with safe_open(file, "np") as tensors:
                for key in tensors.keys():
                    if key in where:
                        raise CheckpointError(
                            f"{key} is in both {where[key].name} and {file.name} of {directory}; remove one of them"
                        )
                    where[key] = file

        def read(key: str) -> np.ndarray:
            with safe_open(where[key], "np") as tensors:
                return tensors.get_tensor(key)

        return fill(abstract_model(config, numerics), step_vl_tensors(config), read, where), images
    except SafetensorError as error:
        raise CheckpointError(f"{directory}: a safetensors file is damaged: {error}") from error
