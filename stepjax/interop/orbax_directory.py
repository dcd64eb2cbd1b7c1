"""A checkpoint that Orbax restores: one that was converted, or one of a training run.

A converted checkpoint:

    DIR/0/state/        the parameters, a zarr array each: "model/decoder/blocks/mlp/up_kernel"
    DIR/0/meta/         JSON, as beside a run's checkpoints; its configuration says what the model is
    DIR/hf/             the files of the Hugging Face directory that are not weights, as they were
    DIR/hf_headers.json the headers of its safetensors files, by file name

Step 0 is a step like any other for `stepjax.training.checkpoint.restore_model`.

Orbax saves arrays that are whole in memory, and a conversion never holds a model. So `create_array` and `write_part`
fill the arrays by TensorStore, a layer at a time, as Orbax specifies them; then Orbax saves the step (`save_step`),
with a type handler that moves each finished array into place. Arrays are uncompressed (bfloat16 weights shrink by
little) and cut at the layers of a stacked parameter, so that each layer can be written, and read, alone.
"""

import dataclasses
import functools
import itertools
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

import stepjax
from stepjax.config import PretrainConfig
from stepjax.config_file import from_json
from stepjax.errors import CheckpointError
from stepjax.interop.bounds import PIECE_BYTES, packed, read_json
from stepjax.interop.hf_directory import CONFIG, is_weights_name
from stepjax.interop.model_spec import ModelSpec, spec_from_hf, spec_from_json
from stepjax.interop.safetensors_file import MAX_HEADER
from stepjax.training.checkpoint import FORMAT, MODEL, read_meta, sealed, stored_parameters
from stepjax.training.digests import add_up, part_digest

SIDE_FILES = "hf"
HEADERS = "hf_headers.json"
_UNFINISHED = "arrays"  # in a directory that is being written
_ANOTHER = "use another step or copy"


class OrbaxDirectory:
    """A converted checkpoint, a run, its checkpoint directory, or one step of either; of a run also by URL.

    Attributes:
        path: as it was given, absolute; an `epath.Path` for a URL.
        step: the directory of the step, likewise.
        run: the configuration of the training run; None for a converted checkpoint.
        side_files: the directory of the files beside the weights; None if there is none.

    Raises:
        CheckpointError: the directory or a file in it is not usable.
    """

    def __init__(self, path: str | Path):
        self.path: Any = _opened(path)
        directory = self.path / "checkpoints" if (self.path / "checkpoints").is_dir() else self.path
        self.meta = read_meta(directory)
        is_step = directory.name.isdigit() and (directory / "state").exists()
        self.step = directory if is_step else directory / str(self.meta["step"])
        config = self.meta.get("config")
        config = config if isinstance(config, dict) else {}
        self.run: PretrainConfig | None = None if "kind" in config else from_json(config)
        self.spec = spec_from_json(config) if self.run is None else ModelSpec(self.run.model, self.run.images)
        side_files = self.step.parent / SIDE_FILES
        self.side_files: Path | None = side_files if side_files.is_dir() else None

    @functools.cached_property
    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of every stored parameter, by name."""
        return stored_parameters(self.step)[1]

    def dtypes(self) -> dict[str, np.dtype]:
        """The stored type of every parameter.

        Raises:
            CheckpointError: the parameters are not those of the configuration; all that differ are named.
        """
        shapes, stored = self.spec.shapes(), self.parameters
        problems = [f"missing: {name}" for name in shapes if name not in stored]
        problems += [f"unexpected: {name}" for name in sorted(stored.keys() - shapes)]
        problems += [
            f"of another shape: {name} {array.shape} (expected {shapes[name]})"
            for name, array in stored.items()
            if name in shapes and array.shape != shapes[name]
        ]
        if problems:
            raise CheckpointError(f"{self.step} does not fit its configuration; " + "; ".join(problems))
        return {name: array.dtype for name, array in stored.items()}

    def changed(self, digests: Mapping[str, int]) -> list[str]:
        """The parameters whose digests are not those that were saved; older versions saved none."""
        saved = self.meta.get("arrays")
        return [] if saved is None else [name for name, digest in digests.items() if saved.get(MODEL + name) != digest]

    def headers(self) -> dict[str, str]:
        """Text of the safetensors headers that the checkpoint was converted from, by file name; of a run, none."""
        path = self.step.parent / HEADERS
        headers = read_json(path, MAX_HEADER) if path.exists() else {}
        for name, text in headers.items():
            if not is_weights_name(name) or not isinstance(text, str):
                raise CheckpointError(f"{path} names no safetensors file in a directory: {name!r}")
        return headers

    def kept_config(self) -> dict[str, Any] | None:
        """The config.json among the side files, checked, since it is exported as it is; None without side files."""
        if self.side_files is None:
            return None
        fields = read_json(self.side_files / CONFIG)
        spec_from_hf(fields)
        return fields

    def open(self, name: str) -> ts.TensorStore:
        """A stored parameter, of which parts can be read.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        state = self.step / "state"
        is_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(state)
        info = _array_info(name, state, is_ocdbt)
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=is_ocdbt)
        try:
            return ts.open(ts.Spec(spec), open=True, read=True, context=info.ts_context).result()
        except ValueError as error:
            raise CheckpointError(f"{state}: {MODEL}{name} is missing or damaged, {_ANOTHER}: {error}") from error


