"""Scores groups of rollouts: a weighted sum of reward functions, computed beside the caller's event loop.

A verdict that fails, or takes too long, is missing: the rollout has no reward, which is not the same as 0. Missing
rewards are counted by function and reason; too many of them stop the run.
"""

import asyncio
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stepjax.errors import ConfigError, LimitError, RecordError, StepjaxError
from stepjax.processing import bounded
from stepjax.rewards.cache import Cache, digest
from stepjax.rewards.config import VERIFIER, RewardConfig
from stepjax.rewards.registry import Record, Reward, named
from stepjax.rewards.verify import verifier_of
from stepjax.rollouts.rollout import Rollout

_MEMORY = 2 << 30  # bytes of a worker; math-verify needs 0.3 GB
_MOST_CHARACTERS = 1_000_000  # the end of a longer answer is scored

_log = logging.getLogger(__name__)


class MissingRewardsError(StepjaxError):
    """Too many rollouts have no reward."""


@dataclasses.dataclass(frozen=True)
class Group:
    """
    Attributes:
        record: the question; `verifier`, `task` and `answer` say how it is verified.
    """

    record: dict[str, Any]
    rollouts: Sequence[Rollout]


@dataclasses.dataclass(frozen=True)
class Scored:
    """
    Attributes:
        value: the weighted sum of the parts; None if a part is missing.
        parts: the value of each term.
        notes: why parts are missing.
    """

    value: float | None
    parts: dict[str, float | None]
    notes: tuple[str, ...] = ()


class Scorer:
    """Used as `async with Scorer(config) as scorer:`.

    Attributes:
        counts: "rollouts", "missing" (rollouts without a reward), "cached" (verdicts found), "missing/NAME" (of each
            function).

    Raises:
        ConfigError: a term does not exist, or cannot be computed on this machine.
        CheckpointError: the cache cannot be used.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        self.counts = Counter[str]()
        for term in config.terms:
            if term.name != VERIFIER:
                named(term.name)
        self._cache = Cache(config.cache, config.cache_size)
        self._threads = ThreadPoolExecutor(config.workers, "rewards")
        self._under_way: dict[str, asyncio.Future[float | None]] = {}

    async def __aenter__(self) -> "Scorer":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)  # workers end at their limits
        self._cache.close()

    async def score(self, groups: Sequence[Group]) -> list[list[Scored]]:
        """
        Raises:
            MissingRewardsError: more rewards are missing than `max_missing` allows.
        """
        scored = await asyncio.gather(*(self._group(group) for group in groups))
        self._check(scored)
        return scored

    async def _group(self, group: Group) -> list[Scored]:
        record = _without_images(group.record)
        parts = await asyncio.gather(*(self._parts(record, rollout) for rollout in group.rollouts))
        return [self._sum(*each) for each in parts]

    async def _parts(self, record: Record, rollout: Rollout) -> tuple[dict[str, float | None], list[str]]:
        parts: dict[str, float | None] = {}
        notes: list[str] = []
        text = rollout.content[-_MOST_CHARACTERS:].strip()
        for term in sorted(self.config.terms, key=lambda term: term.name != VERIFIER):
            try:
                function = verifier_of(record) if term.name == VERIFIER else named(term.name)
                arguments: tuple[Any, ...] = (record, text)
                if function.kind == "follow-up":
                    if VERIFIER not in parts:
                        parts[VERIFIER] = await self._value(verifier_of(record), arguments)
                    if parts[VERIFIER] is None:
                        parts[term.name] = None
                        continue
                    arguments += (parts[VERIFIER],)
                parts[term.name] = await self._value(function, arguments)
                if parts[term.name] is None:
                    notes.append(f"{term.name}: {function.name} cannot decide")
            except (LimitError, RecordError) as error:
                parts[term.name] = None
                notes.append(f"{term.name}: {error}")
        return parts, notes

    async def _value(self, function: Reward, arguments: tuple[Any, ...]) -> float | None:
        """
        Raises:
            LimitError, RecordError: it is missing.
        """
        key = digest(function.name, function.version, arguments)
        value = self._cache.get(key)
        if value is not None:
            self.counts["cached"] += 1
            return value
        if key not in self._under_way:
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._threads, _call, function, arguments, self.config.deadline)
            self._under_way[key] = future
            future.add_done_callback(lambda _: self._under_way.pop(key, None))
        value = await asyncio.shield(self._under_way[key])
        if value is not None:
            self._cache.put(key, value)
        return value

    def _sum(self, parts: dict[str, float | None], notes: Sequence[str]) -> Scored:
        self.counts["rollouts"] += 1
        self.counts.update(f"missing/{name}" for name, value in parts.items() if value is None)
        values = [(term.weight, parts[term.name]) for term in self.config.terms]
        if any(value is None for _, value in values):
            self.counts["missing"] += 1
            return Scored(None, parts, tuple(notes))
        return Scored(sum(weight * value for weight, value in values if value is not None), parts, tuple(notes))

    def _check(self, scored: Sequence[Sequence[Scored]]) -> None:
        everyone = [each for group in scored for each in group]
        missing = [each for each in everyone if each.value is None]
        if not missing:
            return
        reasons = Counter(note for each in missing for note in each.notes).most_common(3)
        told = "; ".join(f"{note} ({count} times)" for note, count in reasons)
        if len(missing) > max(1, self.config.max_missing * len(everyone)):
            raise MissingRewardsError(
                f"{len(missing)} of {len(everyone)} rewards are missing, and reward.max_missing="
                f"{self.config.max_missing:g}: {told}"
            )
        _log.warning("%d of %d rewards are missing: %s", len(missing), len(everyone), told)


def _call(function: Reward, arguments: tuple[Any, ...], deadline: float) -> float | None:
    """
    Raises:
        LimitError: it failed, or took too long.
    """
    if function.kind == "sandbox":
        value = function.function(*arguments, deadline)
    else:
        value = bounded.call(function.function, *arguments, seconds=deadline, memory=_MEMORY)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"reward {function.name!r} returned {value!r:.100}: it must return a finite number, or None")
    return float(value)


def _without_images(record: Record) -> dict[str, Any]:
    """Without images, which verifiers do not see, and which take long to copy to another process."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        return dict(record)
    return {**record, "messages": [_without_image(message) for message in messages]}


def _without_image(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [item for item in content if isinstance(item, dict) and item.get("type") == "text"]}
