import contextlib

import pytest
from running_server import running

from stepjax.config import ImageConfig, TokenizerConfig
from stepjax.processing.processor import Processor


@pytest.fixture(scope="session")
def processor():
    images = ImageConfig(global_size=56, crop_size=28, patch_size=14, max_side=112)
    return Processor.from_config(images, TokenizerConfig())


@pytest.fixture
def start(processor):
    """A function that starts a server for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(running(processor, *args, **settings))


@pytest.fixture(scope="module")
def server(processor):
    with running(processor) as one:
        yield one
