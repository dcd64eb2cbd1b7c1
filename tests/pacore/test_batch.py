"""The batch run with a sampler that answers from a script: order, failures, partial results, resuming."""

import asyncio
import dataclasses
import json

import pytest
from fake_sampler import FakeSampler

from stepjax.errors import CheckpointError, ConfigError
from stepjax.pacore import batch
from stepjax.pacore.baselines import Method
from stepjax.pacore.batch import BatchConfig, BatchRun
from stepjax.pacore.config import PacoreConfig, RoundLimits
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.journal import CALLS, Journal, open_journal, outcomes
from stepjax.pacore.records import Problem

PROBLEMS = [
    Problem(id=f"p{i}", messages=({"role": "user", "content": f"number {i}"},), ground_truth="x") for i in range(8)
]

DEFAULT = BatchConfig()


def number(asked):
    return int(asked.text.split("number ")[1].split()[0])


@pytest.fixture
def start(tmp_path):
    """A function that runs it all, with something beside it."""

    def start(script, *, config=DEFAULT, problems=PROBLEMS, beside=None, schedule=(2,), matching="math"):
        async def main(journal):
            sampler = FakeSampler(script)
            settings = config.method.configured(PacoreConfig(schedule=schedule, limits=RoundLimits(retries=0)))
            coordinator = Coordinator(sampler, settings, matching=matching)
            task = asyncio.create_task(BatchRun(coordinator, problems, config, journal, tmp_path).run())
            if beside is not None:
                async with asyncio.timeout(60):
                    await beside(task, sampler)
            return sampler, await task

        with open_journal(tmp_path, {}, {"samples": 1}, problems) as journal:
            return asyncio.run(main(journal))

    return start


def rows(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_bytes().split(b"\n")[:-1]]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_rows_are_in_the_order_of_the_problems(start, tmp_path):
    """Here each waits for the one behind it."""
    ended = [asyncio.Event() for _ in range(9)]
    ended[8].set()

    async def after(i):
        await ended[i + 1].wait()
        ended[i].set()

    _, summary = start(lambda asked: after(number(asked)))
    assert [row["id"] for row in rows(tmp_path)] == [problem.id for problem in PROBLEMS]
    assert summary["is_complete"] and not (tmp_path / "results.jsonl.tmp").exists()


def test_so_many_problems_are_under_way_and_no_more(start):
    begun = asyncio.Event()

    async def beside(task, sampler):
        await until(lambda: len(sampler.asked) == 6)
        for _ in range(50):
            await asyncio.sleep(0)
        assert {number(asked) for asked in sampler.asked} == {0, 1, 2} and len(sampler.asked) == 6
        begun.set()

    sampler, _ = start(lambda asked: begun.wait(), config=BatchConfig(concurrent_problems=3), beside=beside)
    assert len(sampler.asked) == 24


def test_an_unexpected_failure_is_a_row_and_stops_no_other(start, tmp_path, caplog):
    def scorer(problem, trajectory):
        return 1 / (problem.id != "p3")

    start(lambda asked: "x", config=BatchConfig(method=Method(name="best-of-n", width=2, scorer=scorer)))
    made = rows(tmp_path)
    assert [row["error"] for row in made] == [None] * 3 + ["ZeroDivisionError: division by zero"] + [None] * 4
    assert made[3]["usage"]["calls"] == 2 and made[3]["final_response"] is None and "p3" in caplog.text


def test_results_so_far_can_be_used_while_it_runs(start, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_REFRESH_SECONDS", 0.0)
    go_on, summary = asyncio.Event(), tmp_path / "summary.json"

    async def beside(task, sampler):
        await until(lambda: summary.exists() and json.loads(summary.read_text())["answers"] == 4)
        assert [row["id"] for row in rows(tmp_path)] == ["p0", "p2", "p4", "p6"]
        assert not json.loads(summary.read_text())["is_complete"]
        assert [each.problem.id for each in outcomes(tmp_path)] == ["p0", "p2", "p4", "p6"]
        go_on.set()

    start(lambda asked: go_on.wait() if number(asked) % 2 else "x", beside=beside)
    assert len(rows(tmp_path)) == 8 and json.loads(summary.read_text())["is_complete"]


def test_cancelled_it_leaves_what_it_has(start, tmp_path):
    async def beside(task, sampler):
        await until(lambda: (tmp_path / CALLS).read_bytes().count(b'"outcome"') == 4)
        task.cancel()

    slow = lambda asked: "x" if number(asked) < 4 else 3600.0  # noqa: E731
    with pytest.raises(asyncio.CancelledError):
        start(slow, beside=beside)
    assert [row["id"] for row in rows(tmp_path)] == ["p0", "p1", "p2", "p3"]
    assert json.loads((tmp_path / "summary.json").read_text())["answers"] == 4

    async def at_once(task, sampler):
        await asyncio.sleep(0)
        task.cancel()

    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(asyncio.CancelledError):
        start(slow, beside=at_once)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    sampler, _ = start(lambda asked: "x")
    assert {number(asked) for asked in sampler.asked} == {4, 5, 6, 7}


def test_a_run_of_an_older_version_is_resumed_from_its_trajectories(start, tmp_path):
    """Its lines have no outcomes: they are decided anew, and until then fewer answers do not replace more."""
    start(lambda asked: "x")
    before = (tmp_path / "results.jsonl").read_bytes()
    lines = (tmp_path / CALLS).read_bytes().splitlines(keepends=True)
    (tmp_path / CALLS).write_bytes(b"".join(line for line in lines if b'"outcome":' not in line))
    with pytest.raises(CheckpointError, match="has no answers yet; if an older version made it, rerun its command"):
        list(outcomes(tmp_path))

    async def at_once(task, sampler):
        await asyncio.sleep(0)
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        start(lambda asked: "y", beside=at_once)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    sampler, _ = start(lambda asked: "y")
    assert not sampler.asked and (tmp_path / "results.jsonl").read_bytes() == before


def test_other_answers_and_another_matching_are_applied_to_what_is_there(start, tmp_path):
    voted = BatchConfig(method=Method(name="majority", width=3))
    script = lambda asked: ["no", "0.5", "1/2"][asked.number % 3]  # noqa: E731
    start(script, config=voted)
    assert {row["final_response"] for row in rows(tmp_path)} == {"0.5"}
    sampler, summary = start(script, config=voted, matching="exact")
    assert {row["final_response"] for row in rows(tmp_path)} == {"no"} and summary["accuracy"] == 0
    corrected = [dataclasses.replace(problem, ground_truth="no") for problem in PROBLEMS]
    sampler, summary = start(script, config=voted, matching="exact", problems=corrected)
    assert not sampler.asked and summary["accuracy"] == 1 and all(each.correct for each in outcomes(tmp_path))


def test_a_journal_that_cannot_be_written_ends_it(start, monkeypatch):
    append, count = Journal.append, 0

    def failing(self, *arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise CheckpointError("the disk is full")
        append(self, *arguments)

    monkeypatch.setattr(Journal, "append", failing)
    with pytest.raises(CheckpointError, match="the disk is full"):
        start(lambda asked: "x")


def test_an_oracle_needs_every_answer(start):
    config = BatchConfig(method=Method(name="best-of-n", scorer="ground-truth"))
    with pytest.raises(ConfigError, match="'q' has no ground_truth"):
        start(lambda asked: "x", config=config, problems=[*PROBLEMS, Problem(id="q", messages=PROBLEMS[0].messages)])
    for field in ("samples", "concurrent_problems"):
        with pytest.raises(ConfigError, match=f"{field}=0"):
            BatchConfig(**{field: 0})
