"""The device's end: an image to a frame, by a compiled encoder. It imports JAX, NumPy and Pillow, and no model code.

Legend: M views, S side of a view, Q features of a view, Z channels.

A run leaves two files for its device, in RUN/tofc, which can be copied there alone:

    codec.safetensors     the entropy model (`stepjax.tofc.tables`), which the server has too
    device.safetensors    the encoder's parameters; for views of each size the program from pixels to merged features,
                          as StableHLO for CPUs, GPUs and TPUs (`jax.export`); the sizes of views
"""

import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stepjax.config import ImageConfig
from stepjax.errors import CheckpointError
from stepjax.processing.images import make_views
from stepjax.tofc import codec
from stepjax.tofc.tables import Tables

DIRECTORY, CODEC, DEVICE = "tofc", "codec.safetensors", "device.safetensors"
FORMAT = "1"
PLATFORMS = ("cpu", "cuda", "tpu")
_MOST_VIEWS = 8  # of a call; their number is a power of two, so that few shapes are compiled
_PARAMETER, _PROGRAM = "parameter/", "program/"


class Encoded(NamedTuple):
    """A frame, and the milliseconds that it took."""

    frame: bytes
    tiles: list[np.ndarray]  # the features that were coded
    encoder: float  # views cut, encoded and merged
    coder: float  # features to bytes


def codec_directory(run: str | Path) -> Path:
    """Where the files of a run are, or of a copy of them.

    Raises:
        CheckpointError: it has none.
    """
    path = Path(run).expanduser()
    found = next((each for each in (path / DIRECTORY, path) if (each / CODEC).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{run} has no {DIRECTORY}/{CODEC}: `stepjax tofc train` writes it when the run has ended"
        )
    return found


def pack(
    parameters: Mapping[str, np.ndarray], programs: Mapping[str, bytes], images: Mapping[str, Any], tables: Tables
) -> bytes:
    """The file of a device.

    Args:
        programs: "crop" and "global", serialised exports of (parameters, pixels [M, S, S, 3]) to features [M, Q, Z].
        images: the fields of the `ImageConfig`.
    """
    arrays = {_PARAMETER + name: np.ascontiguousarray(array) for name, array in parameters.items()}
    arrays |= {_PROGRAM + name: np.frombuffer(program, np.uint8) for name, program in programs.items()}
    checksum = str(_checksum(arrays))
    return save(arrays, {"format": FORMAT, "codec": tables.sha256, "images": json.dumps(images), "crc32": checksum})


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), crc))
    return crc


class Device:
    """The encoder and the codec of a run.

    Raises:
        CheckpointError: a file is missing or damaged, or they are of different runs.
    """

    def __init__(self, run: str | Path):
        directory = codec_directory(run)
        self.tables = Tables.load(directory / CODEC)
        path = directory / DEVICE
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; copy it again") from None
        if metadata.get("format") != FORMAT or metadata.get("codec") != self.tables.sha256:
            raise CheckpointError(f"{path}: does not go with {CODEC} beside it; copy both from one run again")
        if metadata.get("crc32") != str(_checksum(arrays)):
            raise CheckpointError(f"{path}: its checksum is not that of its contents; copy it again")
        self.images = ImageConfig(**{name: _hashable(value) for name, value in json.loads(metadata["images"]).items()})
        self._parameters = {
            name.removeprefix(_PARAMETER): jax.device_put(array)
            for name, array in arrays.items()
            if name.startswith(_PARAMETER)
        }
        self.size = sum(array.nbytes for array in arrays.values())  # bytes, of parameters and programs
        self._programs = {}
        for kind in ("crop", "global"):
            exported = jax.export.deserialize(bytearray(arrays[_PROGRAM + kind].tobytes()))
            if jax.default_backend() not in ("cpu", "gpu", "tpu"):
                raise CheckpointError(f"{path}: is for {', '.join(PLATFORMS)}, not for {jax.default_backend()}")
            self._programs[kind] = jax.jit(exported.call)

    def features(self, image: Image.Image) -> tuple[list[np.ndarray], int]:
        """The merged features [Q, Z] of an RGB image's crops, row by row, and of its global view; the crops' columns.

        Raises:
            ImageError: the image cannot be cut into views.
        """
        views = make_views(image, self.images)
        crops = self._run("crop", views.crops_NHWC)
        return [*crops, *self._run("global", views.global_view_HWC[None])], views.plan.columns

    def encode(self, image: Image.Image) -> Encoded:
        """
        Raises:
            ImageError: the image cannot be cut into views.
            BitstreamError: a feature cannot be coded: it is not finite, or far from those of training.
        """
        began = time.perf_counter()
        tiles, columns = self.features(image)
        encoded = time.perf_counter()
        frame = codec.encode(self.tables, tiles, columns=columns)
        return Encoded(frame, tiles, 1e3 * (encoded - began), 1e3 * (time.perf_counter() - encoded))

    def _run(self, kind: str, views_MSSC: np.ndarray) -> list[np.ndarray]:
        tiles = []
        for first in range(0, len(views_MSSC), _MOST_VIEWS):
            part = views_MSSC[first : first + _MOST_VIEWS]
            empty = (1 << (len(part) - 1).bit_length()) - len(part)
            padded = np.pad(part, ((0, empty), (0, 0), (0, 0), (0, 0)))
            tiles += [*np.asarray(self._programs[kind](self._parameters, padded))[: len(part)]]
        return tiles


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
