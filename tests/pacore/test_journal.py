"""The journal: what is whole is kept, what was cut off is drawn again, and nobody else writes there."""

import json
import os

import pytest

from stepjax.errors import CheckpointError
from stepjax.pacore.journal import CALLS, SETTINGS, Journal, open_journal
from stepjax.pacore.records import Attempt, Trajectory

JOB = ("p", 0)


def trajectory(round_=0, index=0, status="ok", content="42", **fields):
    return Trajectory(round=round_, index=index, status=status, content=content, **fields)


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
        journal.append(JOB, trajectory(index=index, output_tokens=7))
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
    path.write_bytes(lines[0] + lines[1].replace(b'"output_tokens":7', b'"output_tokens":8') + lines[2])
    with pytest.raises(CheckpointError, match="changed since it was written.*remove it to have its call drawn again"):
        Journal(path)
    path.write_bytes(lines[0] + lines[2])
    assert [each.index for each in reopened().done(JOB)] == [0, 2]


def test_lines_of_an_older_version_are_counted(path, reopened):
    reopened().append(JOB, trajectory())
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_text(json.dumps(record) + "\n")
    journal = reopened()
    assert journal.num_unsigned == journal.num_known == 1 and journal.done(JOB) == [trajectory()]
    journal.append(JOB, trajectory(index=1))
    assert reopened().num_unsigned == 1


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"prompt_tokens": "7"}, "prompt_tokens is '7'"),
        ({"output_tokens": -1}, "output_tokens is -1"),
        ({"cached_tokens": 1.5}, "cached_tokens is 1.5"),
        ({"output_tokens": None}, "output_tokens is None"),
        ({"finish_reason": ["stop"]}, "finish_reason is"),
        ({"reasoning": 5}, "reasoning is 5"),
        ({"tool_calls": ["f"]}, "tool_calls is"),
        ({"mean_logprob": "-1"}, "mean_logprob is '-1'"),
        ({"attempts": (Attempt(status="error", error="x", seconds=0.1, output_tokens="3"),)}, "output_tokens is '3'"),
    ],
)
def test_what_an_older_version_took_from_a_server_is_named(path, reopened, fields, named):
    reopened().append(JOB, trajectory(**fields))
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
        "config.seed was 0, and is 1 now",
        "config.schedule was [4], and is [4, 2] now",
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
