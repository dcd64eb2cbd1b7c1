"""Reward functions that misbehave."""

import os
import time

from stepjax.errors import RecordError
from stepjax.rewards.registry import Record, reward


@reward("sleeps")
def sleeps(record: Record, text: str) -> float:
    """Says in a file which process hangs."""
    if text == "sleep":
        with open(record["file"], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    return 1.0


@reward("spins")
def spins(record: Record, text: str) -> float:
    return float(7 ** (10**9) if text == "spin" else 1)


@reward("fails")
def fails(record: Record, text: str) -> float | None:
    match text:
        case "raise":
            raise ValueError("no luck")
        case "record":
            raise RecordError("the record has no luck")
        case "die":
            os._exit(3)
        case "fill":
            return float(len(bytes(2**40)))
        case "none":
            return None
    return 0.37


@reward("counted")
def counted(record: Record, text: str) -> float:
    """Adds a line to a file at each call."""
    with open(record["file"], "a") as file:
        file.write("x\n")
    return len(text) / 10


@reward("odd")
def odd(record: Record, text: str) -> float:
    return float("nan")


@reward("short", kind="penalty")
def short(record: Record, text: str) -> float:
    return -1.0 if len(text) < 3 else 0.0


@reward("after", kind="follow-up")
def after(record: Record, text: str, value: float) -> float:
    return value * 2
