"""What requests may call the model: by its name, and by `NAME:pacore-low` and so on, which are answered with PaCoRe."""

import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

from stepjax.pacore.config import PRESETS, Schedule
from stepjax.serving.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Choice:
    """
    Attributes:
        name: as the request spells it, or the model's own.
        schedule: that the name asks for; None where it asks for none.
    """

    name: str
    schedule: Schedule | None = None


class ModelNames:
    def __init__(
        self,
        name: Callable[[], Awaitable[str]],
        *,
        max_context: int | None = None,
        default: Schedule | None = None,
    ):
        """
        Args:
            name: the model's own, which may have to be asked for.
            max_context: of the model, where it is known.
            default: how its own name is answered, where that is with PaCoRe.
        """
        self._name, self._max_context, self._default = name, max_context, default
        self._created = int(time.time())

    async def choose(self, asked: str | None) -> Choice:
        """
        Raises:
            ApiError: 404, another model is asked for; 502, the model's name is not to be had.
        """
        own = await self._name()
        if asked is None or asked == own:
            return Choice(own)
        for preset, schedule in PRESETS.items():
            if asked == _suffixed(own, preset):
                return Choice(asked, schedule)
        message = f"there is no model {asked[:200]!r}; there is {own!r}, and {_suffixed(own, 'low')!r} and the like"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def listed(self) -> list[dict[str, Any]]:
        """As of OpenAI's API, the model's own name first. `pacore` says how a name is answered.

        Raises:
            ApiError: as `choose`.
        """
        own = await self._name()
        names = {own: self._default, **{_suffixed(own, preset): schedule for preset, schedule in PRESETS.items()}}
        return [self._entry(name, schedule) for name, schedule in names.items()]

    def _entry(self, name: str, schedule: Schedule | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": name, "object": "model", "created": self._created, "owned_by": "stepjax"}
        if self._max_context is not None:
            entry["max_model_len"] = self._max_context
        return entry if schedule is None else {**entry, "pacore": {"schedule": list(schedule)}}


def _suffixed(name: str, preset: str) -> str:
    return f"{name}:pacore-{preset}"
