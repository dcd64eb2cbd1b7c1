"""The codec of a trained run, frozen: what its device and its server must have in common, and the device's program.

See `stepjax.tofc.device` for the files. A frame carries the codec's digest, which covers the encoder's parameters and
the sizes of its views, so that no server takes it for that of another encoder.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from stepjax.config import RunConfig
from stepjax.errors import CheckpointError
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.models.step_vl import StepVL, abstract_model
from stepjax.sharding import named_leaves
from stepjax.tofc import device
from stepjax.tofc.device import CODEC, DEVICE, DIRECTORY, PLATFORMS, codec_directory
from stepjax.tofc.hyperprior import freeze
from stepjax.tofc.tables import Tables
from stepjax.training.checkpoint import MODEL

_OF_DEVICE = re.compile(r"vision/|projector/down|tofc/down")  # the parameters that a device needs


def write_codec(model: StepVL, config: RunConfig) -> list[str]:
    """Freezes the codec of a run that has ended, and writes both files beside its checkpoints; says so in lines.

    Every process calls this; the first writes.

    Raises:
        ConfigError: a parameter of the codec is not finite.
        CheckpointError: the run has no checkpoint.
    """
    source = OrbaxDirectory(f"{config.out}/{config.name}")
    of_all = {name: multihost_utils.process_allgather(leaf[...], tiled=True) for name, leaf in _wanted(model).items()}
    if jax.process_index() > 0:
        return []
    assert model.tofc is not None
    host: Any = jax.tree.unflatten(
        jax.tree.structure(model.tofc.hyperprior),
        [jnp.asarray(of_all[f"tofc/hyperprior/{name}"]) for name in named_leaves(model.tofc.hyperprior)],
    )
    tables = freeze(host, origin=_origin(source.meta))
    parameters = {name: np.asarray(array) for name, array in of_all.items() if _OF_DEVICE.match(name)}
    images = dataclasses.asdict(config.images)
    del images["most_tokens"]
    packed = device.pack(parameters, device_programs(config), images, tables)
    directory = source.path / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    tables.save(directory / CODEC)
    (directory / DEVICE).write_bytes(packed)
    codec_bytes = sum(array.nbytes for array in tables.arrays.values())
    return [
        f"codec {tables.id} (SHA-256 {tables.sha256}) in {directory}: {codec_bytes / 1e6:.1f} MB, and "
        f"{len(packed) / 1e6:.1f} MB for devices"
    ]


def load_codec(source: OrbaxDirectory) -> Tables:
    """The frozen codec of a run.

    Raises:
        CheckpointError: the run has none, or was trained on since.
    """
    if source.run is None or source.run.model.tofc is None:
        raise CheckpointError(f"{source.path} has no codec: train one with `stepjax tofc train`")
    directory = source.step.parent.parent
    tables = Tables.load(codec_directory(str(directory)) / CODEC)
    if tables.origin != _origin(source.meta):
        raise CheckpointError(
            f"{directory / DIRECTORY / CODEC} is not that of {source.step}: run `stepjax tofc train` to the end again"
        )
    return tables


def device_programs(config: RunConfig) -> dict[str, bytes]:
    """The device's program for each size of view, for any number of views; see `device.pack`."""
    numerics = dataclasses.replace(config.numerics, attention="xla", remat="none", encoder_remat=None)
    abstract = abstract_model(config.model, numerics)
    names, structure = list(named_leaves(abstract)), jax.tree.structure(abstract)
    shapes = dict(zip(names, jax.tree.leaves(abstract), strict=True))
    wanted = {name: shape for name, shape in shapes.items() if _OF_DEVICE.match(name)}

    def run(parameters: dict[str, jax.Array], views_MHWC: jax.Array) -> jax.Array:
        whole: Any = jax.tree.unflatten(structure, [parameters.get(name) for name in names])
        return whole.merged_views(views_MHWC)

    exports = {}
    for kind, side in (("crop", config.images.crop_size), ("global", config.images.global_size)):
        (views,) = jax.export.symbolic_shape("m")
        pixels = jax.ShapeDtypeStruct((views, side, side, 3), jnp.float32)
        exports[kind] = bytes(jax.export.export(jax.jit(run), platforms=PLATFORMS)(wanted, pixels).serialize())
    return exports


def _wanted(model: StepVL) -> dict[str, Any]:
    is_wanted = re.compile(f"{_OF_DEVICE.pattern}|tofc/hyperprior")
    return {name: leaf for name, leaf in named_leaves(model).items() if is_wanted.match(name)}


def _origin(meta: Mapping[str, Any]) -> str:
    """A digest of what decides how features come about: parameters of encoder and codec, and the sizes of views.

    The decoder is not among them: one that is trained further reads the frames of the same devices.
    """
    needed = re.compile(f"{re.escape(MODEL)}({_OF_DEVICE.pattern}|tofc/)")
    arrays = {name: digest for name, digest in meta["arrays"].items() if needed.match(name)}
    model = meta["config"]["model"]
    parts = arrays, model["vision"], model["tofc"], meta["config"]["images"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
