"""The launcher of launch/'s scripts, and the command that they launch."""

import sys

import pytest
from launch_tools import WORKER, Launcher


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


@pytest.fixture(scope="session")
def worker():
    """The command of the stand-in for stepjax."""
    return [sys.executable, "-S", str(WORKER)]  # -S: no site packages, which makes it start at once
