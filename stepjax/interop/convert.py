"""Hugging Face directories into checkpoints that Orbax restores, and back, a few tensors in memory at a time.

Both ways go through the same table of public tensors (`hf_layout`), fill a directory that takes its name when it is
whole (`partial`), and note every finished tensor, so that a second run goes on where a killed one stopped.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial as bind
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.interop import export_files, orbax_arrays
from stepjax.interop.bounded import run_bounded
from stepjax.interop.hf_directory import INDEX, HFDirectory
from stepjax.interop.hf_load import check_copy
from stepjax.interop.hf_match import Place, match, places
from stepjax.interop.model_spec import ModelSpec
from stepjax.interop.orbax_directory import HEADERS, PREFIX, SIDE_FILES, OrbaxDirectory, write_meta
from stepjax.interop.partial import REPLACED, SUFFIX, Partial, partial
from stepjax.interop.progress import Progress
from stepjax.interop.safetensors_file import DTYPES, NAMES, Entry, create, parse_header, write_tensor
from stepjax.interop.shards import SHARD_BYTES, index_of, plan_shards
from stepjax.training.digests import add_up, part_digest

DTypeChoice = Literal["keep", "float32", "bfloat16"]
Part = Literal["all", "decoder"]


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Attributes:
        dtype: of the tensors that are written; "keep" leaves every one as it is.
        part: "decoder" takes the text model alone, as a plain Qwen3 checkpoint.
        side_files: a Hugging Face directory whose tokenizer, templates and code go beside exported weights.
        shard_bytes: of an exported file, at most.
        overwrite: replace what is at the destination.
    """

    dtype: DTypeChoice = "keep"
    part: Part = "all"
    side_files: Path | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False

    def cast(self, stored: np.dtype) -> np.dtype:
        return stored if self.dtype == "keep" else DTYPES[{"float32": "F32", "bfloat16": "BF16"}[self.dtype]]


@dataclasses.dataclass(frozen=True)
class Written:
    """What a conversion wrote, for people.

    Attributes:
        spec: of what was written.
        is_part: it is a part of what was read.
        dtypes: of every parameter.
        num_bytes: of the tensors.
        left_out: what else the source has, and the destination has not.
    """

    spec: ModelSpec
    is_part: bool
    dtypes: Mapping[str, np.dtype]
    num_bytes: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "a Qwen3 text model" if self.spec.decoder.qk_norm else "a Llama text model"
        parameters = sum(math.prod(shape) for shape in self.spec.shapes().values())
        dtypes = " and ".join(sorted({dtype.name for dtype in self.dtypes.values()}))
        return (
            f"{'the decoder only, ' if self.is_part else ''}{text if self.spec.is_text else 'STEP3-VL'}: "
            f"{parameters:,} parameters, {self.num_bytes:,} bytes of {dtypes}"
        )


def to_orbax(source: HFDirectory, destination: Path, options: Options, progress: Callable[..., Progress]) -> Written:
    """Convert a Hugging Face directory.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshapen, of a type that is not read or damaged, or the
            destination cannot be used.
    """
    check_apart(source.path, destination)
    found = match(places(source.spec.tensors(), source.spec.shapes()), source.entries)
    spec, names = source.spec, {place.tensor.name: place.tensor.name for place, _ in found}
    if options.part == "decoder" and not spec.is_text:
        spec = spec.text_part
        names = {name: name.removeprefix("decoder/") for name in names if name.startswith("decoder/")}
        found = [(place, key) for place, key in found if place.tensor.name in names]
    dtypes = _uniform_dtypes([(place.tensor.name, key, source.entries[key]) for place, key in found], options)
    shapes = spec.shapes()
    conversion = {
        "to": "orbax",
        "source": str(source.path.absolute()),
        "files": {name: (source.path / name).stat().st_mtime_ns for name in source.headers},
        "headers": _digest(source.headers),
        "options": [options.dtype, options.part],
    }
    with partial(destination, conversion, overwrite=options.overwrite) as work:
        step = work.directory / "0"
        arrays: dict[str, Any] = {}
        for place, _ in found:
            name, stored = place.tensor.name, names[place.tensor.name]
            if name not in arrays:
                arrays[name] = orbax_arrays.create_array(
                    step / "state", PREFIX + stored, shapes[stored], dtypes[name], stacked=place.tensor.stacked
                )

        keys = {place.tensor.name: key for place, key in found if not place.tensor.is_copy}

        def copy(place: Place, key: str) -> int | None:
            if place.tensor.is_copy:
                check_copy(key, source.read(key), source.read(keys[place.tensor.name]))
                return None
            return orbax_arrays.write(arrays[place.tensor.name], place.layer, place.tensor.to_ours(source.read(key)))

        jobs = [(place.key, source.entries[key].nbytes, bind(copy, place, key)) for place, key in found]
        _run(jobs, work, progress)
        written = {names[name]: shapes[names[name]] for name in arrays}
        orbax_arrays.write_metadata(step / "state", [(PREFIX + name, shape) for name, shape in written.items()])
        write_meta(step, spec, _digests([(names[place.tensor.name], work.done[place.key]) for place, _ in found]))
        kept = work.directory / SIDE_FILES
        others = export_files.copy_kept(source.path, kept, text_only=spec != source.spec)
        if spec == source.spec:
            (work.directory / HEADERS).write_text(json.dumps(source.headers))
        else:
            export_files.write_config(kept, export_files.text_config(source.config, spec))
    written_dtypes = {names[name]: dtypes[name] for name in arrays}
    num_bytes = sum(math.prod(shape) * written_dtypes[name].itemsize for name, shape in written.items())
    return Written(spec, spec != source.spec, written_dtypes, num_bytes, tuple(others))


