"""PaCoRe itself: the schedule's rounds, then one call whose answer counts (section 2.1)."""

from collections.abc import Iterable

from stepjax.errors import ConfigError
from stepjax.pacore.answers import Matching, in_thread, plurality
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.events import Event, Notify, Pieces, TrajectoryPiece, ignore
from stepjax.pacore.messages import answers
from stepjax.pacore.records import Message, Outcome, Problem, Round, Trajectory
from stepjax.pacore.rounds import ProblemRun, RoundFailedError, trajectory_of
from stepjax.pacore.template import Template
from stepjax.rollouts.sampler import Sampler, is_answer


class Coordinator:
    """Solves problems, any number at a time: each is a task of its own, and rounds of different ones overlap.

    Raises:
        ConfigError: the template cannot be used, or the configuration needs a tokenizer that the sampler has not.
    """

    def __init__(self, sampler: Sampler, config: PacoreConfig, *, matching: Matching = "math"):
        """
        Args:
            matching: when two messages agree; for `Limits.agreement`, the fallback and votes.
        """
        if sampler.tokens is None and config.truncated == "tail":
            raise ConfigError("truncated='tail' needs the sampler to have a tokenizer: name one, or say 'drop'")
        self.sampler, self.config = sampler, config
        self.matching: Matching = matching
        self._template = Template(config)

    def begin(
        self,
        problem: Problem,
        *,
        sample: int = 0,
        done: Iterable[Trajectory] = (),
        notify: Notify = ignore,
        pieces: Pieces = "none",
    ) -> ProblemRun:
        """The rounds of a problem, for methods that go about them in their own way; see `baselines`."""
        return ProblemRun(
            problem,
            self.sampler,
            self.config,
            self._template,
            self.matching,
            sample=sample,
            done=done,
            notify=notify,
            pieces=pieces,
        )

    async def solve(
        self,
        problem: Problem,
        *,
        sample: int = 0,
        done: Iterable[Trajectory] = (),
        notify: Notify = ignore,
        pieces: Pieces = "none",
    ) -> Outcome:
        """
        Args:
            sample: which of several independent answers to the problem this is; seeds depend on it.
            done: trajectories of an earlier run that was cut off. They are not drawn again.
            notify: called with what happens, in this task or those of its calls.
            pieces: the rounds whose messages observers want while they are written.

        Raises:
            RecordError: the conversation is not one that can be answered.
            ContextLengthError: the problem does not fit the context.
            RoundFailedError: no trajectory of a round left a message; or the final one left none, and there is no
                earlier message or `config.fallback` is off.
        """
        was_shown = False  # a part of an answer that may then break off

        def tell(event: Event) -> None:
            nonlocal was_shown
            was_shown |= isinstance(event, TrajectoryPiece) and is_answer(event.piece)
            notify(event)

        run = self.begin(problem, sample=sample, done=done, notify=tell, pieces=pieces)
        for width in self.config.schedule:
            made = await run.round(width, is_final=False)
            agreed = await run.agreement(made.messages, width)
            if agreed is not None:
                return outcome(run, made, agreed, "agreement")
        was_shown = False
        try:
            final = await run.round(1, is_final=True)
        except RoundFailedError:
            if not self.config.fallback or len(run.rounds) < 2 or was_shown:
                raise
            last = run.rounds[-2]
            candidates = answers(last.messages)
            index, _ = await in_thread(plurality, [message.text for message in candidates], self.matching)
            return outcome(run, last, candidates[index], "fallback")
        return outcome(run, final, final.messages[0], "synthesis")


def outcome(run: ProblemRun, of: Round, message: Message, answered_by) -> Outcome:
    """The outcome of a run whose answer is a message of one of its rounds."""
    chosen = trajectory_of(of, message)
    return Outcome(
        problem=run.problem,
        sample=run.sample,
        # A thought that was cut off is no answer, but all that there is.
        content=chosen.content if chosen.content.strip() or chosen.tool_calls else message.text,
        reasoning=chosen.reasoning,
        tool_calls=chosen.tool_calls,
        finish_reason=chosen.finish_reason,
        answered_by=answered_by,
        chosen=(of.number, chosen.index),
        rounds=tuple(run.rounds),
        seconds=run.seconds,
    )
