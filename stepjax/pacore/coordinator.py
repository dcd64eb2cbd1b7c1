"""PaCoRe itself: the schedule's rounds, then one final call that gives the answer (section 2.1)."""

import asyncio
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from stepjax.errors import ConfigError, ContextLengthError
from stepjax.pacore.answers import Matching, in_thread, plurality
from stepjax.pacore.calls import Calls, derived_seed
from stepjax.pacore.compaction import answers, compact, fitted, losses_of_fitting, ordered
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import (
    AnsweredBy,
    Notify,
    Outcome,
    Pieces,
    Problem,
    Reference,
    Round,
    RoundEnded,
    RoundStarted,
    Trajectory,
    TrajectoryEnded,
    ignore,
)
from stepjax.processing.synthesis import Template
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import PreparedPrompt, Sampler


class RoundFailedError(RuntimeError):
    """No trajectory of a round left a message, or the final call gave no answer; the message gives the reasons.

    Attributes:
        rounds: all rounds of the problem, the failed one last.
    """

    def __init__(self, message: str, rounds: tuple[Round, ...] = ()):
        super().__init__(message)
        self.rounds = rounds


class Coordinator:
    """Solves any number of problems concurrently: each is its own task, and their rounds overlap.

    Raises:
        ConfigError: the template cannot be used, or the configuration needs a tokenizer that the sampler lacks.
    """

    def __init__(self, sampler: Sampler, config: PacoreConfig, *, matching: Matching = "math"):
        """
        Args:
            matching: how answers are compared for `RoundLimits.agreement`, the fallback and votes.
        """
        if sampler.tokens is None and config.truncated == "tail":
            raise ConfigError("truncated='tail' needs a sampler with a tokenizer: set one, or use 'drop'")
        self.sampler, self.config = sampler, config
        self.matching: Matching = matching
        self.template = Template(config.template, config.images)

    def begin(self, problem: Problem, **options: Any) -> "ProblemRun":
        """A problem's rounds, to solve or to draw one by one; for the options see `ProblemRun`."""
        return ProblemRun(self, problem, **options)

    async def solve(self, problem: Problem, **options: Any) -> Outcome:
        """`begin(problem, **options).solve()`."""
        return await self.begin(problem, **options).solve()


