"""The arrays of an Orbax checkpoint, opened one by one: written as Orbax restores them, and read in parts.

Orbax itself saves arrays that are whole in memory. What is written here is its plain layout, a zarr array for every
name in a directory of that name, uncompressed (bfloat16 weights shrink by little), and `_METADATA` with the names. A
stacked parameter is cut at its layers, so that each can be written, and read, alone. Checkpoints of training runs have
all arrays in one OCDBT database, cut as the devices held them. Either way, a chunk that is missing is an error, and no
zeros; and what is written or read adds to the array's digest (`stepjax.training.digests`).
"""

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from stepjax.errors import CheckpointError
from stepjax.interop.arrays import PIECE_BYTES, packed
from stepjax.interop.hf_directory import read_json
from stepjax.training.checkpoint import is_sane_chunk
from stepjax.training.digests import add_up, part_digest

_METADATA = "_METADATA"
_ANOTHER = "use another step or copy"


def chunk_shape(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> tuple[int, ...]:
    """Of about 128 MiB at most: a layer of a stack, or a part of one along its longest dimension.

    That is the one that a large matrix has in front on either side of its transposition, or of none.
    """
    chunk = [1, *shape[1:]] if stacked else list(shape)
    if math.prod(chunk) * itemsize > PIECE_BYTES:
        longest = chunk.index(max(chunk))
        row = itemsize * math.prod(chunk) // chunk[longest]
        chunk[longest] = max(1, PIECE_BYTES // row)
    return tuple(chunk)


def create_array(state: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, *, stacked: bool) -> ts.TensorStore:
    """The array `name` of a checkpoint that is being written; one that is there already is gone on with."""
    metadata = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk_shape(shape, dtype.itemsize, stacked=stacked)),
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{state / name}/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # zeros too
    }
    try:
        return ts.open(spec, open=True, create=True).result()
    except ValueError as error:
        raise CheckpointError(f"{state / name} cannot be written: {error}") from error


def write(array: ts.TensorStore, layer: int | None, values: np.ndarray) -> int:
    """Put values, which may be a transposed view, into an array or one layer of it; on disk when this returns.

    Returns what they add to the array's digest.
    """
    target = array if layer is None else array[layer]
    chunk = tuple(size or 1 for size in array.chunk_layout.write_chunk.shape or ())[0 if layer is None else 1 :]
    dtype = array.dtype.numpy_dtype
    digests = []
    for first in itertools.product(*(range(0, size, step) for size, step in zip(values.shape, chunk, strict=True))):
        part = tuple(
            slice(start, min(start + step, size)) for start, step, size in zip(first, chunk, values.shape, strict=True)
        )
        try:
            piece = packed(values[part], dtype)
            target[part].write(piece).result()
        except ValueError as error:  # a full disk, for example
            raise CheckpointError(f"an array cannot be written: {error}") from error
        if layer is not None:
            piece, first = piece[None], (layer, *first)
        digests.append(part_digest(piece, first, array.shape))
    return add_up(digests)


def write_metadata(state: Path, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """The file that tells Orbax the names."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],  # a key of a dict
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
        for name, shape in shapes
    }
    fields = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (state / _METADATA).write_text(json.dumps(fields))


class Arrays:
    """The arrays in the `state` of one step, whichever of the two layouts it has."""

    def __init__(self, state: Path):
        self._state = state
        try:
            fields = read_json(state / _METADATA)
            self.names = [field["key_metadata"][-1]["key"] for field in fields["tree_metadata"].values()]
        except (CheckpointError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{state / _METADATA} is missing or damaged, {_ANOTHER}: {error}") from error
        self._driver = "zarr3" if fields.get("use_zarr3") else "zarr"
        self._database = (state / "manifest.ocdbt").exists()

    def open(self, name: str) -> ts.TensorStore:
        """Raises CheckpointError where the array is missing or damaged."""
        if self._database:
            store: dict[str, Any] = {"driver": "ocdbt", "base": f"file://{self._state}/", "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{self._state / name}/"}
        spec = {"driver": self._driver, "kvstore": store, "fill_missing_data_reads": False}
        try:
            array = ts.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise CheckpointError(f"{self._state}: {name} is missing or damaged, {_ANOTHER}: {error}") from error
        chunk = tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or ())
        if not is_sane_chunk(chunk, array.shape):
            raise CheckpointError(f"{self._state}: {name} is damaged, {_ANOTHER}: {array.shape} in chunks of {chunk}")
        return array


def read(array: ts.TensorStore, layers: slice | None = None) -> np.ndarray:
    """The array's values, or those of some layers.

    Raises:
        CheckpointError: the stored values are damaged.
    """
    try:
        return np.asarray((array if layers is None else array[layers]).read().result())
    except ValueError as error:
        where = array.kvstore.url if array.kvstore else array
        raise CheckpointError(f"{where} is damaged, or lacks chunks, {_ANOTHER}: {error}") from error
