"""A Hugging Face directory: its model's configuration, the locations of its tensors, and its side files."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.interop.bounds import read_json
from stepjax.interop.model_spec import spec_from_hf
from stepjax.interop.safetensors_file import Entry, check_size, parse_header, read_header, read_tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Weights in unsupported formats, and copies of weights.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".safetensors", ".bak", ".orig")
_log = logging.getLogger(__name__)


class HFDirectory:
    """`config.json`, and the tensors in safetensors files.

    The index lists the files and each tensor's file. If it is missing, or its files are, `model.safetensors` is read,
    or else all of `model-00001.safetensors`, or `model-00001-of-00009.safetensors`, and so on. Other files are ignored.

    Attributes:
        headers: header text of every safetensors file, by file name.
        entries: location and shape of every tensor, by key.
        origin: what is read, as a text that identifies it.

    Raises:
        CheckpointError: the directory or a file in it is unusable; names the problem.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.origin = str(self.path.absolute())
        self.config = read_json(self.path / CONFIG)
        self.spec = spec_from_hf(self.config)
        self.headers: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        names, chosen = self._names()
        for name in names:
            file = self.path / name
            self.headers[name] = read_header(file)
            entries = parse_header(file, self.headers[name])
            check_size(file, entries)
            for key, entry in entries.items():
                if chosen.get(key, name) != name:
                    continue
                if key in self.entries:
                    raise CheckpointError(
                        f"{key} is in both {self.entries[key].path.name} and {name} of {self.path}, and no {INDEX} "
                        "says which counts; remove one of them"
                    )
                self.entries[key] = entry
        if absent := [key for key in chosen if key not in self.entries]:
            listed = ", ".join(absent[:10])
            raise CheckpointError(
                f"{self.path / INDEX} names tensors that are not in their files: {listed}; fetch it again"
            )

    def read(self, key: str) -> np.ndarray:
        """Reads a tensor as stored."""
        return read_tensor(key, self.entries[key])

    def _names(self) -> tuple[list[str], dict[str, str]]:
        """The files to read, and the file of each tensor in the index."""
        index = self.path / INDEX
        if index.exists():
            chosen = read_json(index).get("weight_map")
            if not isinstance(chosen, dict) or not all(map(is_weights_name, chosen.values())):
                raise CheckpointError(f"{index} has no usable weight_map from tensors to file names; fetch it again")
            names = sorted(set(chosen.values()))
            absent = [name for name in names if not (self.path / name).exists()]
            if names and not absent:
                return names, chosen
            if not (self.path / WHOLE).exists():
                raise CheckpointError(f"{index} names missing files: {', '.join(absent[:10])}")
            _log.warning("%s names missing files and is ignored: %s is read", index, WHOLE)
        if (self.path / WHOLE).exists():
            return [WHOLE], {}
        found = sorted(path.name for path in self.path.glob("*.safetensors"))
        shards = [name for name in found if re.fullmatch(r"model-\d+(-of-\d+)?\.safetensors", name)]
        if not shards:
            there = f"; it has {', '.join(found[:10])}" if found else ""
            raise CheckpointError(f"{self.path} holds no {WHOLE}, {INDEX} or model-00001.safetensors{there}")
        if len({name.partition("-of-")[2] for name in shards}) > 1:
            listed = ", ".join(shards[:20])
            raise CheckpointError(f"{self.path} has no {INDEX}, and files of several sets: {listed}; keep one of them")
        return shards, {}


def is_weights_name(name: Any) -> bool:
    """Whether this is a plain safetensors file name: names from untrusted files may be arbitrary paths."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and len(name.encode()) <= 255
        and not set(name) & set('/\\:*?"<>|')
        and not name.startswith(".")
    )


def side_files(path: Path) -> tuple[list[Path], list[str]]:
    """The side files of a directory (tokenizer, templates, code), and the names of everything else in it.

    Links out of the directory are not followed, since they may point to any file of this machine, except those of the
    hub's cache, from snapshots/COMMIT to blobs. The configuration and the index count as side files.
    """
    files, others = [], []
    inside = Path(os.path.realpath(path))
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    for entry in sorted(path.iterdir()):
        is_ours = entry.name in (CONFIG, INDEX) or Path(os.path.realpath(entry)).is_relative_to(inside)
        if entry.is_file() and is_ours and entry.suffix not in _OTHER_WEIGHTS:
            files.append(entry)
        elif entry.suffix != ".safetensors" and not entry.name.startswith("."):
            others.append(entry.name)
    return files, others
