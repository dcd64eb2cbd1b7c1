"""A tiny recipe, and one plan of it that the tests share: a compilation takes seconds."""

import dataclasses
import importlib.util

import pytest
from run_files import RECIPE

from stepjax.config import PretrainConfig
from stepjax.config_file import load_recipe


def tiny_config(**changes) -> PretrainConfig:
    """The tiny recipe with four rows, layers as a real run has them, and changes of whole sections."""
    config = load_recipe(RECIPE)
    batch = dataclasses.replace(config.batch, rows=4, global_views=2, crops=4)
    numerics = dataclasses.replace(config.numerics, compute_dtype="bfloat16", remat="full")
    return dataclasses.replace(config, **{"batch": batch, "numerics": numerics} | changes)


@pytest.fixture(scope="session")
def tiny() -> PretrainConfig:
    return tiny_config()


@pytest.fixture(scope="session")
def tiny_plan(tiny):
    """The tiny recipe on four chips of v5p."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is published for 64-bit x86 Linux only")
    from stepjax.planning.plan import make_plan
    from stepjax.planning.topologies import find

    return make_plan(tiny, find("v5p-8"))
