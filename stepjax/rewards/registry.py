"""The one registry of reward functions.

A function takes a record and a text and returns a number, or None: no verdict, because what the record gives cannot be
decided. It runs in a process of its own with limits on time and memory, so it must be defined at the top level of a
module that can be imported.

    @reward("even")
    def even(record: Record, text: str) -> float | None:
        number = extraction.whole_number(text)
        return float(number is not None and number % 2 == 0)
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from stepjax.errors import ConfigError

Record = Mapping[str, Any]

# "verifier": decides whether the answer is right, so a record may name it. "penalty": judges another quality.
# "follow-up": a penalty that also takes the verifier's value. "sandbox": a verifier that confines what it runs by
# itself, so it needs no process of its own.
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
        known = REWARDS.get(name)
        if known is not None and known.function.__module__ != function.__module__:
            raise ConfigError(f"reward {name!r}: {known.function.__module__} has it already; choose another name")
        if "<locals>" in function.__qualname__ or function.__module__ == "__main__":
            raise ConfigError(f"reward {name!r}: define it at the top level of a module that can be imported")
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
