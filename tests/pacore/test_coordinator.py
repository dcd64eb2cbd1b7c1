"""Rounds, seeds, losses, quorum, agreement, fallback: with a sampler that answers from a script."""

import asyncio
import contextlib
import dataclasses

import pytest
from fake_sampler import FakeSampler

from stepjax.errors import ConfigError, ContextLengthError, RecordError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import PacoreConfig, RoundLimits
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.records import (
    AttemptFailed,
    Problem,
    RoundEnded,
    RoundStarted,
    Trajectory,
    TrajectoryEnded,
    TrajectoryPiece,
)
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import PreparedPrompt, SamplerError

QUICK = RoundLimits(backoff_seconds=0.0)
QUESTION = Problem(id="p", messages=({"role": "user", "content": "What is 6 x 7?"},))


def is_synthesis(asked):
    return "Reference 1:" in asked.text


def numbered(asked):
    return f"so it is {asked.number}"


def test_the_schedule_is_drawn_and_then_one_answer(solve):
    sampler = FakeSampler(numbered)
    outcome = solve(sampler, (4, 2))
    assert [round_.width for round_ in outcome.rounds] == [4, 2, 1]
    assert [is_synthesis(asked) for asked in sampler.asked] == [False] * 4 + [True] * 3
    assert outcome.content == "so it is 6" and outcome.answered_by == "synthesis" and outcome.chosen == (2, 0)
    second = sampler.asked[4].text
    assert all(f"so it is {i}\n" in second for i in range(4)) and "Reference 4:" in second
    assert "What is 6 x 7?" in second and "Reference 5:" not in second
    assert sampler.prompts[0] == QUESTION.messages, "without messages the problem is sent as it is"


def test_without_rounds_the_problem_itself_is_asked_once(solve):
    sampler = FakeSampler(numbered)
    outcome = solve(sampler, ())
    assert len(sampler.asked) == 1 and sampler.asked[0].messages == QUESTION.messages
    assert outcome.answered_by == "synthesis" and outcome.totals.calls == 1


def test_seeds_depend_on_the_address_alone(solve):
    def seeds(**options):
        sampler = FakeSampler(numbered)
        solve(sampler, options.pop("schedule", (4,)), **options)
        return [asked.params.seed for asked in sampler.asked]

    first = seeds()
    assert first == seeds() and len(set(first)) == 5
    assert seeds(schedule=(6,))[:4] == first[:4], "a wider round begins with the same trajectories"
    assert set(seeds(sampling=SamplingParams(seed=1))).isdisjoint(first)
    assert set(seeds(coordinate={"sample": 1})).isdisjoint(first)
    other = dataclasses.replace(QUESTION, id="q")
    assert set(seeds(problem=other)).isdisjoint(first)
    assert all(0 <= seed < 2**53 for seed in first)


def test_references_do_not_depend_on_who_ends_first(solve):
    def prompt_of_final(order):
        sampler = FakeSampler(lambda asked: Rollout(content=f"{asked.params.seed}") if not is_synthesis(asked) else "x")
        solve(sampler, (6,), order=order)
        reverse = FakeSampler(lambda asked: Rollout(content=f"{asked.params.seed}") if not is_synthesis(asked) else "x")
        original = reverse.sample

        async def slow(prompt, params, listener):
            await asyncio.sleep(0.02 * (10 - len(reverse.asked)))
            return await original(prompt, params, listener)

        reverse.sample = slow
        solve(reverse, (6,), order=order)
        assert sampler.asked[-1].text == reverse.asked[-1].text
        return sampler.asked[-1].text

    assert prompt_of_final("shuffle") != prompt_of_final("length")


def test_given_responses_are_the_first_messages(solve):
    sampler = FakeSampler(numbered)
    problem = dataclasses.replace(QUESTION, responses=("cached one", "cached two"))
    outcome = solve(sampler, (2,), problem=problem)
    assert "cached one" in sampler.asked[0].text and "Reference 2:" in sampler.asked[0].text
    assert len(outcome.rounds[0].references) == 2


