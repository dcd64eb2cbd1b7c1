"""Sources of records: random access by index, so that shuffling, mixing and resuming need no state.

A record is a dict with an `id` and one of
    messages   a conversation; assistant turns are trained
    text       a raw document, all of it trained
    content    an interleaved document of text and image items, all of its text trained
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from stepjax.config import ArrayRecordSource, DigitsSource, JsonlSource, Source
from stepjax.data.digits import DigitsRecords
from stepjax.errors import RecordError

Record = dict[str, Any]


class Records(Protocol):
    """What Grain needs of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(source: Source, seed: int) -> Records:
    """The records that a source describes.

    Raises:
        RecordError: a file is missing or holds no record.
    """
    match source:
        case DigitsSource():
            return DigitsRecords(source, seed)
        case JsonlSource():
            return JsonlRecords(source.name, source.path)
        case ArrayRecordSource():
            return ArrayRecords(source.name, source.paths)


class JsonlRecords:
    """A JSON Lines file, read by byte offset; only the offsets are held in memory."""

    def __init__(self, name: str, path: str | Path):
        self._name, self._path = name, Path(path)
        try:
            with self._path.open("rb") as file:
                lines = np.fromiter(((len(line), not line.isspace()) for line in file), np.dtype("i8, ?"))
        except OSError as error:
            raise RecordError(f"source {name!r}: {path} cannot be read: {error.strerror}") from error
        lengths, filled = lines["f0"], lines["f1"]
        starts = np.cumsum(lengths) - lengths
        self._starts, self._lengths, self._lines = starts[filled], lengths[filled], np.flatnonzero(filled) + 1
        if not len(self):
            raise RecordError(f"source {name!r}: {path} holds no record")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._lengths[index])
        place = f"line {self._lines[index]} of {self._path}"
        return parse_record(line, f"{self._name}/{index}", place, self._path.parent)


class ArrayRecords:
    """JSON records in ArrayRecord files; image paths are relative to the first file's folder."""

    def __init__(self, name: str, paths: Sequence[str]):
        self._name, self._paths = name, paths
        missing = [path for path in paths if not Path(path).exists()]
        if missing or not paths:
            raise RecordError(
                f"source {name!r}: no such ArrayRecord file: {', '.join(missing) or 'no paths were given'}"
            )
        self._records: Any = grain.sources.ArrayRecordDataSource(list(paths))
        if not len(self):
            raise RecordError(f"source {name!r}: {', '.join(paths)} hold no record")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        place = f"record {index} of {len(self)} in {', '.join(self._paths)}"
        return parse_record(self._records[index], f"{self._name}/{index}", place, Path(self._paths[0]).parent)


def parse_record(line: bytes, name: str, place: str, folder: Path) -> Record:
    """A record from its JSON, with relative image paths resolved against `folder`. `name` is its id if it has none.

    Raises:
        RecordError: the line is no JSON object.
    """
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"record {name} ({place}): not valid JSON ({error}): {line[:80]!r}") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise RecordError(f"record {name} ({place}): a record is a JSON object, this is {kind}: {line[:80]!r}")
    record.setdefault("id", name)
    for content in [record.get("content"), *(_contents(record.get("messages")))]:
        for item in content if isinstance(content, list) else ():
            image = item.get("image") if isinstance(item, dict) else None
            if isinstance(image, str) and not image.startswith(("data:", "http:", "https:")):
                item["image"] = str(folder / image)
    return record


def _contents(messages: Any) -> list[Any]:
    return [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
