"""The journal: what is whole is kept, what was cut off is drawn again, and nobody else writes there."""

import contextlib
import dataclasses
import json
import os

import pytest

from stepjax.errors import CheckpointError
from stepjax.pacore.journal import CALLS, PROBLEMS, SETTINGS, Journal, open_journal, outcomes
from stepjax.pacore.records import Attempt, Outcome, Problem, Reference, Round, Trajectory
from stepjax.rollouts.rollout import Rollout

JOB = ("p", 0)


def trajectory(round_=0, index=0, status="ok", content="42", attempts=(), **fields):
    rollout = Rollout(content=content, **fields)
    return Trajectory(round=round_, index=index, status=status, rollout=rollout, attempts=attempts)


@pytest.fixture
def path(tmp_path):
    return tmp_path / CALLS


@pytest.fixture
def reopened(path):
    opened = []

    def reopen():
        for each in opened:
            each.close()
        opened[:] = [Journal(path)]
        return opened[0]

    yield reopen
    for each in opened:
        each.close()


def test_trajectories_come_back_as_they_were(reopened):
    whole = trajectory(
        content="half a pair \ud83d, \u2028 and more",
        reasoning="hm",
        tool_calls=({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},),
        finish_reason="stop",
        seed=2**53 - 1,
        mean_logprob=-0.1 - 0.2,
        attempts=(Attempt(status="error", error="busy", seconds=0.1, output_tokens=3),),
    )
    journal = reopened()
    journal.append(JOB, trajectory(1, 0))
    journal.append(JOB, whole)
    journal.append(("q", 3), trajectory())
    assert journal.done(JOB) == [whole, trajectory(1, 0)] == reopened().done(JOB)
    assert reopened().num_known == 3 and reopened().done(("q", 0)) == []


def test_a_line_that_was_cut_off_is_removed_wherever_the_cut_is(path, reopened):
    journal = reopened()
    for index in range(3):
        journal.append(JOB, trajectory(index=index))
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last):
        path.write_bytes(whole[:-cut])
        journal = reopened()
        assert [each.index for each in journal.done(JOB)] == [0, 1]
        assert path.stat().st_size == len(whole) - last
        journal.append(JOB, trajectory(index=2))
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-last])
    assert reopened().num_known == 2


@pytest.mark.parametrize("bad", ["{", "3", "{}", '{"problem": "p", "sample": 0, "trajectory": {"round": 0}}', "\0" * 9])
def test_any_other_line_that_is_not_whole_is_named(path, reopened, bad):
    reopened().append(JOB, trajectory())
    lines = path.read_text().splitlines()
    for place in (0, 1):
        made = list(lines)
        made.insert(place, bad)
        path.write_text("\n".join(made) + "\n")
        with pytest.raises(CheckpointError, match=rf"line {place + 1}: not a trajectory"):
            Journal(path)


def test_a_changed_line_is_named(path, reopened):
    """Whatever byte of it: as a digit of a count, which is still a line like any other."""
    journal = reopened()
    for index in range(3):
        journal.append(JOB, trajectory(index=index, num_tokens=7))
    lines = path.read_bytes().splitlines(keepends=True)
    for place in range(len(lines[1]) - 1):
        for bit in (0x01, 0x20):
            changed = bytearray(lines[1])
            changed[place] ^= bit
            if b"\n" in changed[:-1]:
                continue
            path.write_bytes(b"".join([lines[0], changed, lines[2]]))
            with pytest.raises(CheckpointError, match="line 2: not a trajectory"):
                Journal(path)
    path.write_bytes(lines[0] + lines[1].replace(b'"num_tokens":7', b'"num_tokens":8') + lines[2])
    with pytest.raises(CheckpointError, match="digest does not match.*remove it to have its call drawn again"):
        Journal(path)
    path.write_bytes(lines[0] + lines[2])
    assert [each.index for each in reopened().done(JOB)] == [0, 2]


OLDER = {
    **{"round": 0, "index": 0, "status": "ok", "content": "42", "reasoning": None, "tool_calls": [], "seed": 5},
    **{"finish_reason": "stop", "error": None, "prompt_tokens": 7, "output_tokens": 3, "cached_tokens": 2},
    **{"mean_logprob": -0.5, "start": 0.5, "seconds": 1.5},
    "attempts": [{"status": "error", "error": "busy", "seconds": 0.1, "output_tokens": 3}],
}


def older_line(digest=None, **fields):
    record = {"problem": "p", "sample": 0, "trajectory": {**OLDER, **fields}}
    return json.dumps({**record, "digest": digest} if digest else record, separators=(",", ":")) + "\n"