def test_one_bad_trajectory_never_fails_a_problem(solve):
    def script(asked):
        if is_synthesis(asked):
            return "42"
        return [
            SamplerError("no", is_temporary=False),
            RuntimeError("a bug"),
            Rollout(content="", finish_reason="stop", num_tokens=3),
            Rollout(content="", reasoning="hm", finish_reason="length", num_tokens=9),
            "it is 42",
        ][asked.number]

    outcome = solve(FakeSampler(script), (5,), limits=RoundLimits(retries=0))
    first = outcome.rounds[0]
    assert outcome.content == "42"
    assert first.losses == {"empty": 1, "error": 2, "truncated": 1}
    assert [message.index for message in first.messages] == [4]
    assert outcome.totals.output_tokens == 3 + 9 + 3 + 1
    assert "a bug" in first.trajectories[1].error


def test_temporary_failures_are_tried_again_and_counted(solve):
    failed = []

    def script(asked):
        if is_synthesis(asked) or len(failed) >= 2:
            return "fine"
        failed.append(asked.params.seed)
        return SamplerError("busy", is_temporary=True, num_tokens=5)

    events = []
    outcome = solve(FakeSampler(script), (1,), limits=QUICK, coordinate={"notify": events.append})
    [trajectory] = outcome.rounds[0].trajectories
    assert [attempt.error for attempt in trajectory.attempts] == ["busy", "busy"]
    assert trajectory.lost_tokens == 10 and outcome.totals.lost_tokens == 10 and outcome.totals.retries == 2
    assert outcome.totals.output_tokens == 2, "lost tokens are not the trajectories'"
    assert sum(isinstance(event, AttemptFailed) for event in events) == 2


def test_the_time_of_a_call_is_limited(solve):
    script = lambda asked: 30.0 if asked.number == 0 else "fine"  # noqa: E731
    outcome = solve(FakeSampler(script), (2,), limits=RoundLimits(call_seconds=0.05, backoff_seconds=0))
    assert [attempt.status for attempt in outcome.rounds[0].trajectories[0].attempts] == ["timeout"]
    outcome = solve(FakeSampler(script), (2,), limits=RoundLimits(call_seconds=0.05, retries=0))
    assert outcome.rounds[0].losses == {"timeout": 1}


def test_the_time_of_a_call_runs_from_when_it_is_sent(solve):
    class Queueing(FakeSampler):
        async def sample(self, prompt, params, listener):
            await asyncio.sleep(0.1)
            return await super().sample(prompt, params, listener)

    outcome = solve(Queueing(lambda asked: "fine"), (2,), limits=RoundLimits(call_seconds=0.05, retries=0))
    assert outcome.rounds[0].losses == {}


def test_tokens_of_calls_under_way_are_known():
    counts = []

    class Writing(FakeSampler):
        async def sample(self, prompt, params, listener):
            listener.num_tokens = 7 + len(self.asked)
            counts.append(run.tokens_under_way())
            return await super().sample(prompt, params, listener)

    async def main():
        nonlocal run
        run = Coordinator(Writing(lambda asked: "fine"), PacoreConfig(schedule=())).begin(QUESTION)
        await run.round(2)

    run = None
    asyncio.run(main())
    assert counts == [{(0, 0): 7}, {(0, 0): 7, (0, 1): 8}] and run.tokens_under_way() == {}


def test_a_round_goes_on_with_its_quorum(solve):
    sampler = FakeSampler(lambda asked: 30.0 if asked.number in (1, 3) else "fine")
    outcome = solve(sampler, (4,), limits=RoundLimits(round_seconds=0.1, quorum=0.5))
    assert outcome.rounds[0].losses == {"cancelled": 2} and sampler.cancelled == 2
    assert [message.index for message in outcome.rounds[0].messages] == [0, 2]


def test_without_its_quorum_a_round_waits(solve):
    sampler = FakeSampler(lambda asked: 0.3 if asked.number in (1, 3) and not is_synthesis(asked) else "fine")
    outcome = solve(sampler, (4,), limits=RoundLimits(round_seconds=0.05, quorum=1.0))
    assert outcome.rounds[0].losses == {} and sampler.cancelled == 0


