"""Safetensors files, a tensor at a time: the library maps or holds whole files, which counts as memory in use.

A file is the header's length (8 bytes, little-endian), the header (JSON: key -> dtype, shape, and the tensor's place
among the bytes that follow), and the tensors' bytes.
"""

import dataclasses
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from stepjax.errors import CheckpointError
from stepjax.interop.arrays import packed, pieces

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8}
_BITS |= {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_READ_BYTES = 16 << 20  # a call
MAX_HEADER = 100_000_000  # bytes; the library's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    path: Path
    dtype_name: str  # as in the header
    shape: tuple[int, ...]
    start: int  # in the file, in bytes
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def file_size(path: Path) -> int:
    """Of a file that is about to be read.

    Raises:
        CheckpointError: there is none, or it is a pipe, a device or a directory, which might never end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} cannot be read: it is not a regular file")
    return status.st_size


def parse_json(text: str) -> Any:
    """JSON of others: of names given twice, only one would count.

    Raises:
        ValueError: it is malformed, nested too deeply, or gives a name twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in fields if names.count(name) > 1)!r} is given twice")
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_header(path: Path) -> str:
    """The header's text.

    Raises:
        CheckpointError: it is not a whole safetensors file.
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
    """The tensors of a file whose header is `text`, by key: they follow each other, and each has the size of its shape.

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
    """Raises CheckpointError where the file is shorter or longer than its header says."""
    wanted = max((entry.stop for entry in entries.values()), default=None)
    size = path.stat().st_size
    if wanted is not None and size != wanted:
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes and its header asks for {wanted:,}; fetch it again"
        )


def read_tensor(key: str, entry: Entry) -> np.ndarray:
    """One tensor, into memory of its own.

    Raises:
        CheckpointError: its type is not one that we compute with, or its bytes end early.
    """
    if entry.dtype_name not in DTYPES:
        raise CheckpointError(f"{key} in {entry.path} is {entry.dtype_name}: only {', '.join(DTYPES)} are read")
    values = np.empty(entry.shape, DTYPES[entry.dtype_name])
    data = values.reshape(-1).view(np.uint8).data
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while data:
            count = file.readinto(data[:_READ_BYTES])
            if not count:
                raise CheckpointError(f"{entry.path} is damaged: {key} lacks {len(data):,} bytes")
            data = data[count:]
        _forget(file.fileno(), entry.start, entry.nbytes)
    return values


def make_header(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> str:
    """The header of a file that holds these tensors; wide types come first, so that every tensor is aligned."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        stop = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        fields[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(fields, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)


def create(path: Path, header: str) -> None:
    """Make the file in its full size, without the tensors; leave one that is there already."""
    size = max((entry.stop for entry in parse_header(path, header).values()), default=8 + len(header.encode()))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, len(header.encode()).to_bytes(8, "little") + header.encode(), 0)
    finally:
        os.close(descriptor)


def write_tensor(entry: Entry, values: np.ndarray) -> None:
    """Put a tensor into its place; it is on disk when this returns. `values` may be a transposed view."""
    dtype = DTYPES[entry.dtype_name]
    assert values.shape == entry.shape, (values.shape, entry)
    descriptor = os.open(entry.path, os.O_WRONLY)
    try:
        offset = entry.start
        for piece in pieces(values):
            data = packed(piece, dtype).reshape(-1).view(np.uint8).data
            while data:  # a call writes at most 2 GiB
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        os.fdatasync(descriptor)
        _forget(descriptor, entry.start, entry.nbytes)
    finally:
        os.close(descriptor)


def _forget(descriptor: int, start: int, nbytes: int) -> None:
    """Drop what was read or written once from the page cache: it would push out what others need."""
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)
