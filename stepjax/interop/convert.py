"""Converts Hugging Face directories to Orbax checkpoints and back, with only a few tensors in memory at a time.

Both directions use the same table of public tensors (`hf_layout`), fill a directory that gets its name when it is
complete (`partial`), and record every finished tensor, so that a rerun resumes where a killed one stopped.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial as bind
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tensorstore as ts

from stepjax.errors import CheckpointError
from stepjax.interop import export_files, orbax_directory, safetensors_file
from stepjax.interop.bounds import run_bounded
from stepjax.interop.hf_directory import INDEX, HFDirectory
from stepjax.interop.hf_match import Place, check_copy, match, places
from stepjax.interop.model_spec import ModelSpec
from stepjax.interop.orbax_directory import HEADERS, SIDE_FILES, OrbaxDirectory
from stepjax.interop.partial import REPLACED, SUFFIX, Partial, partial
from stepjax.interop.safetensors_file import DTYPES, NAMES, SHARD_BYTES, Entry, parse_header
from stepjax.progress import progress
from stepjax.training.digests import add_up, part_digest

DTypeChoice = Literal["keep", "float32", "bfloat16"]
Part = Literal["all", "decoder"]

_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One or more tensors to write."""

    key: str  # in the journal
    array: str  # the parameter
    nbytes: int
    run: Callable[[], int | None]  # returns its contribution to the parameter's digest


# To Orbax ------------------------------------------------------------------------------------------------------------


def to_orbax(
    source: HFDirectory, destination: Path, *, dtype: DTypeChoice = "keep", part: Part = "all", overwrite: bool = False
) -> str:
    """Converts a Hugging Face directory; returns a description of the result.

    Args:
        dtype: of the written tensors; "keep" leaves each unchanged.
        part: "decoder" writes only the text model, as a plain Qwen3 checkpoint.
        overwrite: replace the destination.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshapen, damaged or of an unsupported dtype, or the
            destination is unusable.
    """
    check_apart(source.path, destination)
    spec = source.spec.part(part)
    keys = {place.key: key for place, key in match(places(source.spec.tensors(), source.spec.shapes()), source.entries)}
    shapes = spec.shapes()
    found = [(place, keys[place.key]) for place in places(spec.tensors(), shapes) if place.key in keys]
    dtypes = _uniform_dtypes(found, source.entries, dtype)
    conversion = {
        "to": "orbax",
        "source": source.origin,
        "files": {name: (source.path / name).stat().st_mtime_ns for name in source.headers},
        "headers": _digest(source.headers),
        "options": [dtype, part],
    }
    with partial(destination, conversion, overwrite=overwrite) as work:
        stacked = {place.tensor.name: place.tensor.stacked for place, _ in found}
        arrays = {
            name: orbax_directory.create_array(work.directory, name, shapes[name], dtypes[name], stacked=stacked[name])
            for name in stacked
        }
        originals = {place.tensor.name: key for place, key in found if not place.tensor.is_copy}

        def copy(place: Place, key: str) -> int | None:
            if place.tensor.is_copy:
                check_copy(key, source.read(key), source.read(originals[place.tensor.name]))
                return None
            return orbax_directory.write_part(
                arrays[place.tensor.name], place.layer, place.tensor.to_ours(source.read(key))
            )

        digests = _run(
            [
                Job(place.key, place.tensor.name, source.entries[key].nbytes, bind(copy, place, key))
                for place, key in found
            ],
            work,
        )
        others = export_files.copy_kept(source.path, work.directory / SIDE_FILES, text_only=spec != source.spec)
        if others:
            _log.warning("left out of %s: %s", source.path, ", ".join(others))
        if spec == source.spec:
            (work.directory / HEADERS).write_text(json.dumps(source.headers))
        else:
            export_files.write_config(work.directory / SIDE_FILES, export_files.text_config(source.config, spec))
        work.forget()
        orbax_directory.save_step(work.directory, spec, digests)
    return _summary(spec, dtypes, is_part=spec != source.spec)


