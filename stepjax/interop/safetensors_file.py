"""Safetensors files, one tensor at a time: the library maps or loads whole files, which counts as used memory.

A file consists of the header's length (8 bytes, little-endian), the header (JSON: key -> dtype, shape, and byte offsets
into the data), and the tensors' data.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from stepjax.errors import CheckpointError
from stepjax.interop.bounds import PIECE_BYTES, file_size, packed, parse_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8}
_BITS |= {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the library's own limit
SHARD_BYTES = 4_500_000_000  # largest exported file

TensorFacts = tuple[str, np.dtype, tuple[int, ...]]  # key, type, shape


@dataclasses.dataclass(frozen=True)
class Entry:
    """Location of a tensor."""

    path: Path
    dtype_name: str  # as in the header
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


# Headers -------------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> str:
    """Reads a file's header text.

    Raises:
        CheckpointError: the file is not a complete safetensors file.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is damaged, or not a safetensors file: its header has {length:,} of {size:,} bytes"
                )
            return file.read(length).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged, or cannot be read: {error}") from error


def parse_header(path: Path, text: str) -> dict[str, Entry]:
    """Parses a header into tensors by key; checks that they are contiguous and that sizes match shapes.

    Raises:
        CheckpointError: the header is malformed.
    """
    first = 8 + len(text.encode())
    entries = {}
    try:
        fields = parse_json(text)
        fields.pop("__metadata__", None)
        for key, field in fields.items():
            start, stop = field["data_offsets"]
            shape, dtype = tuple(field["shape"]), field["dtype"]
            if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
                raise ValueError(f"{key} has the shape {shape} and the offsets {start}, {stop}")
            bits = _BITS.get(dtype)
            if bits is not None and 8 * (stop - start) != bits * math.prod(shape):
                raise ValueError(f"{key} has {stop - start:,} bytes, which is not the size of {dtype}{list(shape)}")
            entries[key] = Entry(path, dtype, shape, first + start, first + stop)
        end = first
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end or entry.stop < end:
                raise ValueError(f"{key} does not begin where the tensor before it ends")
            end = entry.stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its header cannot be used ({error})") from error
    return entries


def check_size(path: Path, entries: dict[str, Entry]) -> None:
    """Raises CheckpointError if the file's size does not match its header."""
    wanted = max((entry.stop for entry in entries.values()), default=None)
    size = path.stat().st_size
    if wanted is not None and size != wanted:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, but its header specifies {wanted:,}; fetch it again"
        )


def make_header(tensors: Iterable[TensorFacts]) -> str:
    """The header for a file with these tensors; wide dtypes come first, so that every tensor is aligned."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        stop = start + dtype.itemsize * math.prod(shape)
        fields[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(fields, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)


def plan_shards(tensors: Iterable[TensorFacts], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Headers by file name, as on the hub: model-00001.safetensors and so on, or just model.safetensors.

    Fills the files in tensor order.
    """
    groups: list[list[TensorFacts]] = [[]]
    used = 0
    for key, dtype, shape in tensors:
        size = dtype.itemsize * math.prod(shape)
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((key, dtype, shape))
        used += size
    if len(groups) == 1:
        return {"model.safetensors": make_header(groups[0])}
    return {f"model-{i:05d}.safetensors": make_header(group) for i, group in enumerate(groups, 1)}


def index_of(headers: dict[str, str]) -> str:
    """The text of model.safetensors.index.json."""
    where, total = {}, 0
    for name, header in headers.items():
        entries = parse_header(Path(name), header)
        where |= dict.fromkeys(entries, name)
        total += sum(entry.nbytes for entry in entries.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


# Tensors -------------------------------------------------------------------------------------------------------------


def read_tensor(key: str, entry: Entry) -> np.ndarray:
    """Reads one tensor into its own memory.

    Raises:
        CheckpointError: its dtype is unsupported, or the file is truncated.
    """
    if entry.dtype_name not in DTYPES:
        raise CheckpointError(f"{key} in {entry.path} is {entry.dtype_name}: only {', '.join(DTYPES)} are read")
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        data = np.fromfile(file, np.uint8, entry.nbytes)
        _drop_from_cache(file, entry)
    if data.nbytes < entry.nbytes:
        raise CheckpointError(f"{entry.path} is damaged: {key} lacks {entry.nbytes - data.nbytes:,} bytes")
    return data.view(DTYPES[entry.dtype_name]).reshape(entry.shape)


def create(path: Path, header: str) -> None:
    """Creates the file at full size, with the header but no tensors; keeps the data of an existing file."""
    data = header.encode()
    size = max((entry.stop for entry in parse_header(path, header).values()), default=8 + len(data))
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(size)


def write_tensor(entry: Entry, values: np.ndarray) -> None:
    """Writes a tensor; it is on disk when this returns. `values` may be a transposed view."""
    assert values.shape == entry.shape, (values.shape, entry)
    with entry.path.open("r+b", buffering=0) as file:
        file.seek(entry.start)
        rows = np.atleast_1d(values)
        for piece in np.array_split(rows, max(1, values.nbytes // PIECE_BYTES)):
            packed(piece, DTYPES[entry.dtype_name]).reshape(-1).view(np.uint8).tofile(file)
        os.fdatasync(file.fileno())
        _drop_from_cache(file, entry)


def _drop_from_cache(file: IO[bytes], entry: Entry) -> None:
    """Drops data used only once from the page cache, so that it does not evict other data."""
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(file.fileno(), entry.start, entry.nbytes, os.POSIX_FADV_DONTNEED)