def to_hf(source: OrbaxDirectory, destination: Path, options: Options, progress: Callable[..., Progress]) -> Written:
    """Export a converted checkpoint, or a training run's, as a complete Hugging Face directory.

    A checkpoint that was converted from files in the layout on disk is written into the same files, byte for byte.

    Raises:
        CheckpointError: the checkpoint does not fit its configuration, is damaged, or the destination cannot be used.
    """
    check_apart(source.path, destination)
    check_apart(source.step.parent, destination)
    if options.side_files is not None:
        check_apart(options.side_files, destination, may_hold=True)
    stored, spec, prefix = source.dtypes(), source.spec, PREFIX
    shapes = spec.shapes()
    if options.part == "decoder" and not spec.is_text:
        spec, prefix = spec.text_part, PREFIX + "decoder/"
        stored = {name.removeprefix("decoder/"): dtype for name, dtype in stored.items() if name.startswith("decoder/")}
        shapes = spec.shapes()
    dtypes = {name: options.cast(dtype) for name, dtype in stored.items()}
    wanted = places(spec.tensors(), shapes)
    headers = _same_headers(source.headers, wanted, dtypes) if spec == source.spec else None
    if headers is None:
        own = sorted((place for place in wanted if not place.tensor.is_copy), key=_layer_order)
        tensors = [(place.key, dtypes[place.tensor.name], place.shape) for place in own]
        headers = plan_shards(tensors, options.shard_bytes)
    conversion = {
        "to": "hf",
        "source": str(source.step),
        "written": (source.step / "state" / "_METADATA").stat().st_mtime_ns,
        "headers": _digest(headers),
        "options": [options.dtype, options.part, str(options.side_files)],
    }
    with partial(destination, conversion, overwrite=options.overwrite) as work:
        _write_side_files(work.directory, source, spec, options, {dtype.name for dtype in dtypes.values()})
        entries: dict[str, Entry] = {}
        for name, header in headers.items():
            create(work.directory / name, header)
            entries |= parse_header(work.directory / name, header)
        jobs, parts = [], []
        for name, block in _blocks([place for place in wanted if place.key in entries], source, prefix):
            size = sum(entries[place.key].nbytes for place in block)
            jobs.append((block[-1].key, size, bind(_export, source.arrays.open(prefix + name), block, entries)))
            parts.append((prefix + name, block[-1].key))
        _run(jobs, work, progress)
        found = _digests([(name, work.done[key]) for name, key in parts])
        changed = [name for name, digest in found.items() if source.digest(name) not in (None, digest)]
        if changed:
            work.done.clear()  # nothing of it is to be gone on with
            raise CheckpointError(
                f"{source.step}: {', '.join(changed[:5])}: the values are not those that were saved; use another step, "
                "or another copy"
            )
        index = work.directory / INDEX
        if headers != source.headers:
            index.unlink(missing_ok=True)
        if len(headers) > 1 and not index.exists():
            index.write_text(index_of(headers))
    num_bytes = sum(entry.nbytes for entry in entries.values())
    return Written(spec, spec != source.spec, dtypes, num_bytes)


def _write_side_files(
    target: Path, source: OrbaxDirectory, spec: ModelSpec, options: Options, dtypes: set[str]
) -> None:
    [dtype] = dtypes if len(dtypes) == 1 else [None]
    if source.side_files is not None:
        changed = None if options.dtype == "keep" else dtype
        export_files.restore(source.side_files, target, spec=spec, text_only=spec != source.spec, dtype=changed)
    if source.run is not None:
        export_files.make(target, spec, source.run.tokenizer, dtype, options.side_files)


