"""Recipes: load `configs/*.py`, apply command-line overrides, show differences, convert to and from JSON.

A recipe is a Python file that assigns a `RunConfig` of some kind to `config`. It is the user's own code and runs like
any script. Configuration read from a checkpoint is only data, and is validated.
"""

import dataclasses
import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tyro

from stepjax.config import PretrainConfig, RunConfig
from stepjax.errors import CheckpointError, ConfigError

# The class of each kind of run; a checkpoint names its kind. Imported on demand: some stand above this file.
KINDS = {
    "pretrain": "stepjax.config:PretrainConfig",
    "sft": "stepjax.config:SftConfig",
    "rl": "stepjax.post_training.config:RLConfig",
}

Config = TypeVar("Config", bound=RunConfig)


def load_recipe(path: str | Path, kind: type[Config] = PretrainConfig) -> Config:
    """The configuration that a recipe file builds.

    Args:
        kind: the class that it must have.

    Raises:
        ConfigError: the file is missing, or does not assign such a configuration to `config`.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        found = ", ".join(sorted(str(p) for p in Path("configs").glob("*/*.py"))) or "none in ./configs"
        raise ConfigError(f"{str(path)!r} is not a recipe file; recipes here: {found}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # A recipe may import files next to it.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"recipe {where} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    config = getattr(module, "config", None)
    if not isinstance(config, kind):
        raise ConfigError(f"recipe {path}: `config` must be of class {kind.__name__}; it is {type(config).__name__}")
    return config


def override(config: Config, arguments: Sequence[str], *, prog: str) -> Config:
    """`config` with `--section.field value` arguments applied; tyro suggests the nearest names for a wrong one.

    Raises:
        SystemExit: after printing why an argument does not parse or the values do not fit together.
    """
    return tyro.cli(type(config), default=config, args=list(arguments), prog=prog, config=(tyro.conf.AvoidSubcommands,))


def to_json(config: RunConfig) -> dict[str, Any]:
    """Plain data that names the kind of run."""
    kind = next(name for name in KINDS if _class(name) is type(config))
    return {"kind": kind, **_adapter(kind).dump_python(config, mode="json")}


def from_json(fields: dict[str, Any]) -> RunConfig:
    """The configuration saved with a checkpoint: the inverse of `to_json`. Without a kind it is of a pretraining run.

    Raises:
        CheckpointError: some fields do not fit this version; names them.
    """
    message = "the checkpoint's configuration does not fit this version of stepjax: "
    fields = {"kind": "pretrain", **fields}
    if fields["kind"] not in KINDS:
        raise CheckpointError(f"{message}kind {fields['kind']!r} is none of {', '.join(KINDS)}")
    try:
        config = _adapter(fields["kind"]).validate_python(fields)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(message + problems) from error
    # Pydantic ignores keys that a dataclass does not have.
    unknown = sorted(_paths(fields) - _paths(to_json(config)))
    if unknown:
        raise CheckpointError(f"{message}unknown {', '.join(unknown)}")
    return config


def _class(kind: str) -> type[RunConfig]:
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _adapter(kind: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(_class(kind))


def _paths(fields: Any, prefix: str = "") -> set[str]:
    """Every key of nested dicts and lists, by its dotted path."""
    items = fields if isinstance(fields, dict) else dict(enumerate(fields)) if isinstance(fields, list) else {}
    paths = {f"{prefix}{key}" for key in items}
    return paths.union(*(_paths(value, f"{prefix}{key}.") for key, value in items.items()))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted path, as on the command line."""
    if dataclasses.is_dataclass(config):
        parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        parts = {str(i): item for i, item in enumerate(config)}
    else:
        return {prefix: config}
    fields = {}
    for name, value in parts.items():
        fields |= flat(value, f"{prefix}.{name}" if prefix else name)
    return fields


def differences(config: RunConfig, preset: RunConfig) -> list[str]:
    """One line per changed field: `optimizer.weight_decay: 0.01 -> 0.1`."""
    old, new = flat(preset), flat(config)
    names = [*new, *(name for name in old if name not in new)]
    absent = "(absent)"
    return [
        f"{name}: {old.get(name, absent)!r} -> {new.get(name, absent)!r}"
        for name in names
        if old.get(name, absent) != new.get(name, absent)
    ]
