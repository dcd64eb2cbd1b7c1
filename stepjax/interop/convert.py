"""Hugging Face directories into checkpoints that Orbax restores, and back, with a few tensors in memory at a time.

Both ways go through the same table of public tensors (`hf_layout`), fill a directory that takes its name when it is
complete (`partial`), and note every finished tensor, so that a second run resumes where a killed one stopped.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial as bind
from pathlib import Path
from typing import Literal

import numpy as np
import tensorstore as ts

from stepjax.errors import CheckpointError
from stepjax.interop import export_files
from stepjax.interop.bounds import run_bounded
from stepjax.interop.hf_directory import INDEX, HFDirectory
from stepjax.interop.hf_match import Place, check_copy, match, places
from stepjax.interop.model_spec import ModelSpec
from stepjax.interop.orbax_directory import (
    HEADERS,
    SIDE_FILES,
    OrbaxDirectory,
    create_array,
    read_part,
    save_step,
    write_part,
)
from stepjax.interop.partial import REPLACED, SUFFIX, Partial, partial
from stepjax.interop.safetensors_file import (
    DTYPES,
    NAMES,
    SHARD_BYTES,
    Entry,
    create,
    index_of,
    parse_header,
    plan_shards,
    write_tensor,
)
from stepjax.progress import progress
from stepjax.training.digests import add_up, part_digest

DTypeChoice = Literal["keep", "float32", "bfloat16"]
Part = Literal["all", "decoder"]
Job = tuple[str, int, Callable[[], int | None]]  # name in the journal, bytes, and what adds to an array's digest

_log = logging.getLogger(__name__)


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
        parameters = sum(map(math.prod, self.spec.shapes().values()))
        dtypes = " and ".join(sorted({dtype.name for dtype in self.dtypes.values()}))
        return (
            f"{'the decoder only, ' if self.is_part else ''}{text if self.spec.is_text else 'STEP3-VL'}: "
            f"{parameters:,} parameters, {self.num_bytes:,} bytes of {dtypes}"
        )


# To Orbax ------------------------------------------------------------------------------------------------------------


def to_orbax(
    source: HFDirectory, destination: Path, *, dtype: DTypeChoice = "keep", part: Part = "all", overwrite: bool = False
) -> Written:
    """Convert a Hugging Face directory.

    Args:
        dtype: of the tensors that are written; "keep" leaves every one as it is.
        part: "decoder" takes the text model alone, as a plain Qwen3 checkpoint.
        overwrite: replace what is at the destination.

    Raises:
        CheckpointError: a tensor is missing, unexpected, misshapen, of a type that is not read or damaged, or the
            destination cannot be used.
    """
    check_apart(source.path, destination)
    spec = source.spec.part(part)
    keys = {place.key: key for place, key in match(places(source.spec.tensors(), source.spec.shapes()), source.entries)}
    shapes = spec.shapes()
    found = [(place, keys[place.key]) for place in places(spec.tensors(), shapes) if place.key in keys]
    dtypes = _uniform_dtypes(found, source.entries, dtype)
    conversion = {
        "to": "orbax",
        "source": str(source.path.absolute()),
        "files": {name: (source.path / name).stat().st_mtime_ns for name in source.headers},
        "headers": _digest(source.headers),
        "options": [dtype, part],
    }
    with partial(destination, conversion, overwrite=overwrite) as work:
        arrays: dict[str, ts.TensorStore] = {}
        for place, _ in found:
            name, stacked = place.tensor.name, place.tensor.stacked
            if name not in arrays:
                arrays[name] = create_array(work.directory, name, shapes[name], dtypes[name], stacked=stacked)
        originals = {place.tensor.name: key for place, key in found if not place.tensor.is_copy}

        def copy(place: Place, key: str) -> int | None:
            if place.tensor.is_copy:
                check_copy(key, source.read(key), source.read(originals[place.tensor.name]))
                return None
            return write_part(arrays[place.tensor.name], place.layer, place.tensor.to_ours(source.read(key)))

        _run([(place.key, source.entries[key].nbytes, bind(copy, place, key)) for place, key in found], work)
        digests = _digests((place.tensor.name, work.done[place.key]) for place, _ in found)
        others = export_files.copy_kept(source.path, work.directory / SIDE_FILES, text_only=spec != source.spec)
        if spec == source.spec:
            (work.directory / HEADERS).write_text(json.dumps(source.headers))
        else:
            export_files.write_config(work.directory / SIDE_FILES, export_files.text_config(source.config, spec))
        work.forget()
        save_step(work.directory, spec, digests)
    num_bytes = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in arrays)
    return Written(spec, spec != source.spec, dtypes, num_bytes, tuple(others))


def _uniform_dtypes(
    found: list[tuple[Place, str]], entries: Mapping[str, Entry], dtype: DTypeChoice
) -> dict[str, np.dtype]:
    """The type to write every parameter in: the layers of one are stacked, and so must have the same."""
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
) -> Written:
    """Export a converted checkpoint, or a training run's, as a complete Hugging Face directory.

    A checkpoint that was converted from files in the layout on disk is written into the same files, byte for byte.

    Args:
        dtype, part, overwrite: as in `to_orbax`.
        side_files: a Hugging Face directory whose tokenizer, templates and code go beside exported weights.
        shard_bytes: of an exported file, at most.

    Raises:
        CheckpointError: the checkpoint does not fit its configuration, is damaged, or the destination cannot be used.
    """
    for read in (source.path, source.step.parent):
        check_apart(read, destination)
    if side_files is not None:
        check_apart(side_files, destination, may_hold=True)
    kept_headers = source.headers()
    spec, stored = source.spec.part(part), source.dtypes()
    shapes = spec.shapes()
    prefix = "" if spec == source.spec else "decoder/"
    dtypes = {name: _cast(stored[prefix + name], dtype) for name in shapes}
    wanted = places(spec.tensors(), shapes)
    headers = _same_headers(kept_headers, wanted, dtypes) if spec == source.spec else None
    if headers is None:
        own = sorted((place for place in wanted if not place.tensor.is_copy), key=_layer_order)
        headers = plan_shards([(place.key, dtypes[place.tensor.name], place.shape) for place in own], shard_bytes)
    conversion = {
        "to": "hf",
        "source": str(source.step),
        "written": (source.step / "state" / "_METADATA").stat().st_mtime_ns,
        "headers": _digest(headers),
        "options": [dtype, part, str(side_files)],
    }
    with partial(destination, conversion, overwrite=overwrite) as work:
        [name] = names if len(names := {dtype.name for dtype in dtypes.values()}) == 1 else [None]
        export_files.write_side_files(
            work.directory, source, spec, dtype=name, is_cast=dtype != "keep", others=side_files
        )
        entries: dict[str, Entry] = {}
        for file, header in headers.items():
            create(work.directory / file, header)
            entries |= parse_header(work.directory / file, header)
        jobs: list[Job] = []
        parts = []
        for array, block in _blocks([place for place in wanted if place.key in entries], source, prefix):
            size = sum(entries[place.key].nbytes for place in block)
            jobs.append((block[-1].key, size, bind(_export, array, block, entries)))
            parts.append((prefix + block[0].tensor.name, block[-1].key))
        _run(jobs, work)
        found = _digests((name, work.done[key]) for name, key in parts)
        changed = [name for name, digest in found.items() if source.digest(name) not in (None, digest)]
        if changed:
            work.forget()
            raise CheckpointError(
                f"{source.step}: {', '.join(changed[:5])}: the values are not those that were saved; use another step, "
                "or another copy"
            )
        index = work.directory / INDEX
        if headers != kept_headers:
            index.unlink(missing_ok=True)
        if len(headers) > 1 and not index.exists():
            index.write_text(index_of(headers))
    return Written(spec, spec != source.spec, dtypes, sum(entry.nbytes for entry in entries.values()))


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


def _layer_order(place: Place) -> tuple[str, int]:
    """What has no layers first, then layer by layer, as the files are read."""
    return ("", 0) if place.layer is None else (place.tensor.key.partition("{layer}")[0], place.layer)


def _blocks(wanted: list[Place], source: OrbaxDirectory, prefix: str) -> Iterable[tuple[ts.TensorStore, list[Place]]]:
    """The places in groups that are read together: layers that lie in one chunk of the stored array."""
    blocks: list[tuple[ts.TensorStore, list[Place]]] = []
    arrays: dict[str, ts.TensorStore] = {}
    for place in wanted:
        name = place.tensor.name
        array = arrays[name] = arrays.get(name) or source.open(prefix + name)
        depth = max(1, (array.chunk_layout.read_chunk.shape or (1,))[0] or 1) if place.tensor.stacked else 1
        if place.layer is None or place.layer % depth == 0:
            blocks.append((array, []))
        blocks[-1][1].append(place)
    return blocks


def _export(array: ts.TensorStore, block: list[Place], entries: Mapping[str, Entry]) -> int | None:
    first, last = block[0].layer, block[-1].layer
    values = read_part(array, None if first is None or last is None else slice(first, last + 1))
    for place, layer in zip(block, [values] if first is None else values, strict=True):
        write_tensor(entries[place.key], place.tensor.to_hf(layer))
    if block[0].tensor.is_copy:
        return None
    return part_digest(values, (first or 0, *[0] * values.ndim)[: values.ndim], array.shape)


# Shared --------------------------------------------------------------------------------------------------------------


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


def _cast(stored: np.dtype, dtype: DTypeChoice) -> np.dtype:
    return {"keep": stored, "float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}[dtype]


def _run(jobs: list[Job], work: Partial) -> None:
    """The jobs that an earlier attempt has not finished.

    Raises:
        CheckpointError: the disk has no room for what they write.
    """
    total, left = (sum(size for name, size, _ in jobs if name not in done) for done in ((), work.done))
    free = shutil.disk_usage(work.directory).free
    if left > free:
        raise CheckpointError(
            f"{work.directory}: {left / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free"
        )
    if work.done:
        _log.info("resuming %s after %.0f%%", work.directory, 100 * (total - left) / max(total, 1))
    with progress(total, unit="B", description="converting", done=total - left) as bar:

        def run(name: str, size: int, job: Callable[[], int | None]) -> None:
            work.mark(name, job())
            bar.update(size)

        run_bounded((size, bind(run, name, size, job)) for name, size, job in jobs if name not in work.done)


def _digests(parts: Iterable[tuple[str, int | None]]) -> dict[str, int]:
    """Of every array, from those of its parts; copies have none."""
    found: dict[str, list[int]] = {}
    for name, digest in parts:
        if digest is not None:
            found.setdefault(name, []).append(digest)
    return {name: add_up(digests) for name, digests in found.items()}


def _digest(headers: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(headers).encode()).hexdigest()