def test_agreement_ends_it_all_and_is_off_by_default(solve):
    def script(asked):
        return "synthesised" if is_synthesis(asked) else 30.0 if asked.number == 3 else r"\boxed{42}"

    outcome = solve(FakeSampler(script), (4, 4), limits=RoundLimits(agreement=0.75))
    assert outcome.answered_by == "agreement" and outcome.content == r"\boxed{42}" and len(outcome.rounds) == 1
    assert outcome.rounds[0].losses == {"cancelled": 1}
    assert solve(FakeSampler(lambda asked: "42"), (4,)).answered_by == "synthesis"


def test_a_round_without_survivors_fails_clearly(solve):
    sampler = FakeSampler(lambda asked: SamplerError("status 401: no key", is_temporary=False))
    with pytest.raises(RoundFailedError, match=r"'p': round 1 left no message \(4 error\).*401"):
        solve(sampler, (4,))
    assert len(sampler.asked) == 4, "what is hopeless is not tried again"


def test_the_final_call_insists_on_an_answer(solve):
    empty = Rollout(content="", reasoning="hm", finish_reason="length", num_tokens=7)
    seeds = []

    def script(asked):
        if not is_synthesis(asked):
            return "41"
        seeds.append(asked.params.seed)
        return empty if len(seeds) < 3 else "42"

    outcome = solve(FakeSampler(script), (2,), limits=QUICK)
    assert outcome.content == "42" and len(set(seeds)) == 3, "an equal seed would give an equal answer"
    assert [attempt.status for attempt in outcome.rounds[1].trajectories[0].attempts] == ["truncated"] * 2


def test_the_plurality_stands_in_for_a_final_call_that_fails(solve):
    def script(asked):
        if is_synthesis(asked):
            return SamplerError("down", is_temporary=True)
        return ["it is 41", "the answer is 42", "answer: 42", "43"][asked.number]

    outcome = solve(FakeSampler(script), (4,), limits=QUICK)
    assert outcome.answered_by == "fallback" and outcome.content == "the answer is 42" and outcome.chosen == (0, 1)
    with pytest.raises(RoundFailedError, match="the final call left no message"):
        solve(FakeSampler(script), (4,), limits=QUICK, fallback=False)


def test_ends_of_thoughts_neither_stand_in_nor_agree(solve):
    """They are passed on with truncated="tail", and hold numbers that nobody has called an answer."""

    def script(asked):
        if is_synthesis(asked):
            return SamplerError("down", is_temporary=True)
        if asked.number == 3:
            return 0.1
        return Rollout(content="", reasoning="if it were 41", finish_reason="length")

    limits = dataclasses.replace(QUICK, agreement=0.5)
    outcome = solve(FakeSampler(script), (4,), limits=limits, truncated="tail")
    assert outcome.answered_by == "fallback" and outcome.content == "late"


def test_an_answer_that_was_shown_is_not_replaced(solve):
    """Observers have sent a part of it to somebody: neither a second try nor the fallback can take that back."""

    class Breaking(FakeSampler):
        async def sample(self, prompt, params, listener):
            if "Reference 1:" in prompt.payload[-1]["content"]:
                listener.piece({"content": "half an"})
                raise SamplerError("broke off", is_temporary=True)
            return await super().sample(prompt, params, listener)

    sampler = Breaking(numbered)
    with pytest.raises(RoundFailedError, match="broke off"):
        solve(sampler, (2,), limits=QUICK, coordinate={"pieces": "final"})


def test_the_plurality_stands_in_while_nothing_was_shown(solve):
    def script(asked):
        return SamplerError("down", is_temporary=True) if is_synthesis(asked) else "the answer is 42"

    outcome = solve(FakeSampler(script), (2,), limits=QUICK, coordinate={"pieces": "final"})
    assert outcome.answered_by == "fallback" and outcome.content == "the answer is 42"


def test_what_is_done_is_not_drawn_again(solve):
    events = []
    whole = FakeSampler(numbered)
    expected = solve(whole, (3, 2), coordinate={"notify": events.append})
    done = [event.trajectory for event in events if isinstance(event, TrajectoryEnded)]
    assert len(done) == 6
    for count in range(7):
        told = []
        sampler = FakeSampler(lambda asked: f"so it is {[d.rollout.seed for d in done].index(asked.params.seed)}")
        outcome = solve(sampler, (3, 2), coordinate={"done": done[:count], "notify": told.append})
        assert len(sampler.asked) == 6 - count == sum(isinstance(event, TrajectoryEnded) for event in told)
        assert outcome.content == expected.content
        assert [r.references for r in outcome.rounds] == [r.references for r in expected.rounds]


