"""Fixtures around the tiny recipe; test files ask for them with `pytest_plugins = ("tiny_run",)`."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from run_files import RECIPE

import stepjax.training.loop as loop
from stepjax.cli import main
from stepjax.config import PretrainConfig
from stepjax.sharding import make_mesh
from stepjax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    out: Path
    directory: Path
    stdout: str
    stderr: str


def _train_step(config: PretrainConfig, optimizer, schedule):
    """The same function for configurations that compile to the same step, so that JAX traces it once."""
    parts = (
        config.batch,
        config.schedule,
        config.optimizer,
        config.loss,
        config.model.tofc,
        config.images,
        config.numerics,
        len(config.data.sources),
        config.adapters,
    )
    key = tuple(map(repr, parts))
    return _train_steps.setdefault(key, make_train_step(config, optimizer, schedule))


_train_steps: dict[tuple, Callable] = {}


@contextlib.contextmanager
def _quick_runs() -> Iterator[None]:
    """Runs use the first of the eight devices, and trace the same step once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(loop, "make_train_step", _train_step)
        yield


@pytest.fixture
def quick_runs() -> Iterator[None]:
    with _quick_runs():
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> FinishedRun:
    """The tiny recipe, trained and evaluated by the command line. Leave it as it is: all tests share it."""
    out = tmp_path_factory.mktemp("runs")
    stdout, stderr = io.StringIO(), io.StringIO()
    with _quick_runs(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(["pretrain", str(RECIPE), "--out", str(out)])
    assert status == 0, stderr.getvalue()
    return FinishedRun(out, out / "tiny", stdout.getvalue(), stderr.getvalue())
