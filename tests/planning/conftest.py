"""A tiny recipe that the tests of plans share."""

import dataclasses

import pytest
from run_files import RECIPE

from stepjax.config import PretrainConfig
from stepjax.config_file import load_recipe


@pytest.fixture(scope="session")
def tiny() -> PretrainConfig:
    """The tiny recipe with four rows, in bfloat16 and rematerialised as real runs are."""
    config = load_recipe(RECIPE)
    batch = dataclasses.replace(config.batch, rows=4, global_views=2, crops=4)
    numerics = dataclasses.replace(config.numerics, compute_dtype="bfloat16", remat="full")
    return dataclasses.replace(config, batch=batch, numerics=numerics)
