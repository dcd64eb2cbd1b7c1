"""One round of a problem: its calls side by side, with quorum, time limit and agreement; and what they leave."""

import asyncio
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from stepjax.errors import ContextLengthError
from stepjax.pacore.answers import Matching, in_thread, plurality
from stepjax.pacore.calls import Caller, derived_seed
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.events import Notify, Pieces, RoundEnded, RoundStarted, TrajectoryEnded
from stepjax.pacore.fit import fitted, losses_of_fitting
from stepjax.pacore.messages import compact, ordered
from stepjax.pacore.records import Message, Problem, Round, Trajectory
from stepjax.pacore.template import Template
from stepjax.rollouts.sampler import PreparedPrompt, Sampler


class RoundFailedError(RuntimeError):
    """No trajectory of a round left a message, or the final one no answer; says what became of them.

    Attributes:
        rounds: all of the problem, the failed one last.
    """

    def __init__(self, message: str, rounds: tuple[Round, ...] = ()):
        super().__init__(message)
        self.rounds = rounds


class ProblemRun:
    """The rounds of a problem, one after the other.

    Attributes:
        rounds: that have ended.
    """

    def __init__(
        self,
        problem: Problem,
        sampler: Sampler,
        config: PacoreConfig,
        template: Template,
        matching: Matching,
        *,
        sample: int,
        done: Iterable[Trajectory],
        notify: Notify,
        pieces: Pieces,
    ):
        self.problem, self.config, self.sample = problem, config, sample
        self.matching: Matching = matching
        self.rounds: list[Round] = []
        self._sampler, self._template, self._notify, self._pieces = sampler, template, notify, pieces
        self._done: Mapping[tuple[int, int], Trajectory] = {(each.round, each.index): each for each in done}
        self._address = (config.seed, problem.id, sample)
        self._begin = time.monotonic() - max((each.start + each.seconds for each in self._done.values()), default=0.0)
        self._caller = Caller(sampler, config, self._address, begin=self._begin, notify=notify)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def seed(self, *address: object) -> int:
        """For a choice of the method's own."""
        return derived_seed(*self._address, *address)

    def references(self) -> list[Message]:
        """What the last round leaves, or the problem came with, in the order for the next prompt."""
        if self.rounds:
            last = self.rounds[-1]
            return ordered(last.messages, last.trajectories, self.config, self.seed("order", len(self.rounds)))
        given = [Message(i, text) for i, text in enumerate(self.problem.responses)]
        return ordered(given, (), self.config, self.seed("order", 0))

    async def round(
        self,
        width: int,
        *,
        is_final: bool,
        references: Sequence[Sequence[Message]] | None = None,
    ) -> Round:
        """Draws a round.

        Args:
            references: of each call; by default all have what the last round left.

        Raises:
            ContextLengthError: the problem, or a single reference with it, does not fit the context.
            RoundFailedError: nothing came of it.
        """
        number = len(self.rounds)
        shared = self.references() if references is None else None
        async with AsyncExitStack() as stack:
            wanted = [shared] if shared is not None else list(references or ())
            prepared = [await self._prompt(stack, each) for each in wanted]
            prompts = [prompt for prompt, _ in prepared] * (width if shared is not None else 1)
            assert len(prompts) == width
            shown = prepared[0][1]
            self._notify(
                RoundStarted(
                    number=number, is_final=is_final, width=width, references=tuple(shown), seconds=self.seconds
                )
            )
            trajectories = await self._draw(prompts, number, is_final)
        fits = [losses_of_fitting(before, after) for before, (_, after) in zip(wanted, prepared, strict=True)]
        own = () if shared is not None else tuple(tuple(each) for _, each in prepared)
        made = dataclasses.replace(self._made(number, is_final, trajectories, shown, fits), own_references=own)
        self.rounds.append(made)
        self._notify(RoundEnded(made))
        if not made.messages:
            raise RoundFailedError(_failure(self.problem.id, made), tuple(self.rounds))
        return made

    async def _prompt(
        self, stack: AsyncExitStack, references: Sequence[Message]
    ) -> tuple[PreparedPrompt, list[Message]]:
        room = self.config.sampling.max_tokens or self.config.answer_tokens
        fitting = list(references)
        while True:
            messages = self._template.conversation(self.problem.messages, fitting)
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
        is_enough = await self._is_enough(ended.values(), width, is_final, deadline)  # before a call begins
        try:
            for index in range(width):
                if index not in ended:
                    call = self._caller.call(prompts[index], number, index, insists=is_final, tells_pieces=tells)
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
                is_enough = await self._is_enough(ended.values(), width, is_final, deadline)
            await _cancel(pending)
            for task in sorted(pending, key=tasks.__getitem__):
                index = tasks[task]
                # One may have ended in the moment of its cancellation.
                ended[index] = self._caller.cancelled(number, index) if task.cancelled() else task.result()
                self._notify(TrajectoryEnded(ended[index]))
        finally:
            await _cancel(tasks)
        return [ended[index] for index in range(width)]

    async def _is_enough(self, ended: Iterable[Trajectory], width: int, is_final: bool, deadline: float | None) -> bool:
        if is_final:
            return False
        messages = self._messages(ended)
        if await self.agreement(messages, width) is not None:
            return True
        is_late = deadline is not None and time.monotonic() >= deadline
        return is_late and len(messages) >= math.ceil(self.config.limits.quorum * width)

    async def agreement(self, messages: Sequence[Message], width: int) -> Message | None:
        """A message whose answer enough others share; None where they do not, or nobody asks."""
        share = self.config.limits.agreement
        if share is None or width < 2:
            return None
        candidates = [message for message in messages if not message.was_cut]
        index, votes = await in_thread(plurality, [message.text for message in candidates], self.matching)
        return candidates[index] if votes >= max(2, math.ceil(share * width)) else None

    def _messages(self, trajectories: Iterable[Trajectory]) -> list[Message]:
        made = (compact(each, self.config, self._sampler.tokens) for each in trajectories)
        return sorted((each for each in made if isinstance(each, Message)), key=lambda message: message.index)

    def _made(
        self,
        number: int,
        is_final: bool,
        trajectories: list[Trajectory],
        references: Sequence[Message],
        fits: Sequence[tuple[int, int]],
    ) -> Round:
        # The end of a thought may help others, but it is no answer.
        config = dataclasses.replace(self.config, truncated="drop") if is_final else self.config
        made = [compact(each, config, self._sampler.tokens) for each in trajectories]
        losses = Counter(each for each in made if isinstance(each, str))
        if any(dropped for dropped, _ in fits):
            losses["did_not_fit"] = sum(dropped for dropped, _ in fits)
        messages = tuple(each for each in made if isinstance(each, Message))
        cut = {each.index for each in trajectories if each.finish_reason == "length"}
        return Round(
            number=number,
            is_final=is_final,
            references=tuple(references),
            trajectories=tuple(trajectories),
            messages=messages,
            losses=dict(sorted(losses.items())),
            cut_references=sum(shortened for _, shortened in fits),
            cut_answers=sum(message.index in cut and not message.was_cut for message in messages),
        )


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _failure(problem: str, round_: Round) -> str:
    what = "the final call" if round_.is_final else f"round {round_.number + 1}"
    counts = ", ".join(f"{count} {reason}" for reason, count in round_.losses.items())
    errors = [each.error for each in round_.trajectories if each.error]
    first = f"; the first error: {errors[0]}" if errors else ""
    return f"problem {problem!r}: nothing came of {what} ({counts}){first}"


def trajectory_of(round_: Round, message: Message) -> Trajectory:
    return next(each for each in round_.trajectories if each.index == message.index)
