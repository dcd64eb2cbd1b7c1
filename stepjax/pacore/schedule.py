"""How many trajectories each round has: K = [K_1, ..., K_R], after which one final call is always made."""

import re

from stepjax.errors import ConfigError

Schedule = tuple[int, ...]

PRESETS: dict[str, Schedule] = {"low": (4,), "medium": (16,), "high": (32, 4)}  # section 3.2 of the report

_NUMBERS = re.compile(r"\s*\d{1,6}\s*(,\s*\d{1,6}\s*)*")


def parse_schedule(text: str) -> Schedule:
    """A preset's name, "none" for the final call alone, or numbers such as "32,4"; the final 1 is left out.

    Raises:
        ConfigError: it is none of them.
    """
    name = text.strip().lower()
    if name in PRESETS:
        return PRESETS[name]
    if name == "none":
        return ()
    numbers = text.strip().removeprefix("[").removesuffix("]")
    if not _NUMBERS.fullmatch(numbers):
        raise ConfigError(f"schedule {text!r}: give numbers such as 32,4, or {', '.join(PRESETS)} or none")
    return check_schedule(tuple(int(number) for number in numbers.split(",")))


def check_schedule(schedule: Schedule) -> Schedule:
    """
    Raises:
        ConfigError: a width is not positive.
    """
    for width in schedule:
        if width < 1:
            raise ConfigError(f"schedule {list(schedule)}: every round needs at least one trajectory")
    return schedule


def num_calls(schedule: Schedule) -> int:
    """With the final one."""
    return sum(schedule) + 1


def show(schedule: Schedule) -> str:
    return ",".join(map(str, schedule)) or "none"
