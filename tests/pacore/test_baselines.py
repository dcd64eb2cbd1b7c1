"""What PaCoRe is compared with: the same trajectories, differently used."""

import asyncio

import pytest
from fake_sampler import FakeSampler

from stepjax.errors import ConfigError
from stepjax.pacore.baselines import Method, answer
from stepjax.pacore.config import PacoreConfig, RoundLimits
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.records import Problem
from stepjax.rollouts.rollout import Rollout
from stepjax.rollouts.sampler import SamplerError

QUESTION = Problem(id="p", messages=({"role": "user", "content": "What is 6 x 7?"},), ground_truth=3)


def is_synthesis(asked):
    return "Reference 1:" in asked.text


def by_seed(asked):
    """Answers from 0 to 4, of different lengths and probabilities, which the seed decides."""
    number = asked.params.seed % 5
    return Rollout(content=f"x{asked.params.seed} is {number}", num_tokens=10 + number, mean_logprob=-0.1 * number)


def solve(method, script=by_seed, problem=QUESTION, **fields):
    sampler = FakeSampler(script)
    config = method.configured(PacoreConfig(limits=RoundLimits(retries=0), **fields))
    return sampler, asyncio.run(answer(Coordinator(sampler, config), problem, method))


def contents(outcome, number=0):
    return [each.rollout.content for each in outcome.rounds[number].trajectories]


def test_all_methods_draw_the_same_first_trajectories():
    """So that majority@4 is of the first four of majority@16, and costs nothing that is not compared."""
    _, wide = solve(Method(name="majority", width=16))
    expected = contents(wide)
    assert len(set(expected)) == 16
    for method in (
        Method(name="majority", width=4),
        Method(name="best-of-n", width=4, scorer="shortest"),
        Method(name="rsa", width=4, references=2, loops=2),
        Method(name="sequential", width=3),
        Method(name="single"),
    ):
        _, outcome = solve(method)
        assert contents(outcome) == expected[: outcome.rounds[0].width]
    _, pacore = solve(Method(), schedule=(4,))
    assert contents(pacore) == expected[:4]


def test_majority_takes_the_most_frequent_answer():
    votes = ["41", "42", "it is 42", "43"]
    sampler, outcome = solve(Method(name="majority", width=4), lambda asked: votes[asked.number])
    assert outcome.answered_by == "vote" and outcome.chosen == (0, 1) and outcome.content == "42"
    assert len(sampler.asked) == 4 and not any(map(is_synthesis, sampler.asked))


def test_best_of_n_takes_what_the_scorer_prefers():
    numbers = [3, 1, 4, 1]

    def script(asked):
        number = numbers[asked.number]
        return Rollout(content=f"it is {number}", num_tokens=10 + number, mean_logprob=-0.1 * number)

    for scorer, chosen in [
        ("mean-logprob", 1),
        ("shortest", 1),
        ("longest", 2),
        ("ground-truth", 0),
        (lambda problem, trajectory: trajectory.index, 3),
    ]:
        _, outcome = solve(Method(name="best-of-n", width=4, scorer=scorer), script)
        assert outcome.chosen == (0, chosen) and outcome.answered_by == "score"


def test_the_end_of_a_thought_has_no_vote():
    def script(asked):
        if asked.number == 3:
            return "it is 42"
        return Rollout(content="", reasoning="and so 41", finish_reason="length")

    for name in ("majority", "best-of-n"):
        _, outcome = solve(Method(name=name, width=4, scorer="shortest"), script, truncated="tail")
        assert outcome.content == "it is 42" and len(outcome.rounds[0].messages) == 4


def test_what_scorers_need():
    assert Method(name="best-of-n").configured(PacoreConfig()).sampling.logprobs == 0
    with pytest.raises(ConfigError, match="needs log-probabilities"):
        solve(Method(name="best-of-n", width=2), lambda asked: Rollout(content="x"))
    oracle = Method(name="best-of-n", width=2, scorer="ground-truth")
    assert oracle.label(PacoreConfig()) == "pass@2 (oracle)"
    with pytest.raises(ConfigError, match="'q' has no ground_truth"):
        solve(oracle, problem=Problem(id="q", messages=QUESTION.messages))


def test_sequential_rounds_see_the_one_before():
    sampler, outcome = solve(Method(name="sequential", width=3))
    assert [round_.width for round_ in outcome.rounds] == [1, 1, 1, 1]
    for number in range(1, 4):
        text = sampler.asked[number].text
        assert contents(outcome, number - 1)[0] in text and "Reference 2:" not in text


def test_rsa_shows_each_call_members_of_its_own():
    method = Method(name="rsa", width=6, references=3, loops=3)
    sampler, outcome = solve(method)
    assert [round_.width for round_ in outcome.rounds] == [6, 6, 6] and outcome.answered_by == "vote"
    assert outcome.chosen[0] == 2
    subsets = []
    for number in (1, 2):
        before = contents(outcome, number - 1)
        for asked in sampler.asked[6 * number : 6 * number + 6]:
            seen = [text for text in before if f"{text}\n" in asked.text]
            assert len(seen) == 3 and "Reference 4:" not in asked.text
            subsets.append(tuple(seen))
    assert len(set(subsets)) > 6
    again, _ = solve(method)
    assert [asked.text for asked in again.asked] == [asked.text for asked in sampler.asked]


def test_rsa_goes_on_with_fewer():
    def script(asked):
        if asked.number in (2, 5) or is_synthesis(asked):
            return "7"
        return SamplerError("no", is_temporary=False)

    _, outcome = solve(Method(name="rsa", width=6, references=3, loops=2), script)
    assert outcome.rounds[0].losses == {"error": 4} and len(outcome.rounds[1].references) == 2


def test_a_round_of_nothing_fails():
    for name in ("single", "majority", "best-of-n", "sequential", "rsa"):
        with pytest.raises(RoundFailedError):
            solve(Method(name=name, width=2, scorer="shortest"), lambda asked: SamplerError("no", is_temporary=False))


@pytest.mark.parametrize("field", ["width", "references", "loops"])
def test_sizes_are_checked(field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        Method(name="rsa", **{field: 0})
