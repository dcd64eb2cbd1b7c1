"""A training run with one checkpoint, and what `stepjax convert` exports of it."""

import jax
import pytest
from tiny_recipe import config as RECIPE

from stepjax.cli import main
from stepjax.models.step_vl import abstract_model
from stepjax.training.checkpoint import Checkpointer


@pytest.fixture(scope="session")
def run(tmp_path_factory, randomized):
    """A run's directory with one checkpoint, and the model in it."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    model = randomized(abstract_model(RECIPE.model, RECIPE.numerics))
    with Checkpointer(directory / "checkpoints", keep=1, config=RECIPE) as checkpointer:
        checkpointer.save(16, {"model": model, "step": jax.numpy.int32(16)}, {}, wait=True)
    return directory, model


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["convert", str(run[0]), str(directory)]) == 0
    return directory


@pytest.fixture(scope="session")
def reconverted(exported, tmp_path_factory):
    """What is exported, as a checkpoint that Orbax restores."""
    directory = tmp_path_factory.mktemp("reconverted") / "orbax"
    assert main(["convert", str(exported), str(directory)]) == 0
    return directory
