"""The one registry of reward functions.

A function takes a record and a text and returns a number, or None: no verdict, because what the record gives cannot be
decided. It runs in a process of its own with limits on time and memory, so it must be defined at the top level of a
module that can be imported, such as a file beside the recipe that the recipe imports.

    @reward("even")
    def even(record: Record, text: str) -> float | None:
        number = extraction.whole_number(text)
        return float(number is not None and number % 2 == 0)
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from stepjax.errors import ConfigError
from stepjax.processing import bounded

_IMPORT_SECONDS = 60.0
_MEMORY = 2 << 30  # bytes of a worker; math-verify needs 0.3 GB

Record = Mapping[str, Any]

# Terms of a reward that are no functions of one text: the record's own verifier, and what a judging model does.
VERIFIER, JUDGE, PREFERENCE = RESERVED = ("verifier", "judge", "preference")

# "verifier": decides whether the answer is right, so a record may name it. "sandbox": a verifier that confines what it
# runs by itself, so it needs no process of its own; it also takes the deadline. "penalty": judges another quality, of
# reasoning and answer together. "follow-up": a penalty of the answer that also takes the verifier's value.
Kind = Literal["verifier", "sandbox", "penalty", "follow-up"]


@dataclasses.dataclass(frozen=True)
class Reward:
    """
    Attributes:
        version: part of the key of cached values; raise it when the function changes.
        right: the least value that counts as right in an evaluation.
    """

    name: str
    function: Callable[..., float | None]
    kind: Kind
    version: int
    right: float


REWARDS: dict[str, Reward] = {}


def reward(
    name: str, *, kind: Kind = "verifier", version: int = 1, right: float = 1.0
) -> Callable[[Callable[..., float | None]], Callable[..., float | None]]:
    """Registers a function.

    Raises:
        ConfigError: the name is taken, or other processes cannot import the function.
    """

    def register(function: Callable[..., float | None]) -> Callable[..., float | None]:
        if name in RESERVED:
            raise ConfigError(f"reward {name!r}: the name stands for something else; choose another name")
        known = REWARDS.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ConfigError(f"reward {name!r}: {known.function.__module__} has it already; choose another name")
        if "<locals>" in function.__qualname__ or _folder(function) is None:
            raise ConfigError(
                f"reward {name!r} is defined in {function.__module__}, from where other processes cannot import it: "
                "define it at the top level of a file beside the recipe, and import that in the recipe"
            )
        REWARDS[name] = Reward(name, function, kind, version, right)
        return function

    return register


def named(name: str) -> Reward:
    """
    Raises:
        ConfigError: there is no such function.
    """
    if name not in REWARDS:
        raise ConfigError(
            f"reward {name!r}: choose from {', '.join(sorted(REWARDS))}, or import the module that has it"
        )
    return REWARDS[name]


def call(function: Reward, arguments: tuple[Any, ...], *, seconds: float) -> float | None:
    """Calls the function in another process.

    Args:
        seconds: CPU time; six times that by the clock.

    Raises:
        LimitError: it failed, or took too long.
        StepjaxError: raised by the function.
    """
    where = function.function.__module__, str(_folder(function.function))
    return bounded.call(_call, function.name, where, arguments, seconds=seconds, memory=_MEMORY)


def _call(name: str, where: tuple[str, str], arguments: tuple[Any, ...]) -> float | None:
    if name not in REWARDS:
        sys.path.append(where[1])
        with bounded.extended(_IMPORT_SECONDS):
            importlib.import_module(where[0])
    return REWARDS[name].function(*arguments)


def _folder(function: Callable[..., Any]) -> Path | None:
    """The folder to import the function's module from; None if it is not imported under the name of its file."""
    file = Path(function.__code__.co_filename)
    file = file.parent if file.stem == "__init__" else file.with_suffix("")
    names = function.__module__.split(".")
    return file.parents[len(names) - 1] if list(file.parts[-len(names) :]) == names else None
