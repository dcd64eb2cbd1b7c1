"""Where a run's files lie, here and in an object store."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils
from tiny_recipe import config

from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError
from stepjax.training.run_directory import METRICS, fetch, is_remote, local_directory, owned, publish, run_directory


def test_a_path_is_both_and_a_url_has_a_place_on_this_machine():
    here = dataclasses.replace(config, out="some/where")
    assert not is_remote(here)
    assert Path(run_directory(here)) == local_directory(here) == Path("some/where/tiny")
    there = dataclasses.replace(config, out="gs://bucket/runs")
    assert is_remote(there)
    assert str(run_directory(there)) == "gs://bucket/runs/tiny"
    assert local_directory(there) == Path("runs/tiny")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("is_held", [False, True])
def test_all_processes_are_refused_with_the_first(tmp_path, monkeypatch, index, is_held):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array([own, is_held]))
    with contextlib.ExitStack() as stack:
        if is_held:
            stack.enter_context(locked(tmp_path / "run"))
            message = "being written by process" if index == 0 else "the first process cannot use"
            stack.enter_context(pytest.raises(CheckpointError, match=message))
        with owned(tmp_path / "run"):
            assert (tmp_path / "run").exists() == (index == 0)  # only the first makes and locks it


def test_metrics_go_along_to_the_machine_that_takes_over(tmp_path):
    store, first, second = epath.Path(tmp_path / "store"), tmp_path / "first", tmp_path / "second"
    publish(store, first)
    assert not store.exists()  # nothing to tell yet
    first.mkdir()
    (first / METRICS).write_text("1\n2\n")
    publish(store, first)
    fetch(store, second)
    assert (second / METRICS).read_text() == "1\n2\n"
    (second / METRICS).write_text("1\n2\n3\n")
    fetch(store, second)  # one that is here already is the newer one
    assert (second / METRICS).read_text() == "1\n2\n3\n"
    fetch(epath.Path(tmp_path / "nothing"), tmp_path / "third")
    assert not (tmp_path / "third").exists()