def test_lines_of_older_versions_are_read(path, reopened):
    """Trajectories had their rollout's fields themselves; the oldest lines had no digest, and are counted."""
    path.write_text(older_line() + older_line("138ecab55f8112d8", status="timeout", index=1, finish_reason=None))
    journal = reopened()
    assert journal.num_unsigned == 1 and journal.num_known == 2
    rollout = Rollout(
        content="42", seed=5, num_prompt_tokens=7, num_tokens=3, num_cached_tokens=2, mean_logprob=-0.5, start=0.5,
        seconds=1.5,
    )  # fmt: skip
    attempts = (Attempt(status="error", error="busy", seconds=0.1, output_tokens=3),)
    whole, late = journal.done(JOB)
    assert whole == Trajectory(round=0, index=0, rollout=rollout, attempts=attempts)
    assert late.status == late.rollout.finish_reason == "timeout"
    journal.append(JOB, trajectory(index=2))
    assert reopened().num_unsigned == 1 and len(reopened().done(JOB)) == 3


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"prompt_tokens": "7"}, "num_prompt_tokens='7'"),
        ({"output_tokens": -1}, "num_tokens=-1"),
        ({"cached_tokens": 1.5}, "num_cached_tokens=1.5"),
        ({"output_tokens": None}, "num_tokens=None"),
        ({"finish_reason": ["stop"]}, "finish_reason="),
        ({"reasoning": 5}, "reasoning=5"),
        ({"tool_calls": ["f"]}, "tool_calls.0='f'"),
        ({"mean_logprob": "-1"}, "mean_logprob='-1'"),
        ({"attempts": [{"status": "error", "error": "x", "seconds": 0.1, "output_tokens": "3"}]}, "output_tokens='3'"),
        ({"status": "fine"}, "status='fine'"),
        ({"colour": 3}, "colour=3"),
    ],
)
def test_a_field_that_does_not_fit_is_named(path, fields, named):
    path.write_text(older_line(**fields))
    with pytest.raises(CheckpointError, match=f"line 1: not a trajectory .*{named}"):
        Journal(path)


def test_what_failed_is_forgotten_with_what_depends_on_it(reopened):
    journal = reopened()
    for each in [
        trajectory(0, 0),
        trajectory(0, 1, "error"),
        trajectory(0, 2, "cancelled"),
        trajectory(1, 0),
        trajectory(2, 0),
    ]:
        journal.append(JOB, each)
    journal.append(("fine", 0), trajectory(0, 0))
    journal.append(("fine", 0), trajectory(0, 1, "cancelled"))
    journal.append(("nothing", 0), trajectory(0, 0, content=" "))
    assert journal.forget_failed() == 4 + 1
    for _ in range(2):
        assert [(each.round, each.index) for each in journal.done(JOB)] == [(0, 0)]
        assert len(journal.done(("fine", 0))) == 2 and not journal.done(("nothing", 0))
        journal = reopened()
    journal.append(JOB, trajectory(0, 1))
    assert len(reopened().done(JOB)) == 2
    assert journal.forget_failed() == 0


def decided(**fields):
    """Two rounds, the second with references of its own for each call."""
    messages = tuple(Reference(i, f"m{i}") for i in range(2))
    cut = Reference(0, "[...] 0", was_cut=True)
    given = Problem(id="p", messages=({"role": "user", "content": "?"},), responses=("an earlier one", "long, long"))
    first = Round(
        number=0,
        is_final=False,
        references=(Reference(0, "an earlier one"), Reference(1, "[...] long", was_cut=True)),
        trajectories=(trajectory(0, 0, content="m0"), trajectory(0, 1, content="m1")),
        messages=messages,
        losses={"did_not_fit": 1},
        cut_references=1,
    )
    second = Round(
        number=1,
        is_final=True,
        references=(messages[1],),
        own_references=((messages[1],), (cut, messages[1])),
        trajectories=(trajectory(1, 0), trajectory(1, 1, "error", content="")),
        messages=(Reference(0, "42"),),
        losses={"error": 1},
    )
    outcome = Outcome(
        problem=given, rounds=(first, second), answered_by="vote", chosen=(1, 0), seconds=2.5, correct=True
    )
    return dataclasses.replace(outcome, **fields)


