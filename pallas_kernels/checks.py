"""Trace-time checks of kernel arguments."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


class ArgumentError(ValueError):
    """An invalid kernel argument. The message names the argument, its value and what to change."""


def check(condition: bool, message: str) -> None:
    """Raise ArgumentError with `message` unless `condition`, which must be known at trace time."""
    if not condition:
        raise ArgumentError(message)


def check_shape(name: str, x: jax.Array, shape: Sequence[int | None], meaning: str) -> None:
    """Refuse an array whose shape differs from `shape` (None: any size); `meaning` names the axes, "[B, T, N, H]"."""
    matches = x.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, x.shape, strict=True))
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    check(matches, f"{name} has shape {tuple(x.shape)}; it must be {meaning} = [{wanted}]")


def check_dtype(name: str, x: jax.Array, *dtypes: Any) -> None:
    """Refuse an array whose dtype is not in `dtypes`."""
    allowed = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
    check(x.dtype in [jnp.dtype(dtype) for dtype in dtypes], f"{name} is {x.dtype}; cast it to one of {allowed}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not in `choices`."""
    check(value in choices, f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
