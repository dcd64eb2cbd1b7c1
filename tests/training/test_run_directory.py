"""Where a run's files lie, here and in an object store."""

import dataclasses
from pathlib import Path

from etils import epath
from tiny_recipe import config

from stepjax.training.run_directory import METRICS, fetch, is_remote, local_directory, publish, run_directory


def test_a_path_is_both_and_a_url_has_a_place_on_this_machine():
    here = dataclasses.replace(config, out="some/where")
    assert not is_remote(here)
    assert Path(run_directory(here)) == local_directory(here) == Path("some/where/tiny")
    there = dataclasses.replace(config, out="gs://bucket/runs")
    assert is_remote(there)
    assert str(run_directory(there)) == "gs://bucket/runs/tiny"
    assert local_directory(there) == Path("runs/tiny")


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
