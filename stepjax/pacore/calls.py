"""One call of the model, tried until it succeeds or there is no point. A failure is a record, not an exception."""

import asyncio
import dataclasses
import functools
import hashlib
import json
import logging
import random
import time

from stepjax.errors import StepjaxError
from stepjax.inference.request import EngineFailedError
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.events import AttemptFailed, Notify, TrajectoryPiece
from stepjax.pacore.records import Attempt, Status, Trajectory
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, PreparedPrompt, Sampler, SamplerError

_log = logging.getLogger("stepjax.pacore")

_SEED_BITS = 53  # that JSON numbers hold exactly everywhere


def derived_seed(*address: object) -> int:
    """A seed that depends on its address alone, such as (seed, problem, sample, round, index)."""
    digest = hashlib.blake2b(json.dumps(address).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**_SEED_BITS


class Caller:
    """The calls of one problem."""

    def __init__(
        self, sampler: Sampler, config: PacoreConfig, address: tuple[object, ...], *, begin: float, notify: Notify
    ):
        """
        Args:
            address: what seeds derive from, with round, index and try.
            begin: of the problem, by `time.monotonic`.
        """
        self._sampler, self._config, self._address, self._notify = sampler, config, address, notify
        self._begin = begin
        self._under_way: dict[tuple[int, int], tuple[Trajectory, Listener]] = {}

    async def call(
        self, prompt: PreparedPrompt, round_number: int, index: int, *, insists: bool, tells_pieces: bool
    ) -> Trajectory:
        """
        Args:
            insists: a sample without an answer is drawn again, as one that failed.
            tells_pieces: observers are told of what is being written.
        """
        limits, attempts = self._config.limits, []
        at = (round_number, index)
        while True:
            trajectory = Trajectory(
                round=round_number,
                index=index,
                status="cancelled",
                seed=derived_seed(*self._address, round_number, index, len(attempts)),
                prompt_tokens=prompt.num_tokens or 0,
                start=time.monotonic() - self._begin,
                attempts=tuple(attempts),
            )

            def tell(piece: dict) -> None:
                self._notify(TrajectoryPiece(round_number, index, piece))

            limit = asyncio.timeout(None)  # that of the call runs from when it is sent
            listener = Listener(tell if tells_pieces else None, at=at, on_begin=functools.partial(self._limit, limit))
            self._under_way[at] = trajectory, listener
            ended = await self._try(prompt, trajectory, listener, limit)
            if isinstance(ended, Trajectory) and not (insists and _has_no_answer(ended)):
                del self._under_way[at]
                return ended
            trajectory = self._timed(trajectory, listener)
            failure, attempt = _as_attempt(ended, trajectory.seconds, listener.num_tokens)
            self._notify(AttemptFailed(round_number, index, attempt))
            is_hopeless = isinstance(ended, BaseException) and not _is_temporary(ended)
            # What an observer has shown of an answer cannot be taken back and written anew.
            if is_hopeless or len(attempts) == limits.retries or listener.has_answer:
                del self._under_way[at]
                if isinstance(ended, Trajectory):
                    return ended
                return dataclasses.replace(
                    trajectory, status=failure, error=attempt.error, attempts=(*attempts, attempt)
                )
            attempts.append(attempt)
            self._under_way[at] = dataclasses.replace(trajectory, attempts=tuple(attempts)), Listener(at=at)
            longest = min(limits.backoff_seconds * 2 ** (len(attempts) - 1), limits.max_backoff_seconds)
            asked = ended.retry_after if isinstance(ended, SamplerError) else None
            await asyncio.sleep(max(random.uniform(0.5, 1) * longest, min(asked or 0, limits.max_backoff_seconds)))

    def cancelled(self, round_number: int, index: int) -> Trajectory:
        """The record of a call whose task has been cancelled, under way or before it began."""
        if (round_number, index) not in self._under_way:
            now = time.monotonic() - self._begin
            return Trajectory(round=round_number, index=index, status="cancelled", start=now)
        trajectory, listener = self._under_way.pop((round_number, index))
        return dataclasses.replace(self._timed(trajectory, listener), output_tokens=listener.num_tokens)

    def _limit(self, limit: asyncio.Timeout) -> None:
        seconds = self._config.limits.call_seconds
        if seconds is not None:
            limit.reschedule(asyncio.get_running_loop().time() + seconds)

    def _timed(self, trajectory: Trajectory, listener: Listener) -> Trajectory:
        """With the time since it was sent."""
        start = trajectory.start if listener.began is None else listener.began - self._begin
        return dataclasses.replace(trajectory, start=start, seconds=time.monotonic() - self._begin - start)

    async def _try(
        self, prompt: PreparedPrompt, trajectory: Trajectory, listener: Listener, limit: asyncio.Timeout
    ) -> Trajectory | Exception:
        params = dataclasses.replace(self._config.sampling, seed=trajectory.seed)
        try:
            async with limit:
                rollout = await self._sampler.sample(prompt, params, listener)
        except (SamplerError, TimeoutError, StepjaxError) as error:
            return error
        except EngineFailedError:  # every other call would fail, too, and all would be journaled
            raise
        except Exception as error:  # of a broken sampler: no reason to lose the problem
            _log.exception("a call failed unexpectedly")
            return error
        return _ended(self._timed(trajectory, listener), rollout)


def _ended(trajectory: Trajectory, rollout: Rollout) -> Trajectory:
    return dataclasses.replace(
        trajectory,
        status="ok",
        content=rollout.content,
        reasoning=rollout.reasoning,
        tool_calls=rollout.tool_calls,
        finish_reason=rollout.finish_reason,
        prompt_tokens=rollout.num_prompt_tokens,
        cached_tokens=rollout.num_cached_tokens,
        output_tokens=rollout.num_tokens,
        mean_logprob=rollout.mean_logprob,
    )


def _has_no_answer(trajectory: Trajectory) -> bool:
    return not trajectory.content.strip() and not trajectory.tool_calls


def _as_attempt(ended: Trajectory | Exception, seconds: float, tokens: int) -> tuple[Status, Attempt]:
    if isinstance(ended, Trajectory):
        status = "truncated" if ended.finish_reason == "length" else "empty"
        error = f"the model wrote no answer (finish_reason {ended.finish_reason!r})"
        return "ok", Attempt(status=status, error=error, seconds=seconds, output_tokens=ended.output_tokens)
    status = "timeout" if isinstance(ended, TimeoutError) else "error"
    error = str(ended) or ("no answer in time" if status == "timeout" else type(ended).__name__)
    lost = max(tokens, ended.num_tokens if isinstance(ended, SamplerError) else 0)
    return status, Attempt(status=status, error=error[:2000], seconds=seconds, output_tokens=lost)


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, SamplerError):
        return error.is_temporary
    return not isinstance(error, StepjaxError)
