"""Recipes: load `configs/*.py`, apply command-line overrides, show differences, convert to and from JSON.

A recipe is a Python file that assigns a `PretrainConfig` to `config`. It is the user's own code and runs like any
script. Configuration read from a checkpoint is only data, and is validated.
"""

import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import tyro

from stepjax.config import PretrainConfig
from stepjax.errors import CheckpointError, ConfigError

_TYPE = pydantic.TypeAdapter(PretrainConfig)


def load_recipe(path: str | Path) -> PretrainConfig:
    """The configuration that a recipe file builds.

    Raises:
        ConfigError: the file is missing, or does not assign a PretrainConfig to `config`.
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
    if not isinstance(config, PretrainConfig):
        raise ConfigError(f"recipe {path} must assign a PretrainConfig to `config`; it is {type(config).__name__}")
    return config


def override(config: PretrainConfig, arguments: Sequence[str], *, prog: str) -> PretrainConfig:
    """`config` with `--section.field value` arguments applied; tyro suggests the nearest names for a wrong one.

    Raises:
        SystemExit: after printing why an argument does not parse or the values do not fit together.
    """
    return tyro.cli(
        PretrainConfig, default=config, args=list(arguments), prog=prog, config=(tyro.conf.AvoidSubcommands,)
    )


def to_json(config: PretrainConfig) -> dict[str, Any]:
    return _TYPE.dump_python(config, mode="json")


def from_json(fields: dict[str, Any]) -> PretrainConfig:
    """The configuration saved with a checkpoint.

    Raises:
        CheckpointError: some fields do not fit this version; names them.
    """
    message = "the checkpoint's configuration does not fit this version of stepjax: "
    try:
        config = _TYPE.validate_python(fields)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(message + problems) from error
    # Pydantic ignores keys that a dataclass does not have.
    unknown = sorted(_paths(fields) - _paths(to_json(config)))
    if unknown:
        raise CheckpointError(f"{message}unknown {', '.join(unknown)}")
    return config


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


def differences(config: PretrainConfig, preset: PretrainConfig) -> list[str]:
    """One line per changed field: `optimizer.weight_decay: 0.01 -> 0.1`."""
    old, new = flat(preset), flat(config)
    names = [*new, *(name for name in old if name not in new)]
    absent = "(absent)"
    return [
        f"{name}: {old.get(name, absent)!r} -> {new.get(name, absent)!r}"
        for name in names
        if old.get(name, absent) != new.get(name, absent)
    ]