def test_agreement_among_what_is_done_ends_a_round_at_once(solve):
    """A run that was cut off between the last vote that it needed and the records of the calls it then cancelled."""
    done = [Trajectory(round=0, index=i, rollout=Rollout(content="42", num_tokens=1)) for i in range(3)]
    sampler = FakeSampler(numbered)
    outcome = solve(sampler, (4,), limits=RoundLimits(agreement=0.75), coordinate={"done": done})
    assert outcome.answered_by == "agreement" and not sampler.asked
    assert outcome.rounds[0].losses == {"cancelled": 1}


def test_observers_see_it_all(solve):
    events = []
    solve(FakeSampler(numbered), (2,), coordinate={"notify": events.append, "pieces": "all"})
    kinds = [type(event) for event in events if not isinstance(event, TrajectoryPiece)]
    assert kinds == [
        RoundStarted,
        TrajectoryEnded,
        TrajectoryEnded,
        RoundEnded,
        RoundStarted,
        TrajectoryEnded,
        RoundEnded,
    ]
    written = "".join(e.piece["content"] for e in events if isinstance(e, TrajectoryPiece) and e.round == 1)
    assert written.strip() == "so it is 2"


def test_references_that_do_not_fit_are_shortened_or_dropped(solve):
    def run(overflow):
        sampler = FakeSampler(
            lambda asked: "done" if is_synthesis(asked) else ("short one" if asked.number else "long " * 200 + "end"),
            max_context=150,
        )
        outcome = solve(sampler, (3,), overflow=overflow, sampling=SamplingParams(max_tokens=20))
        return sampler, outcome.rounds[1]

    sampler, final = run("shorten")
    assert final.cut_references == 1 and final.losses == {} and len(final.references) == 3
    text = sampler.asked[-1].text
    assert "[...] long" in text and "long end" in text and text.count("short one") == 2
    assert len(text.split()) + 20 <= 150
    sampler, final = run("drop")
    assert final.losses == {"did_not_fit": 1} and len(final.references) == 2 and "long" not in sampler.asked[-1].text
    with pytest.raises(ContextLengthError):
        run("fail")


def test_shortening_ends_whatever_the_tokenizer_makes_of_ends(solve):
    """Here the sign that a beginning is missing has eight tokens."""

    class Letters:
        def count(self, text):
            return len(text) + 2 * text.count("[")

        def tail(self, text, count):
            return text[-count:] if count > 0 else ""

    class Sampler(FakeSampler):
        @contextlib.asynccontextmanager
        async def prompt(self, messages, tools, *, answer_tokens):
            count = len(messages[-1]["content"])
            if count + answer_tokens > 600:
                raise ContextLengthError("too long", excess=count + answer_tokens - 600)
            yield PreparedPrompt(count, tuple(messages))

    sampler = Sampler(lambda asked: "x" * 100 + str(asked.number), tokens=Letters())
    outcome = solve(sampler, (4,), sampling=SamplingParams(max_tokens=1))
    assert outcome.rounds[1].cut_references == 4
    assert all(f"{i}\n" in sampler.asked[-1].text for i in range(4)), "ends are what stays"


def test_a_problem_that_does_not_fit_is_refused(solve):
    problem = Problem(id="p", messages=({"role": "user", "content": "word " * 500},))
    with pytest.raises(ContextLengthError):
        solve(FakeSampler(numbered, max_context=100), problem=problem)


@pytest.mark.parametrize(
    "messages", [(), ({"role": "assistant", "content": "hi"},), ({"role": "user", "content": [{"type": "audio"}]},)]
)
def test_conversations_that_cannot_be_answered(solve, messages):
    with pytest.raises(RecordError):
        solve(FakeSampler(numbered), problem=Problem(id="p", messages=messages))


def test_a_tail_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer"):
        Coordinator(FakeSampler(numbered, tokens=None), PacoreConfig(truncated="tail"))