def _layer_order(place: Place) -> tuple[str, int]:
    """What has no layers first, then layer by layer, as the files are read."""
    return ("", 0) if place.layer is None else (place.tensor.key.partition("{layer}")[0], place.layer)


def check_apart(source: Path, destination: Path, *, may_hold: bool = False) -> None:
    """Raises CheckpointError where filling or replacing the destination could touch what is read.

    With `may_hold`, the destination may be in the source.
    """
    read = Path(os.path.realpath(source))
    for name in (destination.name, destination.name + SUFFIX, destination.name + REPLACED):
        written = Path(os.path.realpath(destination.with_name(name)))
        if read.is_relative_to(written) or (written.is_relative_to(read) and not may_hold):
            raise CheckpointError(
                f"{destination} and {source}, which is read, are the same or one within the other: name another place"
            )


def _digests(parts: list[tuple[str, int | None]]) -> dict[str, int]:
    """Of every array, from those of its parts; copies have none."""
    found: dict[str, list[int]] = {}
    for name, digest in parts:
        if digest is not None:
            found.setdefault(name, []).append(digest)
    return {name: add_up(digests) for name, digests in found.items()}


def _run(
    jobs: list[tuple[str, int, Callable[[], int | None]]], work: Partial, progress: Callable[..., Progress]
) -> None:
    """The jobs that an earlier attempt has not finished.

    Raises:
        CheckpointError: the disk has no room for what they write.
    """
    left = sum(size for name, size, _ in jobs if name not in work.done)
    free = shutil.disk_usage(work.directory).free
    if left > free:
        raise CheckpointError(
            f"{work.directory}: {left / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free"
        )
    shown = progress(sum(size for _, size, _ in jobs), sum(size for name, size, _ in jobs if name in work.done))

    def run(name: str, size: int, job: Callable[[], int | None]) -> None:
        work.mark(name, job())
        shown.add(size)

    run_bounded((size, bind(run, name, size, job)) for name, size, job in jobs if name not in work.done)
    shown.finish()


def _digest(headers: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(headers).encode()).hexdigest()


def _blocks(wanted: list[Place], source: OrbaxDirectory, prefix: str) -> list[tuple[str, list[Place]]]:
    """The places in groups that are read together: layers that lie in one chunk of the stored array."""
    blocks: list[tuple[str, list[Place]]] = []
    depth: dict[str, int] = {}
    for place in wanted:
        name = place.tensor.name
        if name not in depth:
            chunk = source.arrays.open(prefix + name).chunk_layout.read_chunk.shape
            depth[name] = max(1, chunk[0] or 1) if place.tensor.stacked and chunk else 1
        if place.layer is None or place.layer % depth[name] == 0:
            blocks.append((name, []))
        blocks[-1][1].append(place)
    return blocks


def _export(array: Any, block: list[Place], entries: Mapping[str, Entry]) -> int | None:
    first, last = block[0].layer, block[-1].layer
    values = orbax_arrays.read(array, None if first is None or last is None else slice(first, last + 1))
    for place, layer in zip(block, [values] if first is None else values, strict=True):
        write_tensor(entries[place.key], place.tensor.to_hf(layer))
    if block[0].tensor.is_copy:
        return None
    return part_digest(values, (first or 0, *[0] * values.ndim)[: values.ndim], array.shape)


def _uniform_dtypes(tensors: list[tuple[str, str, Entry]], options: Options) -> dict[str, np.dtype]:
    """The type of every parameter: the layers of one are stacked, and so have to be of one."""
    dtypes: dict[str, np.dtype] = {}
    problems = []
    for name, key, entry in tensors:
        if entry.dtype_name not in DTYPES:
            problems.append(f"{key} is {entry.dtype_name}: only {', '.join(DTYPES)} are read")
            continue
        dtype = options.cast(DTYPES[entry.dtype_name])
        if dtypes.setdefault(name, dtype) != dtype:
            problems.append(f"{key} is {NAMES[dtype]}, other layers are {NAMES[dtypes[name]]}: pass --dtype")
    if problems:
        raise CheckpointError("; ".join(problems))
    return dtypes


def _same_headers(
    headers: dict[str, str], wanted: list[Place], dtypes: Mapping[str, np.dtype]
) -> dict[str, str] | None:
    """The headers that the checkpoint came from, if files of today's keys, shapes and types have the same."""
    recorded = [item for name, text in headers.items() for item in parse_header(Path(name), text).items()]
    found = {key: (entry.shape, entry.dtype_name) for key, entry in recorded}
    needed = {place.key: (place.shape, NAMES[dtypes[place.tensor.name]]) for place in wanted}
    optional = {place.key for place in wanted if place.tensor.is_copy}
    same = needed.keys() - optional <= found.keys() <= needed.keys() and all(needed[key] == found[key] for key in found)
    return headers if same else None
