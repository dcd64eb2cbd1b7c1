"""A Hugging Face directory: what its model is, where its tensors lie, and the files beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.interop.model_spec import ModelSpec, spec_from_hf
from stepjax.interop.safetensors_file import Entry, check_size, parse_header, read_header, read_tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# Weights in formats that are not read here.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".safetensors")


class HFDirectory:
    """`config.json`, and the tensors in `*.safetensors`: those that the index names, or all if there is none.

    Attributes:
        headers: text of the header of every safetensors file, by its name.
        entries: place and shape of every tensor, by its key.

    Raises:
        CheckpointError: the directory or a file in it is not usable; what is wrong is named.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / CONFIG)
        self.spec: ModelSpec = spec_from_hf(self.config)
        self.headers: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            self.headers[file.name] = read_header(file)
            entries = parse_header(file, self.headers[file.name])
            check_size(file, entries)
            for key in entries.keys() & self.entries.keys():
                raise CheckpointError(
                    f"{key} is in both {self.entries[key].path.name} and {file.name} of {self.path}; remove one of them"
                )
            self.entries |= entries

    def read(self, key: str) -> np.ndarray:
        """One tensor, as it is stored."""
        return read_tensor(key, self.entries[key])

    def _files(self) -> list[Path]:
        if (self.path / INDEX).exists():
            try:
                names = sorted(set(read_json(self.path / INDEX)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{self.path / INDEX} has no usable weight_map; fetch it again") from error
            absent = [name for name in names if not (self.path / name).is_file()]
            if absent:
                raise CheckpointError(f"{self.path / INDEX} names files that are not there: {', '.join(absent)}")
            return [self.path / name for name in names]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} holds no *.safetensors")
        return files


def side_files(path: Path) -> tuple[list[Path], list[str]]:
    """The files of a directory beside its weights (tokenizer, templates, code), and the names of all else in it."""
    files, others = [], []
    for entry in sorted(path.iterdir()):
        if entry.is_file() and entry.suffix not in _OTHER_WEIGHTS:
            files.append(entry)
        elif entry.suffix != ".safetensors" and not entry.name.startswith("."):
            others.append(entry.name)
    return files, others


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is not there, or not a JSON object."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object")
    return fields
