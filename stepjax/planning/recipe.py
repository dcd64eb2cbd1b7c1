"""Write a configuration as a recipe: a Python file that loads another recipe and replaces what differs."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from stepjax.config import PretrainConfig
from stepjax.config_file import load_recipe


def write_recipe(path: Path, original: Path, config: PretrainConfig, headline: str) -> None:
    """Leave `config` at `path`, as the changes that it makes to the recipe `original`.

    Raises:
        ConfigError: `original` is not a recipe.
    """
    base = load_recipe(original)
    relative = os.path.relpath(original.absolute(), path.absolute().parent)
    classes: set[str] = set()
    changed = _expression("base", base, config, classes, 0)
    imports = [f"from stepjax.config import {', '.join(sorted(classes))}"] if classes else []
    text = [
        f'"""{original.name}, laid out by `stepjax plan --search`.',
        "",
        headline.replace('"', "'"),
        '"""',
        "",
        "import dataclasses",
        "from pathlib import Path",
        "",
        *imports,
        "from stepjax.config_file import load_recipe",
        "",
        f"base = load_recipe(Path(__file__).parent / {relative!r})",
        f"config = {changed}",
        "",
    ]
    path.write_text("\n".join(text))
    assert load_recipe(path) == config, f"{path} does not give the configuration back"


def _expression(name: str, old: Any, new: Any, classes: set[str], depth: int) -> str:
    """Python that makes `new`, where `name` is `old`."""
    if old == new:
        return name
    if not (dataclasses.is_dataclass(new) and type(old) is type(new)):
        _collect(new, classes)
        return repr(new)
    indent = "    " * (depth + 1)
    lines = [f"dataclasses.replace(\n{indent}{name},"]
    for field in dataclasses.fields(new):  # type: ignore[arg-type]
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after:
            value = _expression(f"{name}.{field.name}", before, after, classes, depth + 1)
            lines.append(f"{indent}{field.name}={value},")
    return "\n".join([*lines, f"{'    ' * depth})"])


def _collect(value: Any, classes: set[str]) -> None:
    """The names of the configuration classes in a value, which its repr needs."""
    if dataclasses.is_dataclass(value):
        classes.add(type(value).__name__)
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), classes)
    elif isinstance(value, tuple):
        for item in value:
            _collect(item, classes)
