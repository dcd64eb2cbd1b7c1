"""Scores groups of rollouts: a weighted sum of reward functions, computed beside the caller's event loop.

A verdict that fails, or takes too long, is missing: the rollout has no reward, which is not the same as 0. Missing
rewards are counted by function and reason; too many of them stop the run.
"""

import asyncio
import dataclasses
import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stepjax.errors import ConfigError, LimitError, RecordError, StepjaxError
from stepjax.rewards import penalties, registry  # noqa: F401 (penalties registers functions)
from stepjax.rewards.cache import Cache, digest
from stepjax.rewards.config import RewardConfig
from stepjax.rewards.judges import Judge, NoVerdictError
from stepjax.rewards.registry import JUDGE, PREFERENCE, RESERVED, VERIFIER, Record, Reward, named
from stepjax.rewards.verify import verifier_of
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Sampler

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
        counts: "rollouts", "missing" (rollouts without a reward), "missing/NAME" (of each term), "cached" (verdicts
            found), and those of `Judge`.

    Raises:
        ConfigError: a term does not exist, or needs a judge and there is none.
        CheckpointError: the cache cannot be used.
    """

    def __init__(self, config: RewardConfig, *, judge: Sampler | None = None):
        """
        Args:
            judge: samples judgements, in place of the endpoint `config.judge.url`.
        """
        self.config = config
        self.counts = Counter[str]()
        for term in config.terms:
            if term.name not in RESERVED:
                named(term.name)
        self._own = [term for term in config.terms if term.name not in (JUDGE, PREFERENCE)]
        self._own.sort(key=lambda term: term.name != VERIFIER)  # which penalties may follow up
        self._judged = [term.name for term in config.terms if term.name in (JUDGE, PREFERENCE)]
        self._endpoint = None
        if self._judged and judge is None:
            if config.judge.url is None:
                raise ConfigError(
                    f"reward.judge.url=None: the term {self._judged[0]!r} needs a judge; name its endpoint, or its "
                    "checkpoint as reward.judge.run"
                )
            settings = EndpointConfig(url=config.judge.url, model=config.judge.model)
            judge = self._endpoint = EndpointSampler(settings)
        self._cache = Cache(config.cache, config.cache_size)
        self._judge = None if judge is None else Judge(config.judge, judge, self._cache, self.counts)
        self._threads = ThreadPoolExecutor(config.workers, "rewards")
        self._under_way: dict[str, asyncio.Future[float | None]] = {}
        self._missing: deque[str | None] = deque(maxlen=config.missing_window)  # of the last rollouts: why, if it is
        self._told = 0

    async def __aenter__(self) -> "Scorer":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)  # workers end at their limits
        self._cache.close()
        if self._endpoint is not None:
            await self._endpoint.__aexit__()

    async def score(self, groups: Sequence[Group]) -> list[list[Scored]]:
        """
        Raises:
            MissingRewardsError: too many rewards are missing.
        """
        scored = await asyncio.gather(*(self._group(group) for group in groups))
        self._check()
        return scored

    async def _group(self, group: Group) -> list[Scored]:
        record = _without_images(group.record)
        made, judged = await asyncio.gather(
            asyncio.gather(*(self._parts(record, rollout) for rollout in group.rollouts)),
            asyncio.gather(*(self._judgements(name, group) for name in self._judged)),
        )
        for name, values in zip(self._judged, judged, strict=True):
            for (parts, notes), value in zip(made, values, strict=True):
                parts[name] = None if isinstance(value, NoVerdictError) else value
                notes += [f"{name}: {value}"] if isinstance(value, NoVerdictError) else []
        return [self._sum(*each) for each in made]

    async def _judgements(self, name: str, group: Group) -> Sequence[float | NoVerdictError]:
        assert self._judge is not None
        if name == PREFERENCE:
            return await self._judge.win_rates(group.record, group.rollouts)
        return await asyncio.gather(*(self._judge.rate_or_error(group.record, each) for each in group.rollouts))

    async def _parts(self, record: Record, rollout: Rollout) -> tuple[dict[str, float | None], list[str]]:
        parts: dict[str, float | None] = {}
        notes: list[str] = []
        answer = rollout.content.strip()[-_MOST_CHARACTERS:]
        whole = f"{rollout.reasoning or ''}\n{answer}".strip()[-_MOST_CHARACTERS:]

        async def add(name: str, *follows: float) -> None:
            try:
                function = verifier_of(record) if name == VERIFIER else named(name)
                text = whole if function.kind == "penalty" else answer
                parts[name] = await self._value(function, (record, text, *follows))
                notes.extend([f"{name}: {function.name} cannot decide"] if parts[name] is None else [])
            except (LimitError, RecordError) as error:
                parts[name] = None
                notes.append(f"{name}: {error}")

        for term in self._own:
            if term.name == VERIFIER or named(term.name).kind != "follow-up":
                await add(term.name)
                continue
            if VERIFIER not in parts:
                await add(VERIFIER)
            verdict = parts[VERIFIER]
            if verdict is None:
                parts[term.name] = None  # for the same reason
            else:
                await add(term.name, verdict)
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
        value: float | None = 0.0
        for term in self.config.terms:
            part = parts[term.name]
            value = None if value is None or part is None else value + term.weight * part
        self.counts["missing"] += value is None
        self._missing.append("; ".join(notes) if value is None else None)
        return Scored(value, parts, tuple(notes))

    def _check(self) -> None:
        """
        Raises:
            MissingRewardsError: more are missing than the configured share.
        """
        reasons = [reason for reason in self._missing if reason is not None]
        config, count = self.config, self.counts["missing"]
        if len(reasons) > config.max_missing * config.missing_window:
            raise MissingRewardsError(
                f"{len(reasons)} of the last {len(self._missing)} rewards are missing, which is more than "
                f"reward.max_missing={config.max_missing:g} of {config.missing_window}: {_most_frequent(reasons)}"
            )
        if count >= max(1, 2 * self._told):  # less and less often
            self._told = count
            _log.warning("%d of %d rewards are missing: %s", count, self.counts["rollouts"], _most_frequent(reasons))


def _most_frequent(reasons: Sequence[str]) -> str:
    return "; ".join(f"{reason:.500} ({count} times)" for reason, count in Counter(reasons).most_common(3))


def _call(function: Reward, arguments: tuple[Any, ...], deadline: float) -> float | None:
    """
    Raises:
        LimitError: it failed, or took too long.
    """
    if function.kind == "sandbox":
        value = function.function(*arguments, deadline)
    else:
        value = registry.call(function, arguments, seconds=deadline)
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
