"""Orbax checkpoints: converted ones, and those of training runs.

A converted checkpoint:

    DIR/0/state/        the parameters, one zarr array each: "model/decoder/blocks/mlp/up_kernel"
    DIR/0/meta/         JSON, as in a run's checkpoints; its configuration describes the model
    DIR/hf/             unchanged non-weight files of the Hugging Face directory
    DIR/hf_headers.json the headers of its safetensors files, by file name

`stepjax.training.checkpoint.restore_model` reads step 0 like any other step.

Orbax saves arrays that are entirely in memory, but a conversion never holds a whole model. So `create_array` and
`write_part` fill arrays with TensorStore, layer by layer, in Orbax's format. Orbax then saves the step (`save_step`)
with a type handler that moves each finished array into place. Arrays are uncompressed (bfloat16 weights barely shrink)
and chunked by layer of a stacked parameter, so that each layer can be written and read on its own.
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
from stepjax.config import RunConfig
from stepjax.config_file import from_json
from stepjax.errors import CheckpointError
from stepjax.interop.bounds import PIECE_BYTES, packed, read_json
from stepjax.interop.hf_directory import CONFIG, is_weights_name
from stepjax.interop.model_spec import ModelSpec, is_spec, spec_from_hf, spec_from_json
from stepjax.interop.safetensors_file import MAX_HEADER
from stepjax.training.checkpoint import FORMAT, MODEL, read_meta, sealed, stored_parameters
from stepjax.training.digests import add_up, part_digest

SIDE_FILES = "hf"
HEADERS = "hf_headers.json"
_UNFINISHED = "arrays"  # arrays of an unfinished conversion
_ANOTHER = "use another step or copy"


class OrbaxDirectory:
    """A converted checkpoint, a run, its checkpoint directory, or one step of either; a run may also be a URL.

    Attributes:
        path: the given path, absolute; an `epath.Path` for a URL.
        step: the step's directory, likewise.
        run: the training run's configuration; None for a converted checkpoint.
        side_files: the directory of side files; None if there is none.

    Raises:
        CheckpointError: the directory or a file in it is unusable.
    """

    def __init__(self, path: str | Path):
        self.path: Any = _opened(path)
        directory = self.path / "checkpoints" if (self.path / "checkpoints").is_dir() else self.path
        self.meta = read_meta(directory)
        is_step = directory.name.isdigit() and (directory / "state").exists()
        self.step = directory if is_step else directory / str(self.meta["step"])
        config = self.meta.get("config")
        config = config if isinstance(config, dict) else {}
        self.run: RunConfig | None = None if is_spec(config) else from_json(config)
        self.spec = spec_from_json(config) if self.run is None else ModelSpec(self.run.model, self.run.images)
        side_files = self.step.parent / SIDE_FILES
        self.side_files: Path | None = side_files if side_files.is_dir() else None

    @functools.cached_property
    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every stored parameter, by name."""
        return stored_parameters(self.step)[1]

    def dtypes(self) -> dict[str, np.dtype]:
        """The stored dtype of every parameter.

        Raises:
            CheckpointError: the parameters do not match the configuration; names all differences.
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
        """The parameters whose digests differ from the saved ones; older versions saved none."""
        saved = self.meta.get("arrays")
        return [] if saved is None else [name for name, digest in digests.items() if saved.get(MODEL + name) != digest]

    def headers(self) -> dict[str, str]:
        """Header text of the original safetensors files, by file name; empty for a run."""
        path = self.step.parent / HEADERS
        headers = read_json(path, MAX_HEADER) if path.exists() else {}
        for name, text in headers.items():
            if not is_weights_name(name) or not isinstance(text, str):
                raise CheckpointError(f"{path} has {name!r}, which is not a plain safetensors file name")
        return headers

    def kept_config(self) -> dict[str, Any] | None:
        """The config.json among the side files, validated, since it is exported unchanged; None if there is none."""
        if self.side_files is None:
            return None
        fields = read_json(self.side_files / CONFIG)
        spec_from_hf(fields)
        return fields

    def open(self, name: str) -> ts.TensorStore:
        """A stored parameter, which can be read in parts.

        Raises:
            CheckpointError: the parameter is missing or damaged.
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
    except (ImportError, KeyError) as error:  # KeyError: unknown URL scheme
        raise CheckpointError(
            f"{path} cannot be opened ({error}): give a local path, or a gs:// URL with stepjax[tpu] installed"
        ) from error


def read_part(array: ts.TensorStore, layers: slice | None = None) -> np.ndarray:
    """Reads an array, or some of its layers.

    Raises:
        CheckpointError: the stored values are damaged.
    """
    try:
        return np.asarray((array if layers is None else array[layers]).read().result())
    except ValueError as error:  # a missing chunk is an error, not zeros
        where = array.kvstore.url if array.kvstore else array
        raise CheckpointError(f"{where} is damaged, or lacks chunks, {_ANOTHER}: {error}") from error


# Writing -------------------------------------------------------------------------------------------------------------


def chunk_shape(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> tuple[int, ...]:
    """At most about 128 MiB: a layer of a stack, or a part of it along the longest dimension.

    In a large matrix, that dimension comes first either before or after transposition.
    """
    chunk = [1, *shape[1:]] if stacked else list(shape)
    if math.prod(chunk) * itemsize > PIECE_BYTES:
        longest = chunk.index(max(chunk))
        row = itemsize * math.prod(chunk) // chunk[longest]
        chunk[longest] = max(1, PIECE_BYTES // row)
    return tuple(chunk)


def create_array(work: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, *, stacked: bool) -> ts.TensorStore:
    """Creates a parameter's array in `work`, or opens the existing one."""
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
    """Writes values (possibly a transposed view) to an array or one of its layers; on disk when this returns.

    Returns their contribution to the array's digest (`stepjax.training.digests`).
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
    """Makes Orbax save the arrays in `work`, which all have digests, as step 0, with metadata for `read_meta`.

    Not resumable once started: it moves the arrays.
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
    log.setLevel(logging.ERROR)  # Orbax warns that there is no OCDBT database to merge
    try:
        with ocp.CheckpointManager(work, options=options, handler_registry=handlers) as manager:
            items = {"state": ocp.args.PyTreeSave(arrays), "meta": ocp.args.JsonSave(sealed(meta))}
            manager.save(0, args=ocp.args.Composite(**items))
    finally:
        log.setLevel(level)
    shutil.rmtree(work / _UNFINISHED)


@dataclasses.dataclass(frozen=True)
class _Finished:
    directory: Path  # of the array


class _MovesIntoPlace(ocp.type_handlers.NumpyHandler):
    """Saves an array by moving its finished directory into place."""

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for array, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            info.path.parent.mkdir(parents=True, exist_ok=True)
            array.directory.rename(info.path)
        return []


def _array_info(name: str, directory: Any, is_ocdbt: bool = False) -> Any:
    """Orbax's metadata for a parameter's array."""
    return ocp.type_handlers.ParamInfo(
        name=MODEL + name,
        parent_dir=directory,
        is_ocdbt_checkpoint=is_ocdbt,
        use_compression=False,
        ts_context=ocp.type_handlers.get_ts_context(use_ocdbt=is_ocdbt),
    )