def _uniform_dtypes(
    found: list[tuple[Place, str]], entries: Mapping[str, Entry], dtype: DTypeChoice
) -> dict[str, np.dtype]:
    """The dtype to write each parameter in. Layers of a parameter are stacked, so they must share one."""
    dtypes: dict[str, np.dtype] = {}
    problems = []
    for place, key in found:
        stored = DTYPES.get(entries[key].dtype_name)
        if stored is None:
            problems.append(f"{key} is {entries[key].dtype_name}: only {', '.join(DTYPES)} are read")
            continue
        written = _cast(stored, dtype)
        first = dtypes.setdefault(place.tensor.name, written)
        if first != written:
            problems.append(f"{key} is {NAMES[written]}, other layers are {NAMES[first]}: pass --dtype")
    if problems:
        raise CheckpointError("; ".join(problems))
    return dtypes


# To Hugging Face -----------------------------------------------------------------------------------------------------


def to_hf(
    source: OrbaxDirectory,
    destination: Path,
    *,
    dtype: DTypeChoice = "keep",
    part: Part = "all",
    side_files: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> str:
    """Exports a converted checkpoint, or a training run's, as a complete Hugging Face directory.

    A checkpoint converted from files in the layout on disk is written back to identical files, byte for byte. Returns a
    description of the result.

    Args:
        dtype, part, overwrite: as in `to_orbax`.
        side_files: a Hugging Face directory whose tokenizer, templates and code are exported with the weights.
        shard_bytes: largest size of an exported file.

    Raises:
        CheckpointError: the checkpoint does not fit its configuration or is damaged, or the destination is unusable.
    """
    for read in (source.path, source.step.parent):
        check_apart(read, destination)
    if side_files is not None:
        check_apart(side_files, destination, may_hold=True)
    kept, stored, spec = source.headers(), source.dtypes(), source.spec.part(part)
    is_part = spec != source.spec
    prefix = "decoder/" if is_part else ""
    shapes = spec.shapes()
    dtypes = {name: _cast(stored[prefix + name], dtype) for name in shapes}
    wanted = places(spec.tensors(), shapes)
    headers = kept
    if is_part or not _is_same(kept, wanted, dtypes):
        own = sorted((place for place in wanted if not place.tensor.is_copy), key=_layer_order)
        headers = safetensors_file.plan_shards(
            [(place.key, dtypes[place.tensor.name], place.shape) for place in own], shard_bytes
        )
    conversion = {
        "to": "hf",
        "source": str(source.step),
        "written": (source.step / "state" / "_METADATA").stat().st_mtime_ns,
        "headers": _digest(headers),
        "options": [dtype, part, str(side_files)],
    }
    with partial(destination, conversion, overwrite=overwrite) as work:
        export_files.write_side_files(work.directory, source, spec, dtypes, is_cast=dtype != "keep", others=side_files)
        entries: dict[str, Entry] = {}
        for file, header in headers.items():
            safetensors_file.create(work.directory / file, header)
            entries |= parse_header(work.directory / file, header)
        jobs = []
        for array, block in _blocks([place for place in wanted if place.key in entries], source, prefix):
            nbytes = sum(entries[place.key].nbytes for place in block)
            name = prefix + block[0].tensor.name
            jobs.append(Job(block[-1].key, name, nbytes, bind(_export, array, block, entries)))
        if changed := source.changed(_run(jobs, work)):
            work.forget()
            raise CheckpointError(
                f"{source.step}: {', '.join(changed[:5])}: the values are not those that were saved; use another step, "
                "or another copy"
            )
        index = work.directory / INDEX
        if headers != kept:
            index.unlink(missing_ok=True)
        if len(headers) > 1 and not index.exists():
            index.write_text(safetensors_file.index_of(headers))
    return _summary(spec, dtypes, is_part=is_part)


def _is_same(headers: dict[str, str], wanted: list[Place], dtypes: Mapping[str, np.dtype]) -> bool:
    """Whether the original files had the same keys, shapes and dtypes."""
    recorded = [item for name, text in headers.items() for item in parse_header(Path(name), text).items()]
    found = {key: (entry.shape, entry.dtype_name) for key, entry in recorded}
    needed = {place.key: (place.shape, NAMES[dtypes[place.tensor.name]]) for place in wanted}
    required = {place.key for place in wanted if not place.tensor.is_copy}
    return required <= found.keys() and found.items() <= needed.items()


def _layer_order(place: Place) -> tuple[str, int]:
    """Sort key: tensors without layers first, then layer by layer, the order of reading."""
    return ("", 0) if place.layer is None else (place.tensor.key.partition("{layer}")[0], place.layer)


def _blocks(wanted: list[Place], source: OrbaxDirectory, prefix: str) -> Iterator[tuple[ts.TensorStore, list[Place]]]:
    """Groups places to read together: layers in one chunk of the stored array."""
    by_tensor: dict[str, list[Place]] = {}
    for place in wanted:
        by_tensor.setdefault(place.tensor.key, []).append(place)
    for layers in by_tensor.values():
        tensor = layers[0].tensor
        array = source.open(prefix + tensor.name)
        depth = (array.chunk_layout.read_chunk.shape or (1,))[0] or 1
        yield from ((array, layers[first : first + depth]) for first in range(0, len(layers), depth))


def _export(array: ts.TensorStore, block: list[Place], entries: Mapping[str, Entry]) -> int | None:
    first, last = block[0].layer, block[-1].layer
    values = orbax_directory.read_part(array, None if first is None or last is None else slice(first, last + 1))
    for place, layer in zip(block, [values] if first is None else values, strict=True):
        safetensors_file.write_tensor(entries[place.key], place.tensor.to_hf(layer))
    if block[0].tensor.is_copy:
        return None
    return part_digest(values, (first or 0, *[0] * values.ndim)[: values.ndim], array.shape)


# Shared --------------------------------------------------------------------------------------------------------------


def check_apart(source: Path, destination: Path, *, may_hold: bool = False) -> None:
    """Raises CheckpointError if filling or replacing the destination could modify the source.

    With `may_hold`, the destination may be inside the source.
    """
    read = Path(os.path.realpath(source))
    for name in (destination.name, destination.name + SUFFIX, destination.name + REPLACED):
        written = Path(os.path.realpath(destination.with_name(name)))
        if read.is_relative_to(written) or (written.is_relative_to(read) and not may_hold):
            raise CheckpointError(
                f"{destination} and {source}, which is read, are the same or nested: name another place"
            )


def _cast(stored: np.dtype, dtype: DTypeChoice) -> np.dtype:
    return {"keep": stored, "float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}[dtype]


def _run(jobs: list[Job], work: Partial) -> dict[str, int]:
    """Runs the jobs not finished by an earlier attempt; returns the digest of every parameter.

    Raises:
        CheckpointError: the disk is too full for the output.
    """
    total = sum(job.nbytes for job in jobs)
    waiting = [job for job in jobs if job.key not in work.done]
    left, free = sum(job.nbytes for job in waiting), shutil.disk_usage(work.directory).free
    if left > free:
        raise CheckpointError(f"{work.directory}: {left / 1e9:.1f} GB to write, but only {free / 1e9:.1f} GB free")
    if work.done:
        _log.info("resuming %s after %.0f%%", work.directory, 100 * (total - left) / max(total, 1))
    with progress(total, unit="B", description="converting", done=total - left) as bar:

        def run(job: Job) -> None:
            work.mark(job.key, job.run())
            bar.update(job.nbytes)

        run_bounded((job.nbytes, bind(run, job)) for job in waiting)
    parts: dict[str, list[int]] = {}
    for job in jobs:
        digest = work.done[job.key]
        if digest is not None:  # copies have none
            parts.setdefault(job.array, []).append(digest)
    return {name: add_up(digests) for name, digests in parts.items()}


def _digest(headers: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(headers).encode()).hexdigest()


def _summary(spec: ModelSpec, dtypes: Mapping[str, np.dtype], *, is_part: bool) -> str:
    text = "a Qwen3 text model" if spec.decoder.qk_norm else "a Llama text model"
    sizes = {name: math.prod(shape) for name, shape in spec.shapes().items()}
    return (
        f"{'the decoder only, ' if is_part else ''}{text if spec.is_text else 'STEP3-VL'}: "
        f"{sum(sizes.values()):,} parameters, {sum(size * dtypes[name].itemsize for name, size in sizes.items()):,} "
        f"bytes of {' and '.join(sorted({dtype.name for dtype in dtypes.values()}))}"
    )