class ProblemRun:
    """The rounds of a problem, in order.

    Attributes:
        rounds: the finished ones.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        problem: Problem,
        *,
        sample: int = 0,
        done: Iterable[Trajectory] = (),
        notify: Notify = ignore,
        pieces: Pieces = "none",
    ):
        """
        Args:
            sample: index among several independent answers to the problem; seeds depend on it.
            done: trajectories of an interrupted run, which are not drawn again.
            notify: called with each event, in this task or its calls' tasks.
            pieces: the rounds whose messages are streamed to observers.
        """
        self.problem, self.sample, self.config = problem, sample, coordinator.config
        self.rounds: list[Round] = []
        self._sampler, self._template, self._matching = coordinator.sampler, coordinator.template, coordinator.matching
        self._notify, self._pieces = notify, pieces
        self._done = {(each.round, each.index): each for each in done}
        self._address = (self.config.seed, problem.id, sample)
        ends = (each.rollout.start + each.rollout.seconds for each in self._done.values())
        self._begin = time.monotonic() - max(ends, default=0.0)
        self._calls = Calls(self._sampler, self.config, self._address, begin=self._begin, notify=notify)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def tokens_under_way(self) -> dict[tuple[int, int], int]:
        """Tokens so far of the calls in progress, by (round, index)."""
        return self._calls.tokens_under_way()

    def seed(self, *address: object) -> int:
        """A seed for the method's own random choices."""
        return derived_seed(*self._address, *address)

    async def solve(self) -> Outcome:
        """
        Raises:
            RecordError: the conversation cannot be answered.
            ContextLengthError: the problem does not fit the context.
            RoundFailedError: no trajectory of a round left a message; or the final call gave no answer, and there is no
                earlier message or `config.fallback` is off.
        """
        for width in self.config.schedule:
            made = await self.round(width)
            agreed = await self._agreement(made.messages, width)
            if agreed is not None:
                return self.outcome(made, agreed.index, "agreement")
        self._calls.was_shown = False
        try:
            final = await self.round(1, is_final=True)
        except RoundFailedError:
            if not self.config.fallback or len(self.rounds) < 2 or self._calls.was_shown:
                raise
            return await self.vote(self.rounds[-2], "fallback")
        return self.outcome(final, final.messages[0].index, "synthesis")

    async def vote(self, of: Round, answered_by: AnsweredBy) -> Outcome:
        """The outcome with the most frequent answer of a round."""
        candidates = answers(of.messages)
        place, _ = await in_thread(plurality, [message.text for message in candidates], self._matching)
        return self.outcome(of, candidates[place].index, answered_by)

    def outcome(self, of: Round, index: int, answered_by: AnsweredBy) -> Outcome:
        """The outcome answered by trajectory `index` of a round."""
        return Outcome(
            problem=self.problem,
            sample=self.sample,
            rounds=tuple(self.rounds),
            answered_by=answered_by,
            chosen=(of.number, index),
            seconds=self.seconds,
        )

    def references(self) -> list[Reference]:
        """The messages of the last round, or those given with the problem, in the order of the next prompt."""
        messages, trajectories = (self.problem.given, ())
        if self.rounds:
            messages, trajectories = self.rounds[-1].messages, self.rounds[-1].trajectories
        return ordered(messages, trajectories, self.config, self.seed("order", len(self.rounds)))

    async def round(
        self, width: int, *, is_final: bool = False, references: Sequence[Sequence[Reference]] | None = None
    ) -> Round:
        """Draws a round.

        Args:
            references: for each call; by default all see the last round's messages.

        Raises:
            ContextLengthError: the problem, alone or with one reference, does not fit the context.
            RoundFailedError: the round left no message.
        """
        number = len(self.rounds)
        wanted = [self.references()] if references is None else references
        async with AsyncExitStack() as stack:
            prepared = [await self._prompt(stack, each) for each in wanted]
            prompts = [prompt for prompt, _ in prepared] * (width if references is None else 1)
            assert len(prompts) == width
            listed = tuple(tuple(each) for _, each in prepared)
            self._notify(
                RoundStarted(
                    number=number, is_final=is_final, width=width, references=listed[0], seconds=self.seconds
                )
            )  # fmt: skip
            trajectories = await self._draw(prompts, number, is_final)
        # The end of a reasoning may help other calls, but it is not an answer.
        config = dataclasses.replace(self.config, truncated="drop") if is_final else self.config
        left = [compact(each, config, self._sampler.tokens) for each in trajectories]
        messages = tuple(each for each in left if isinstance(each, Reference))
        fits = [losses_of_fitting(before, after) for before, after in zip(wanted, listed, strict=True)]
        losses = Counter(each for each in left if isinstance(each, str))
        losses += Counter(did_not_fit=sum(dropped for dropped, _ in fits))  # drops a zero
        cut = {each.index for each in trajectories if each.finish_reason == "length"}
        made = Round(
            number=number,
            is_final=is_final,
            references=listed[0],
            trajectories=tuple(trajectories),
            messages=messages,
            losses=dict(sorted(losses.items())),
            cut_references=sum(shortened for _, shortened in fits),
            cut_answers=sum(message.index in cut and not message.was_cut for message in messages),
            own_references=() if references is None else listed,
        )
        self.rounds.append(made)
        self._notify(RoundEnded(made))
        if not made.messages:
            raise RoundFailedError(_failure(self.problem.id, made), tuple(self.rounds))
        return made

    async def _prompt(
        self, stack: AsyncExitStack, references: Sequence[Reference]
    ) -> tuple[PreparedPrompt, list[Reference]]:
        room = self.config.sampling.max_tokens or self.config.answer_tokens
        fitting = list(references)
        while True:
            messages = self._template.conversation(self.problem.messages, [reference.text for reference in fitting])
            try:
                prompt = self._sampler.prompt(messages, self.problem.tools, answer_tokens=room)
                return await stack.enter_async_context(prompt), fitting
            except ContextLengthError as error:
                fitting = fitted(fitting, error, self.config, self._sampler.tokens)

    async def _draw(self, prompts: Sequence[PreparedPrompt], number: int, is_final: bool) -> list[Trajectory]:
        width, limits = len(prompts), self.config.limits
        ended = {index: self._done[number, index] for index in range(width) if (number, index) in self._done}
        tells = self._pieces == "all" or (self._pieces == "final" and is_final)
        tasks: dict[asyncio.Task[Trajectory], int] = {}
        deadline = None if is_final or limits.round_seconds is None else time.monotonic() + limits.round_seconds
        is_enough = not is_final and await self._is_enough(ended.values(), width, deadline)  # before any call starts
        try:
            for index in range(width):
                if index not in ended:
                    call = self._calls.call(prompts[index], (number, index), insists=is_final, tells_pieces=tells)
                    tasks[asyncio.create_task(call)] = index
            pending = set(tasks)
            while pending and not is_enough:
                left = None if deadline is None else deadline - time.monotonic()
                finished, pending = await asyncio.wait(
                    pending, timeout=left if left is None or left > 0 else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in sorted(finished, key=tasks.__getitem__):
                    ended[tasks[task]] = task.result()
                    self._notify(TrajectoryEnded(task.result()))
                is_enough = not is_final and await self._is_enough(ended.values(), width, deadline)
            await _cancel(pending)
            for task in sorted(pending, key=tasks.__getitem__):
                index, unsent = tasks[task], Rollout(finish_reason="cancelled", start=self.seconds)
                # A task cancelled before it started returns no record.
                never = Trajectory(round=number, index=index, status="cancelled", rollout=unsent)
                ended[index] = never if task.cancelled() else task.result()
                self._notify(TrajectoryEnded(ended[index]))
        finally:
            await _cancel(tasks)
        return [ended[index] for index in range(width)]

    async def _is_enough(self, ended: Iterable[Trajectory], width: int, deadline: float | None) -> bool:
        if deadline is None and self.config.limits.agreement is None:
            return False
        made = (compact(each, self.config, self._sampler.tokens) for each in ended)
        messages = sorted((each for each in made if isinstance(each, Reference)), key=lambda message: message.index)
        if await self._agreement(messages, width) is not None:
            return True
        is_late = deadline is not None and time.monotonic() >= deadline
        return is_late and len(messages) >= math.ceil(self.config.limits.quorum * width)

    async def _agreement(self, messages: Sequence[Reference], width: int) -> Reference | None:
        """A message whose answer enough others share; None if there is none or `agreement` is off."""
        share = self.config.limits.agreement
        if share is None or width < 2:
            return None
        candidates = [message for message in messages if not message.was_cut]
        place, votes = await in_thread(plurality, [message.text for message in candidates], self._matching)
        return candidates[place] if votes >= max(2, math.ceil(share * width)) else None


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _failure(problem: str, round_: Round) -> str:
    what = "the final call" if round_.is_final else f"round {round_.number + 1}"
    counts = ", ".join(f"{count} {reason}" for reason, count in round_.losses.items())
    errors = [each.error for each in round_.trajectories if each.error]
    first = f"; first error: {errors[0]}" if errors else ""
    return f"problem {problem!r}: {what} left no message ({counts}){first}"
