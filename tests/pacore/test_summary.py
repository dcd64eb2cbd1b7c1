"""Accuracy and its interval, sums and the table; and the lines of progress."""

import io

import pytest

from stepjax.figures import wilson_interval
from stepjax.pacore.events import RoundEnded, RoundStarted, TrajectoryEnded
from stepjax.pacore.progress import Progress
from stepjax.pacore.records import Round, Trajectory
from stepjax.pacore.summary import Figures, summarise, table


def figures(place, sample, correct, *, is_failed=False, losses=(), tokens=10):
    usage = {"calls": 2, "failed_tries": 1, "prompt_tokens": 7, "output_tokens": tokens, "lost_tokens": 3}
    made = {"calls": 2, "output_tokens": tokens, "losses": dict(losses), "cut_references": 0, "cut_answers": 1}
    return Figures(
        place=place,
        sample=sample,
        correct=correct,
        is_failed=is_failed,
        answered_by=None if is_failed else "synthesis",
        usage={**usage, "finish_reasons": {"stop": 2}},
        rounds=(made,),
    )


def summary(rows, problems, samples=1):
    return summarise(rows, method="m", num_problems=problems, samples=samples, matching="math")


def test_one_sample_a_problem():
    rows = [figures(i, 0, i < 3) for i in range(4)] + [figures(4, 0, None)]
    made = summary(rows, 5)
    assert made["accuracy"] == 0.75 and made["scored_problems"] == 4 and made["by_sample"] == [0.75]
    assert made["interval"] == wilson_interval(3, 4) and made["interval_by"] == "Wilson"
    assert made["output_tokens"] == 50 and made["output_tokens_per_answer"] == 10 and made["is_complete"]
    assert "75.0 % of 4" in table(made) and "accuracy" in table(made)


def test_several_samples_are_not_independent():
    rights = [(True, True), (True, False), (False, False)]
    rows = [figures(i, s, right) for i, pair in enumerate(rights) for s, right in enumerate(pair)]
    made = summary(rows, 3, samples=2)
    assert made["accuracy"] == 0.5 and made["by_sample"] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    # The means 1, 0.5 and 0 have the standard deviation 0.5.
    radius = 1.959964 * 0.5 / 3**0.5
    assert made["interval"] == (pytest.approx(max(0, 0.5 - radius)), pytest.approx(min(1, 0.5 + radius)))
    assert "mean@2" in table(made)
    assert summary(rows[:2], 1, samples=2)["interval"] is None
    assert summary(reversed(rows), 3, samples=2) == made


def test_without_answers_there_is_no_accuracy():
    made = summary([figures(0, 0, None)], 2)
    assert made["accuracy"] is None and made["scored_problems"] == 0 and not made["is_complete"]
    assert "accuracy" not in table(made)
    assert summary([], 2)["output_tokens_per_answer"] is None and table(summary([], 2))


def test_failures_and_losses_are_told():
    rows = [
        figures(0, 0, False, is_failed=True, losses={"error": 2}),
        figures(1, 0, True, losses={"empty": 1, "error": 1}),
    ]
    made = summary(rows, 2)
    assert made["failed"] == 1 and made["answered_by"] == {"synthesis": 1} and made["accuracy"] == 0.5
    assert made["rounds"][0]["losses"] == {"empty": 1, "error": 3} and made["finish_reasons"] == {"stop": 4}
    shown = table(made)
    assert "lost or cut: 1 empty, 3 error, 2 cut answers" in shown and "6 tokens, of tries that failed" in shown
    assert "failed       1 (counted as wrong" in shown
    assert len({line.index("  ") for line in shown.splitlines() if "answered by" in line or "method" in line}) >= 1


def test_the_line_of_progress():
    progress = Progress(3, io.StringIO())
    job, trajectory = ("p", 0), Trajectory(round=0, index=0, status="ok", output_tokens=500)
    round_ = Round(
        number=0, is_final=False, references=(), trajectories=(trajectory,) * 4, messages=(), losses={"error": 2}
    )
    started = RoundStarted(number=0, is_final=False, width=4, references=(), seconds=0.0)
    progress.notify(job, started, known=1)
    progress.notify(job, TrajectoryEnded(trajectory))
    assert "0/3 answers" in progress.line() and "2 calls under way" in progress.line()
    progress.notify(job, RoundEnded(round_))
    progress.answered(job, True, is_failed=False, is_new=True)
    progress.answered(("q", 0), False, is_failed=True, is_new=False)
    line = progress.line()
    for part in ("2/3 answers", "50.0% right", "0 calls under way", "2.00k tok", "lost 2 error", "failed 1", "eta "):
        assert part in line
    progress.answered(("r", 0), None, is_failed=False, is_new=True)
    assert "eta" not in progress.line()


def test_a_terminal_has_one_line_that_is_refreshed():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), 0), (io.StringIO(), 2)):
        progress = Progress(3, stream)
        progress.tick()
        progress.tick()
        assert stream.getvalue().count("\n") == expected
        progress.close()
        progress.close()
        assert stream.getvalue().count("\n") == max(expected, 1)
