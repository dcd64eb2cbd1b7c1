"""A checkpoint that Orbax restores: one that was converted, or one of a training run.

A converted checkpoint:

    DIR/0/state/        the parameters, a zarr array each: "model/decoder/blocks/mlp/up_kernel"
    DIR/0/meta/         JSON, as beside a run's checkpoints; its configuration says what the model is
    DIR/hf/             the files of the Hugging Face directory that are not weights, as they were
    DIR/hf_headers.json the headers of its safetensors files, by file name

Step 0 is a step like any other for `stepjax.training.checkpoint.restore_model`.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import stepjax
from stepjax.config import NumericsConfig, PretrainConfig
from stepjax.config_file import from_json
from stepjax.errors import CheckpointError
from stepjax.interop.hf_directory import CONFIG, is_weights_name, read_json
from stepjax.interop.model_spec import ModelSpec, spec_from_hf, spec_from_json
from stepjax.interop.orbax_arrays import Arrays
from stepjax.interop.safetensors_file import MAX_HEADER
from stepjax.training.checkpoint import FORMAT, MODEL, read_meta, sealed

PREFIX = MODEL
SIDE_FILES = "hf"
HEADERS = "hf_headers.json"


class OrbaxDirectory:
    """A converted checkpoint, a run, its checkpoint directory, or one step of either.

    Attributes:
        path: as it was given, absolute.
        step: the directory of the step.
        run: the configuration of the training run; None for a converted checkpoint.
        side_files: the directory of the files beside the weights; None if there is none.
        headers: text of the safetensors headers that the checkpoint was converted from, by file name.

    Raises:
        CheckpointError: the directory or a file in it is not usable.
    """

    def __init__(self, path: str | Path):
        self.path = directory = Path(path).expanduser().absolute()
        if (directory / "checkpoints").is_dir():
            directory = directory / "checkpoints"
        meta = read_meta(directory)
        is_step = directory.name.isdigit() and (directory / "state").exists()
        self.step = directory if is_step else directory / str(meta["step"])
        self.meta: dict[str, Any] = meta
        config = meta.get("config")
        config = config if isinstance(config, dict) else {}
        self.run: PretrainConfig | None = None
        if "kind" in config:
            self.spec = spec_from_json(config)
        else:
            self.run = from_json(config)
            self.spec = ModelSpec(self.run.model, self.run.images)
        top = self.step.parent
        self.side_files = top / SIDE_FILES if (top / SIDE_FILES).is_dir() else None
        if self.side_files is not None and (self.side_files / CONFIG).exists():
            spec_from_hf(read_json(self.side_files / CONFIG))  # it is exported as it is
        self.headers: dict[str, str] = {}
        if (top / HEADERS).exists():
            self.headers = read_json(top / HEADERS, MAX_HEADER)
            unusable = [n for n, text in self.headers.items() if not is_weights_name(n) or not isinstance(text, str)]
            if unusable:
                raise CheckpointError(f"{top / HEADERS} names no safetensors file in a directory: {unusable[0]!r}")
        self.arrays = Arrays(self.step / "state")

    def digest(self, name: str) -> int | None:
        """Of a stored array; None where an older version wrote the checkpoint."""
        return self.meta["arrays"].get(name, -1) if "arrays" in self.meta else None

    @property
    def numerics(self) -> NumericsConfig | None:
        """What the run computed with."""
        return None if self.run is None else self.run.numerics

    def dtypes(self) -> dict[str, np.dtype]:
        """The stored type of every parameter.

        Raises:
            CheckpointError: the parameters are not those of the configuration; all that differ are named.
        """
        shapes = self.spec.shapes()
        stored = {name.removeprefix(PREFIX) for name in self.arrays.names if name.startswith(PREFIX)}
        problems = [f"missing: {name}" for name in shapes if name not in stored]
        problems += [f"unexpected: {name}" for name in sorted(stored) if name not in shapes]
        found = {}
        for name in shapes.keys() & stored:
            array = self.arrays.open(PREFIX + name)
            if array.shape != shapes[name]:
                problems.append(f"of another shape: {name} {array.shape} (expected {shapes[name]})")
            found[name] = array.dtype.numpy_dtype
        if problems:
            raise CheckpointError(f"{self.step} does not fit its configuration; " + "; ".join(problems))
        return found


def write_meta(step: Path, spec: ModelSpec, digests: dict[str, int]) -> None:
    """The metadata of a converted checkpoint, with the digest of every array, as `read_meta` reads it; and Orbax's own.

    On disk a step counts because it has its name; in an object store, where it may be copied to, it needs the files
    that say so.
    """
    (step / "meta").mkdir(parents=True, exist_ok=True)
    meta = {
        "format": FORMAT,
        "step": int(step.name),
        "config": spec.to_json(),
        "versions": {"stepjax": stepjax.__version__},
        "arrays": {PREFIX + name: digest for name, digest in digests.items()},
    }
    (step / "meta" / "metadata").write_text(json.dumps(sealed(meta)))
    handlers = {
        "state": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
        "meta": "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler",
    }
    now = time.time_ns()
    own = {"item_handlers": handlers, "init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
    own |= {"metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(own))
    for directory in (step / "state", step / "meta", step):
        (directory / "commit_success.txt").write_text("Checkpoint commit was successful.")


def is_orbax(path: Path) -> bool:
    """Whether this looks like anything that `OrbaxDirectory` opens."""
    if (path / "checkpoints").is_dir():
        return True
    return (path / "state").is_dir() or any(
        step.name.isdigit() and (step / "state").is_dir() for step in path.glob("*")
    )