def _opened(path: str | Path) -> Path | epath.Path:
    if "://" not in str(path):
        return Path(path).expanduser().absolute()
    try:
        return epath.Path(path)
    except (ImportError, KeyError) as error:  # KeyError: an unknown kind of URL
        raise CheckpointError(
            f"{path} cannot be opened ({error}): give a local path, or a gs:// URL with stepjax[tpu] installed"
        ) from error


def read_part(array: ts.TensorStore, layers: slice | None = None) -> np.ndarray:
    """The array's values, or those of some layers.

    Raises:
        CheckpointError: the stored values are damaged.
    """
    try:
        return np.asarray((array if layers is None else array[layers]).read().result())
    except ValueError as error:  # a chunk that is missing is an error, and no zeros
        where = array.kvstore.url if array.kvstore else array
        raise CheckpointError(f"{where} is damaged, or lacks chunks, {_ANOTHER}: {error}") from error


# Writing -------------------------------------------------------------------------------------------------------------


def chunk_shape(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> tuple[int, ...]:
    """Of about 128 MiB at most: a layer of a stack, or a part of one along its longest dimension.

    Of a large matrix that is the dimension in front before its transposition or after it.
    """
    chunk = [1, *shape[1:]] if stacked else list(shape)
    if math.prod(chunk) * itemsize > PIECE_BYTES:
        longest = chunk.index(max(chunk))
        row = itemsize * math.prod(chunk) // chunk[longest]
        chunk[longest] = max(1, PIECE_BYTES // row)
    return tuple(chunk)


def create_array(work: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, *, stacked: bool) -> ts.TensorStore:
    """A parameter of the checkpoint that is written in `work`; one that exists is opened as it is."""
    info = _array_info(name, work / _UNFINISHED)
    chunk = chunk_shape(shape, dtype.itemsize, stacked=stacked)
    spec = ocp.type_handlers.get_json_tspec_write(
        info, use_ocdbt=False, global_shape=shape, local_shape=chunk, dtype=dtype
    )
    try:
        return ts.open(ts.Spec(spec), open=True, create=True, context=info.ts_context).result()
    except ValueError as error:
        raise CheckpointError(f"{info.path} cannot be written: {error}") from error


def write_part(array: ts.TensorStore, layer: int | None, values: np.ndarray) -> int:
    """Put values, which may be a transposed view, into an array or one layer of it; on disk when this returns.

    Returns what they add to the array's digest (`stepjax.training.digests`).
    """
    if layer is not None:
        values = values[None]
    digests = []
    steps = [size or 1 for size in array.chunk_layout.write_chunk.shape or ()]
    for first in itertools.product(*(range(0, size, step) for size, step in zip(values.shape, steps, strict=True))):
        part = tuple(slice(start, start + step) for start, step in zip(first, steps, strict=True))
        piece = packed(values[part], array.dtype.numpy_dtype)
        first = first if layer is None else (layer, *first[1:])
        place = tuple(slice(start, start + size) for start, size in zip(first, piece.shape, strict=True))
        try:
            array[place].write(piece).result()
        except ValueError as error:  # a full disk, for example
            raise CheckpointError(f"an array cannot be written: {error}") from error
        digests.append(part_digest(piece, first, array.shape))
    return add_up(digests)


def save_step(work: Path, spec: ModelSpec, digests: Mapping[str, int]) -> None:
    """Let Orbax save step 0 of the arrays in `work`, which all have digests, with the metadata that `read_meta` reads.

    Once begun, this cannot be resumed: the arrays have moved.
    """
    meta = {
        "format": FORMAT,
        "step": 0,
        "config": spec.to_json(),
        "versions": {"stepjax": stepjax.__version__},
        "arrays": {MODEL + name: digest for name, digest in digests.items()},
    }
    arrays = {name: _Finished(work / _UNFINISHED / name) for name in meta["arrays"]}
    types = ocp.type_handlers.create_type_handler_registry(
        (_Finished, _MovesIntoPlace()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=types)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.PyTreeSave, state)
    handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # Orbax warns that it finds no OCDBT database to merge
    try:
        with ocp.CheckpointManager(work, options=options, handler_registry=handlers) as manager:
            items = {"state": ocp.args.PyTreeSave(arrays), "meta": ocp.args.JsonSave(sealed(meta))}
            manager.save(0, args=ocp.args.Composite(**items))
    finally:
        log.setLevel(level)
    shutil.rmtree(work / _UNFINISHED)


@dataclasses.dataclass(frozen=True)
class _Finished:
    directory: Path  # of an array


class _MovesIntoPlace(ocp.type_handlers.NumpyHandler):
    """Saves an array that has been written in another directory."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for array, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            info.path.parent.mkdir(parents=True, exist_ok=True)
            array.directory.rename(info.path)
        return []


def _array_info(name: str, directory: Any, is_ocdbt: bool = False) -> Any:
    """Orbax's description of a parameter's array."""
    return ocp.type_handlers.ParamInfo(
        name=MODEL + name,
        parent_dir=directory,
        is_ocdbt_checkpoint=is_ocdbt,
        use_compression=False,
        ts_context=ocp.type_handlers.get_ts_context(use_ocdbt=is_ocdbt),
    )