def write_run(directory, *made, matching="math"):
    with open_journal(directory, {}, {"samples": 2}, [made[0].problem]) as journal:
        for each in made:
            for round_ in each.rounds:
                for trajectory_ in round_.trajectories:
                    journal.append((each.problem.id, each.sample), trajectory_)
            journal.append_outcome(each, matching)


def test_outcomes_are_read_back_exactly(tmp_path):
    failed = decided(sample=1, answered_by=None, chosen=None, error="nothing came of it", correct=None)
    write_run(tmp_path, decided(), failed)
    assert list(outcomes(tmp_path)) == [decided(), failed]
    picture = decided(problem=dataclasses.replace(decided().problem, messages=(
        {"role": "user", "content": [{"type": "image", "image": b"\x89PNG"}, {"type": "image", "image": "/a.png"}]},
    )))  # fmt: skip
    write_run(tmp_path / "bytes", picture)
    [read] = outcomes(tmp_path / "bytes")
    assert [item["image"] for item in read.problem.messages[0]["content"]] == [None, "/a.png"]


def test_an_outcome_counts_while_its_calls_are_there_and_its_matching_is_asked(tmp_path, caplog):
    write_run(tmp_path, decided())
    path, problem = tmp_path / CALLS, decided().problem
    whole = path.read_bytes()
    with contextlib.closing(Journal(path)) as journal:
        assert journal.outcome(problem, 0, matching="math") == decided() and not journal.outcome(problem, 1)
        assert journal.outcome(problem, 0, matching="exact") is None
        journal.append_outcome(decided(correct=False), "exact")
        assert journal.outcome(problem, 0) == decided(correct=False) and not journal.outcome(
            problem, 0, matching="math"
        )
        assert journal.forget_failed() == 1 and journal.outcome(problem, 0) is None
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    assert not list(outcomes(tmp_path)) and "'p'" in caplog.text
    path.write_bytes(whole + b'{"problem":"p"')
    assert list(outcomes(tmp_path)) == [decided()] and path.read_bytes() == whole + b'{"problem":"p"', "one may write"


def test_a_directory_that_holds_no_outcomes_says_why(tmp_path):
    def refused(match):
        with pytest.raises(CheckpointError, match=match):
            list(outcomes(tmp_path))

    refused("is not a run")
    write_run(tmp_path, decided())
    (tmp_path / PROBLEMS).write_text("{")
    refused(f"{PROBLEMS} cannot be read.*rerun the run's command")
    (tmp_path / SETTINGS).write_text("{}")
    refused(f"{SETTINGS} cannot be read, or is of another version")
    (tmp_path / SETTINGS).write_text('{"samples": 1}')
    (tmp_path / CALLS).write_text("")
    refused("has no answers yet$")


def test_a_disk_that_is_full_leaves_the_journal_whole(path, reopened, monkeypatch):
    journal = reopened()
    journal.append(JOB, trajectory())
    before, write = path.read_bytes(), os.write

    def half(file, data):
        write(file, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(CheckpointError, match="No space left"):
        journal.append(JOB, trajectory(index=1))
    monkeypatch.setattr(os, "write", write)
    assert path.read_bytes() == before
    journal.append(JOB, trajectory(index=1))
    assert reopened().num_known == 2


def test_other_settings_are_refused_by_name(tmp_path):
    def start(settings, **free):
        with open_journal(tmp_path / "run", settings, free):
            pass

    start({"config": {"seed": 0, "schedule": (4,)}, "a": 1}, upstream="x")
    start({"config": {"seed": 0, "schedule": (4,)}, "a": 1}, upstream="y")
    assert json.loads((tmp_path / "run" / SETTINGS).read_text())["upstream"] == "y"
    with pytest.raises(CheckpointError) as error:
        start({"config": {"seed": 1, "schedule": (4, 2)}, "b": 2})
    for part in (
        "config.seed was 0, now 1",
        "config.schedule was [4], now [4, 2]",
        "a was 1",
        "b was None",
    ):
        assert part in str(error.value)
    (tmp_path / "run" / SETTINGS).write_text("{")
    with pytest.raises(CheckpointError, match=f"{SETTINGS} cannot be read"):
        start({})
    (tmp_path / "run" / SETTINGS).unlink()
    with pytest.raises(CheckpointError, match="without its"):
        start({})


def test_two_processes_do_not_write_one_directory(tmp_path):
    with open_journal(tmp_path, {}, {}):
        with pytest.raises(CheckpointError, match="being written by process"), open_journal(tmp_path, {}, {}):
            pass
    with open_journal(tmp_path, {}, {}):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made or written"), open_journal(tmp_path / "file", {}, {}):
        pass
