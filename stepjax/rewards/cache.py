"""Verdicts by the digest of what they depend on, in SQLite: complete after a kill, bounded, shared by processes."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from PIL import Image

from stepjax.errors import CheckpointError

_CHECKED_EVERY = 1000  # insertions between two checks of the size


class Cache:
    """
    Raises:
        CheckpointError: the file cannot be used.
    """

    def __init__(self, path: str | None, most: int):
        """
        Args:
            path: None: in memory.
            most: verdicts to keep.
        """
        self._path, self._most, self._added = path, most, 0
        try:
            # Autocommit: each verdict is in the log at once. Without syncs, so a power failure may lose the last ones.
            self._file = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=OFF" if path is None else "PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._trim()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._file.close()

    def get(self, key: str) -> Any:
        """None if it is not there."""
        try:
            row = self._file.execute("SELECT value FROM verdicts WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._failure(error) from error
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        try:
            self._file.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, json.dumps(value)))
            self._added += 1
            if self._added % min(_CHECKED_EVERY, self._most) == 0:
                self._trim()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _trim(self) -> None:
        oldest = "SELECT rowid FROM verdicts ORDER BY rowid DESC LIMIT 1 OFFSET ?"
        self._file.execute(f"DELETE FROM verdicts WHERE rowid <= ({oldest})", (self._most,))

    def _failure(self, error: sqlite3.Error) -> CheckpointError:
        return CheckpointError(
            f"the cache of verdicts {self._path} cannot be used: {error}; remove it, or name another"
        )


def digest(*parts: Any) -> str:
    """Of JSON values, which may hold images."""
    hashed = hashlib.blake2b(digest_size=20)
    hashed.update(json.dumps(parts, sort_keys=True, default=_image).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()


def _image(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.blake2b(value.tobytes(), digest_size=20).hexdigest()]
    if isinstance(value, (bytes, bytearray)):
        return hashlib.blake2b(value, digest_size=20).hexdigest()
    return dict(value) if isinstance(value, Mapping) else repr(value)
