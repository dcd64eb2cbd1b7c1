"""The batch runner with a sampler that answers from a script: order, failures, partial results."""

import asyncio
import json

import pytest
from fake_sampler import FakeSampler

from stepjax.errors import CheckpointError, ConfigError
from stepjax.pacore import runner
from stepjax.pacore.baselines import Method
from stepjax.pacore.config import Limits, PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.journal import Journal, open_journal
from stepjax.pacore.progress import Progress
from stepjax.pacore.records import Problem
from stepjax.pacore.runner import BatchConfig, BatchRun

PROBLEMS = [
    Problem(id=f"p{i}", messages=({"role": "user", "content": f"number {i}"},), ground_truth="x") for i in range(8)
]

DEFAULT = BatchConfig()


def number(asked):
    return int(asked.text.split("number ")[1].split()[0])


@pytest.fixture
def start(tmp_path):
    """A function that runs it all, with something beside it."""

    def start(script, *, config=DEFAULT, problems=PROBLEMS, beside=None, schedule=(2,)):
        async def main(journal):
            sampler = FakeSampler(script)
            settings = config.method.configured(PacoreConfig(schedule=schedule, limits=Limits(retries=0)))
            batch = BatchRun(Coordinator(sampler, settings), problems, config, journal, tmp_path, Progress(8))
            task = asyncio.create_task(batch.run())
            if beside is not None:
                await beside(task, sampler)
            return sampler, await task

        with open_journal(tmp_path, {}, {}) as journal:
            return asyncio.run(main(journal))

    return start


def rows(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_bytes().split(b"\n")[:-1]]


def test_rows_are_in_the_order_of_the_problems(start, tmp_path):
    _, summary = start(lambda asked: (8 - number(asked)) * 0.02)
    assert [row["id"] for row in rows(tmp_path)] == [problem.id for problem in PROBLEMS]
    assert summary["is_complete"] and not (tmp_path / "results.jsonl.tmp").exists()


def test_so_many_problems_are_under_way_and_no_more(start):
    seen = set()

    async def beside(task, sampler):
        while not task.done():
            if len(sampler.asked) == 6:
                seen.add(frozenset(number(asked) for asked in sampler.asked))
            await asyncio.sleep(0)

    sampler, _ = start(lambda asked: 0.02, config=BatchConfig(concurrent_problems=3), beside=beside)
    assert seen == {frozenset({0, 1, 2})} and len(sampler.asked) == 24


def test_an_unexpected_failure_is_a_row_and_stops_no_other(start, tmp_path, caplog):
    def scorer(problem, trajectory):
        return 1 / (problem.id != "p3")

    start(lambda asked: "x", config=BatchConfig(method=Method(name="best-of-n", width=2, scorer=scorer)))
    made = rows(tmp_path)
    assert [row["error"] for row in made] == [None] * 3 + ["ZeroDivisionError: division by zero"] + [None] * 4
    assert made[3]["usage"]["calls"] == 2 and made[3]["final_response"] is None and "p3" in caplog.text


def test_results_so_far_can_be_used_while_it_runs(start, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_REFRESH_SECONDS", 0.02)
    seen = []

    async def beside(task, sampler):
        while not task.done():
            await asyncio.sleep(0.01)
            if (tmp_path / "results.jsonl").exists():
                seen.append([row["id"] for row in rows(tmp_path)])
                summary = json.loads((tmp_path / "summary.json").read_text())
                assert summary["is_complete"] is (summary["answers"] == 8)

    start(lambda asked: 0.03 * number(asked), beside=beside)
    assert any(0 < len(each) < 8 for each in seen)
    assert all(each == sorted(each) for each in seen)


def test_cancelled_it_leaves_what_it_has(start, tmp_path):
    async def beside(task, sampler):
        while len(sampler.asked) < 20:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.3)
        task.cancel()

    slow = lambda asked: "x" if number(asked) < 4 else 30.0  # noqa: E731
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
    assert (tmp_path / "results.jsonl").read_bytes() == before, "fewer answers do not replace more"
    sampler, _ = start(lambda asked: "x")
    assert {number(asked) for asked in sampler.asked} == {4, 5, 6, 7}


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
