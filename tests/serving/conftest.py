import contextlib
import dataclasses

import numpy as np
import pytest
from coded_images import CONFIG, ORIGIN, Device, photo
from running_server import running
from tiny_tofc import config as tiny

from stepjax.config import ImageConfig, NumericsConfig, TokenizerConfig
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.engine import Engine
from stepjax.models.step_vl import abstract_model
from stepjax.processing.processor import Processor
from stepjax.tofc.hyperprior import freeze


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


# A server with a codec: a model with random parameters, fitted to noise.


@pytest.fixture(scope="module")
def coded_processor():
    return Processor.from_config(tiny.images, TokenizerConfig())


@pytest.fixture(scope="module")
def coded_model(coded_processor, randomized):
    vocab = coded_processor.tokenizer.vocab_size
    config = dataclasses.replace(tiny.model, decoder=dataclasses.replace(tiny.model.decoder, vocab_size=vocab))
    return randomized(abstract_model(config, NumericsConfig(compute_dtype="float32", remat="none")))


@pytest.fixture(scope="module")
def device(coded_model):
    seen = Device(coded_model, tiny.images, None)
    x_NC = np.concatenate([tile for seed in range(4) for tile in seen.features(photo(seed))[0]])
    coded_model.tofc.hyperprior.calibrate(x_NC)
    return Device(coded_model, tiny.images, freeze(coded_model.tofc.hyperprior, origin=ORIGIN))


@pytest.fixture(scope="module")
def frame(device):
    return device.stream(photo(0))


@pytest.fixture(scope="module")
def edge(coded_model, coded_processor, device):
    """A server with the real engine."""
    with running(
        coded_processor, AsyncEngine(Engine(coded_model, coded_processor, CONFIG)), codec=device.tables
    ) as one:
        yield one
