"""Sources of records: random access by index, so that shuffling, mixing and resuming need no state.

A record is a dict with an `id` and one of
    messages   a conversation; assistant turns are trained, but not those with `"train": false`
    text       a raw document, all of it trained
    content    an interleaved document of text and image items, all of its text trained

plus `images` if the text has places for them (processing.processor). Image paths are relative to the file; `file://`
URIs count as paths.
"""

import hashlib
import json
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import grain
import numpy as np

from stepjax.config import ArrayRecordSource, DigitsSource, DocumentsSource, JsonlSource, Source, SynthesisSource
from stepjax.data.digits import DigitsRecords
from stepjax.data.documents import DocumentsRecords
from stepjax.data.synthesis import SynthesisRecords
from stepjax.errors import RecordError, TokenError
from stepjax.processing.processor import place_images

Record = dict[str, Any]

MAX_RECORD = 64 << 20  # bytes of JSON per record
_PIECE = 1 << 20  # bytes read at a time when looking for lines
_BLOCK, _NUM_BLOCKS = 1 << 20, 64  # of a file's digest

_URL = re.compile("[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Records(Protocol):
    """The interface of a source: what Grain and a resumed run need."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def files(self) -> list[dict[str, Any]]:
        """Path, size, digest and number of records per file, as JSON-compatible values."""
        ...


def open_source(source: Source, seed: int) -> Records:
    """Opens a source.

    Raises:
        RecordError: a file is missing or holds no record.
    """
    match source:
        case DigitsSource():
            return DigitsRecords(source, seed)
        case DocumentsSource():
            return DocumentsRecords(source, seed)
        case JsonlSource():
            return JsonlRecords(source.name, source.path)
        case ArrayRecordSource():
            return ArrayRecords(source.name, source.paths)
        case SynthesisSource():
            return SynthesisRecords(source, seed, JsonlRecords(source.name, source.path))


class JsonlRecords:
    """A JSON Lines file, read by byte offset; only the offsets stay in memory."""

    def __init__(self, name: str, path: str | Path):
        self._name, self._path = name, Path(path)
        try:
            _check_regular(self._path)
            with self._path.open("rb") as file:
                lines = np.fromiter(_lines(file), np.dtype("i8, ?"))
        except OSError as error:
            raise RecordError(f"source {name!r}: {path} cannot be read: {error.strerror}") from error
        lengths, filled = lines["f0"], lines["f1"]
        starts = np.cumsum(lengths) - lengths
        self._starts, self._lengths, self._lines = starts[filled], lengths[filled], np.flatnonzero(filled) + 1
        if not len(self):
            raise RecordError(f"source {name!r}: {path} holds no record")
        first = self._bytes(0).removeprefix(b"\xef\xbb\xbf").strip()
        if first.startswith(b"[") and (len(self) == 1 or not first.endswith(b"]")):
            raise RecordError(
                f"source {name!r}: {path} is a JSON array; write one object a line (jq -c '.[]' FILE > FILE.jsonl)"
            )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        place = f"line {self._lines[index]} of {self._path}"
        return parse_record(self._bytes(index), f"{self._name}/{index}", place, self._path.parent)

    def files(self) -> list[dict[str, Any]]:
        # Line lengths reveal lines inserted or removed between the digest's blocks of a large file.
        return [_described(self._path, len(self), self._lengths.tobytes())]

    def _bytes(self, index: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return file.read(min(self._lengths[index], MAX_RECORD + 1))


class ArrayRecords:
    """JSON records in ArrayRecord files; image paths are relative to the first file's folder."""

    def __init__(self, name: str, paths: Sequence[str]):
        self._name, self._paths = name, paths
        missing = [path for path in paths if not Path(path).exists()]
        if missing or not paths:
            raise RecordError(
                f"source {name!r}: no such ArrayRecord file: {', '.join(missing) or 'no paths were given'}"
            )
        try:
            for path in paths:
                _check_regular(Path(path))
            self._records: Any = grain.sources.ArrayRecordDataSource(list(paths))
            size = len(self)
        except (OSError, RuntimeError) as error:
            raise RecordError(f"source {name!r}: {', '.join(paths)} cannot be read: {error}") from error
        if not size:
            raise RecordError(f"source {name!r}: {', '.join(paths)} hold no record")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        name = f"{self._name}/{index}"
        place = f"record {index} of {len(self)} in {', '.join(self._paths)}"
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise RecordError(f"record {name} ({place}): the file is damaged: {error}") from error
        return parse_record(record, name, place, Path(self._paths[0]).parent)

    def files(self) -> list[dict[str, Any]]:
        return [_described(Path(path), len(self)) for path in self._paths]


def parse_record(line: bytes, name: str, place: str, folder: Path) -> Record:
    """Parses a record and resolves relative image paths against `folder`. `name` is its id if it has none.

    Raises:
        RecordError: the line is not a JSON object, or it is unclear which image goes where.
    """

    def refuse(problem: str) -> RecordError:
        return RecordError(f"record {name} ({place}): {problem}: {line[:80]!r}")

    if len(line) > MAX_RECORD:
        raise refuse(f"it has more than {MAX_RECORD >> 20} MiB; keep images in files of their own")
    try:
        record = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        if _SURROGATE.search(line):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise refuse("it has half a surrogate pair, which is not a character") from error
    except RecursionError as error:
        raise refuse("not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise refuse(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise refuse(f"a record is a JSON object, this is {type(record).__name__}")
    if record.get("id") is None:
        record["id"] = name
    elif type(record["id"]) is int:
        record["id"] = str(record["id"])
    elif not isinstance(record["id"], str) or not record["id"]:
        raise refuse(f"its id is {record['id']!r}: must be a string or an integer")
    try:
        record = place_images(record)
    except TokenError as error:
        raise refuse(str(error)) from error
    for content in [record.get("content"), *(_contents(record.get("messages")))]:
        for item in content if isinstance(content, list) else ():
            image = item.get("image") if isinstance(item, dict) else None
            if isinstance(image, str):
                item["image"] = _located(image, folder)
    return record


def _contents(messages: Any) -> list[Any]:
    return [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []


def _located(image: str, folder: Path) -> str:
    """An image's path. Data URIs and other URLs are returned unchanged; `open_image` refuses the latter."""
    if image[:7].lower() == "file://":
        return str(folder / urllib.parse.unquote(image[7:].removeprefix("localhost")))
    return image if image[:5].lower() == "data:" or _URL.match(image) else str(folder / image)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the key {next(key for key, _ in pairs if key in seen or seen.add(key))!r} is given twice")
    return fields


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_regular(path: Path) -> None:
    """Refuses pipes and devices: reading one could block or run for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(0, "a directory" if stat.S_ISDIR(mode) else "not a regular file", str(path))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Yields the length of every line and whether it is non-blank."""
    length, filled = 0, False
    while piece := file.readline(_PIECE):
        length, filled = length + len(piece), filled or not piece.isspace()
        if piece.endswith(b"\n"):
            yield length, filled
            length, filled = 0, False
    if length:
        yield length, filled


def _described(path: Path, num_records: int, more: bytes = b"") -> dict[str, Any]:
    """The digest covers the whole file up to 64 MiB. For larger files it covers 64 evenly spaced blocks from the first
    byte to the last, so terabytes are not read twice; appending to or replacing a file changes its size or ends."""
    size = os.stat(path).st_size
    digest = hashlib.blake2b(more, digest_size=16)
    with open(path, "rb") as file:
        last = max(size - _BLOCK, 0)
        whole = size <= _BLOCK * _NUM_BLOCKS
        starts = range(0, size, _BLOCK) if whole else [last * i // (_NUM_BLOCKS - 1) for i in range(_NUM_BLOCKS)]
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return {"path": str(path), "bytes": size, "records": num_records, "digest": digest.hexdigest()}
