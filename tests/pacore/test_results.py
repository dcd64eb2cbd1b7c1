"""Rows, accuracy and its interval, sums and the table."""

import pytest

from stepjax.figures import wilson_interval
from stepjax.pacore.records import Attempt, Outcome, Problem, Round, Trajectory
from stepjax.pacore.results import Tally, table
from stepjax.rollouts.rollout import Rollout

LOST = Attempt(status="error", error="busy", seconds=1.0, output_tokens=3)


def outcome(place, sample, correct, *, is_failed=False, losses=(), ground_truth="7"):
    rollout = Rollout(content="7", num_prompt_tokens=7, num_tokens=5, start=1.0, seconds=2.0)
    calls = tuple(Trajectory(round=0, index=i, rollout=rollout, attempts=(LOST,) * (1 - i)) for i in range(2))
    round_ = Round(
        number=0, is_final=True, references=(), trajectories=calls, messages=(), losses=dict(losses), cut_answers=1
    )
    return Outcome(
        problem=Problem(id=f"p{place}", messages=(), ground_truth=ground_truth),
        sample=sample,
        rounds=(round_,),
        answered_by=None if is_failed else "synthesis",
        chosen=None if is_failed else (0, 0),
        error="no" if is_failed else None,
        correct=correct,
    )


def tally(outcomes):
    made = Tally()
    for each in outcomes:
        made.add(each)
    return made


def summary(outcomes, problems, samples=1):
    return tally(outcomes).summary(method="m", num_problems=problems, samples=samples, matching="math")


def test_one_sample_a_problem():
    made = summary([*(outcome(i, 0, i < 3) for i in range(4)), outcome(4, 0, None, ground_truth=None)], 5)
    assert made["accuracy"] == 0.75 and made["scored_problems"] == 4 and made["by_sample"] == [0.75]
    assert made["interval"] == wilson_interval(3, 4) and made["interval_by"] == "Wilson"
    assert made["output_tokens"] == 50 and made["output_tokens_per_answer"] == 10 and made["is_complete"]
    assert "75.0 % of 4" in table(made) and "accuracy" in table(made) and made["unjudged"] == 0


def test_several_samples_are_not_independent():
    rights = [(True, True), (True, False), (False, False)]
    outcomes = [outcome(i, s, right) for i, pair in enumerate(rights) for s, right in enumerate(pair)]
    made = summary(outcomes, 3, samples=2)
    assert made["accuracy"] == 0.5 and made["by_sample"] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    # The means 1, 0.5 and 0 have the standard deviation 0.5.
    radius = 1.959964 * 0.5 / 3**0.5
    assert made["interval"] == (pytest.approx(max(0, 0.5 - radius)), pytest.approx(min(1, 0.5 + radius)))
    assert "mean@2" in table(made)
    assert summary(outcomes[:2], 1, samples=2)["interval"] is None


def test_without_answers_there_is_no_accuracy():
    made = summary([outcome(0, 0, None)], 2)
    assert made["accuracy"] is None and made["scored_problems"] == 0 and not made["is_complete"]
    assert "accuracy" not in table(made) and made["unjudged"] == 1
    assert summary([], 2)["output_tokens_per_answer"] is None and table(summary([], 2))


def test_failures_and_losses_are_told():
    outcomes = [
        outcome(0, 0, False, is_failed=True, losses={"error": 2}),
        outcome(1, 0, True, losses={"empty": 1, "error": 1}),
    ]
    made = summary(outcomes, 2)
    assert made["failed"] == 1 and made["answered_by"] == {"synthesis": 1} and made["accuracy"] == 0.5
    assert made["rounds"][0]["losses"] == {"empty": 1, "error": 3} and made["finish_reasons"] == {"stop": 4}
    shown = table(made)
    assert "lost or cut: 1 empty, 3 error, 2 cut answers" in shown and "6 tokens, in failed attempts" in shown
    assert "failed       1 (counted as wrong" in shown


def test_times_are_apart_from_the_summary():
    made = tally([outcome(0, 0, True), outcome(1, 0, True)]).timing(10.0)
    assert made["drawn_calls"] == 4 and made["drawn_tokens_per_second"] == 2.0 and made["answers_per_hour"] == 720
    assert made["rounds"][0]["mean_seconds"] == 2.0 and made["rounds"][0]["tokens_per_second"] == 5.0
