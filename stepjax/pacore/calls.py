"""The calls of a problem. A call is retried while that makes sense; failures become records, not exceptions.

Samplers do not retry. Here every attempt has its own seed and is counted and journaled with its tokens.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import random
import time

from stepjax.errors import StepjaxError
from stepjax.inference.request import EngineFailedError
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import Attempt, AttemptFailed, Notify, Status, Trajectory, TrajectoryPiece
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import Listener, Piece, PreparedPrompt, Sampler, SamplerError

_log = logging.getLogger(__name__)

_SEED_BITS = 53  # JSON numbers are exact up to here everywhere


def derived_seed(*address: object) -> int:
    """A seed that depends only on its address, e.g. (seed, problem, sample, round, index)."""
    digest = hashlib.blake2b(json.dumps(address).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**_SEED_BITS


class Calls:
    """
    Attributes:
        was_shown: observers have seen part of an answer that then broke off.
    """

    def __init__(
        self, sampler: Sampler, config: PacoreConfig, address: tuple[object, ...], *, begin: float, notify: Notify
    ):
        """
        Args:
            address: seeds derive from it, plus round, index and attempt.
            begin: when the problem began, by `time.monotonic`.
        """
        self._sampler, self._config, self._address, self._notify = sampler, config, address, notify
        self._begin = begin
        self._under_way: dict[tuple[int, int], Listener] = {}
        self.was_shown = False

    def tokens_under_way(self) -> dict[tuple[int, int], int]:
        """Tokens so far of the calls in progress, by (round, index)."""
        return {at: listener.num_tokens for at, listener in sorted(self._under_way.items())}

    async def call(
        self, prompt: PreparedPrompt, at: tuple[int, int], *, insists: bool, tells_pieces: bool
    ) -> Trajectory:
        """Makes a call, with retries. A cancelled task still returns a record of the call so far.

        Args:
            at: round and index.
            insists: a rollout without an answer counts as a failed attempt.
            tells_pieces: notify observers of streamed pieces.
        """
        limits, attempts = self._config.limits, list[Attempt]()
        listener, seed, began = Listener(), 0, time.monotonic()

        def tell(piece: Piece) -> None:
            self._notify(TrajectoryPiece(*at, piece))

        def record(status: Status, rollout: Rollout | None = None, *, num_tokens: int = 0) -> Trajectory:
            if rollout is None:
                known = prompt.num_tokens or 0
                rollout = Rollout(finish_reason=status, num_prompt_tokens=known, num_tokens=num_tokens)
            sent = began if listener.began is None else listener.began
            times = {"start": sent - self._begin, "seconds": time.monotonic() - sent}
            rollout = dataclasses.replace(rollout.without_tokens(), seed=seed, **times)
            return Trajectory(round=at[0], index=at[1], status=status, rollout=rollout, attempts=tuple(attempts))

        try:
            while True:
                seed, began = derived_seed(*self._address, *at, len(attempts)), time.monotonic()
                limit = asyncio.timeout(None)  # set when the call is sent
                listener = Listener(tell if tells_pieces else None, on_begin=lambda limit=limit: self._limit(limit))
                self._under_way[at] = listener
                error: Exception | None = None
                try:
                    params = dataclasses.replace(self._config.sampling, seed=seed)
                    async with limit:
                        rollout = await self._sampler.sample(prompt, params, listener)
                    made = record("ok", rollout)
                    if rollout.has_answer or not insists:
                        return made
                except EngineFailedError:  # every other call would fail too, and be journaled
                    raise
                except Exception as failure:
                    if not isinstance(failure, (SamplerError, TimeoutError, StepjaxError)):
                        _log.exception("a call failed unexpectedly")  # a bug must not lose the problem
                    error, made = failure, record("timeout" if isinstance(failure, TimeoutError) else "error")
                attempts.append(_attempt(made, error, listener.num_tokens))
                if error is not None:
                    made = dataclasses.replace(made, error=attempts[-1].error, attempts=tuple(attempts))
                self._notify(AttemptFailed(*at, attempts[-1]))
                # An answer that observers have seen in part cannot be restarted.
                self.was_shown |= listener.has_answer
                if listener.has_answer or not _is_temporary(error) or len(attempts) > limits.retries:
                    return made
                listener, began = Listener(), time.monotonic()
                self._under_way[at] = listener
                await asyncio.sleep(self._pause(len(attempts), error))
        except asyncio.CancelledError:
            return record("cancelled", num_tokens=listener.num_tokens)
        finally:
            self._under_way.pop(at, None)

    def _limit(self, limit: asyncio.Timeout) -> None:
        seconds = self._config.limits.call_seconds
        if seconds is not None:
            limit.reschedule(asyncio.get_running_loop().time() + seconds)

    def _pause(self, num_attempts: int, error: Exception | None) -> float:
        limits = self._config.limits
        longest = min(limits.backoff_seconds * 2 ** (num_attempts - 1), limits.max_backoff_seconds)
        asked = error.retry_after if isinstance(error, SamplerError) else None
        return max(random.uniform(0.5, 1) * longest, min(asked or 0, limits.max_backoff_seconds))


def _attempt(made: Trajectory, error: Exception | None, num_tokens: int) -> Attempt:
    """The record of an attempt that failed or (if `error` is None) returned no answer."""
    rollout = made.rollout
    if error is None:
        status, lost = "truncated" if rollout.finish_reason == "length" else "empty", rollout.num_tokens
        text = f"the model wrote no answer (finish_reason {rollout.finish_reason!r})"
    else:
        status, lost = made.status, max(num_tokens, error.num_tokens if isinstance(error, SamplerError) else 0)
        text = str(error) or ("no answer in time" if status == "timeout" else type(error).__name__)
    return Attempt(status=status, error=text[:2000], seconds=rollout.seconds, output_tokens=lost)


def _is_temporary(error: Exception | None) -> bool:
    if isinstance(error, SamplerError):
        return error.is_temporary
    return not isinstance(error, StepjaxError)
