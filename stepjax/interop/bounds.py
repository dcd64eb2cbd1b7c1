"""Limits on untrusted files and on the memory of tensors in flight."""

import concurrent.futures
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import CheckpointError

MAX_JSON = 64 << 20  # bytes per file; indices and configurations have up to ten million
WORKERS = 3
BYTES_IN_FLIGHT = 768 << 20
PIECE_BYTES = 128 << 20  # the largest matrix of a layer of the 10B model has 101 million
_RUN_BYTES = 16  # bytes of a row copied at a time

# Files ---------------------------------------------------------------------------------------------------------------


def file_size(path: Path) -> int:
    """The size of a regular file; a pipe or a device might never end.

    Raises:
        CheckpointError: the file does not exist or is not a regular file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} cannot be read: it is not a regular file")
    return status.st_size


def read_text(path: Path, limit: int) -> str:
    """Raises CheckpointError if the file is missing, not regular, larger than `limit` bytes, or not text."""
    size = file_size(path)
    if size > limit:
        raise CheckpointError(f"{path} cannot be read: it has {size:,} bytes, more than the limit of {limit:,}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError as `read_text`, and for any other or malformed JSON."""
    text = read_text(path, limit)
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object")
    return fields


def parse_json(text: str) -> Any:
    """Parses JSON and refuses duplicate names, of which only one value would count.

    Raises:
        ValueError: the text is malformed, nested too deeply, or has duplicate names.
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


# Memory --------------------------------------------------------------------------------------------------------------


def run_bounded(jobs: Iterable[tuple[int, Callable[[], None]]]) -> None:
    """Runs (size in bytes, function) jobs in a few threads, with at most `BYTES_IN_FLIGHT` at a time.

    A larger job runs alone. The first error is raised. Reading, transposing and writing overlap: all three release the
    GIL.
    """
    waiting: dict[concurrent.futures.Future[None], int] = {}

    def settle(budget: int) -> None:
        while waiting and sum(waiting.values()) > budget:
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                del waiting[future]
                future.result()

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            for size, job in jobs:
                settle(max(0, BYTES_IN_FLIGHT - size))
                waiting[pool.submit(job)] = size
            settle(0)
        finally:
            pool.shutdown(cancel_futures=True)


def packed(view: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """The values as a contiguous array, optionally cast; a view that is already contiguous is not copied.

    Copies a transposed view a few columns at a time: a plain NumPy copy misses the cache at every value.
    """
    if not view.flags.c_contiguous:
        # NumPy copies the bits of extension types such as bfloat16 faster as integers.
        bits = view.view(f"u{view.itemsize}") if view.dtype.kind == "V" else view
        copy = np.empty(bits.shape, bits.dtype)
        step = max(1, _RUN_BYTES // view.itemsize)
        for column in range(0, bits.shape[-1], step):
            copy[..., column : column + step] = bits[..., column : column + step]
        view = copy.view(view.dtype)
    return view if dtype in (None, view.dtype) else view.astype(dtype)
