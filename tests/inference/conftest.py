"""Small models with engines around them, and what they compute without a cache."""

import jax
import numpy as np
import pytest

from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine


class Words:
    """A processor for which token i is the i-th word."""

    def __init__(self, images, stop_ids=(55, 57)):
        self.image_config, self.stop_ids = images, stop_ids

    def decode(self, ids):
        return "".join(f" w{i}" for i in ids)


@pytest.fixture(scope="session")
def make_words(small_images):
    """A function from stop tokens to a processor for which token i is the i-th word."""
    return lambda *stop_ids: Words(small_images, stop_ids)


SMALL = dict(max_sequences=4, page_size=16, prefill_tokens=32, view_batch=2, feature_cache_tokens=64)


@pytest.fixture(scope="session")
def make_engine(small_model, small_images):
    """A function from changes of the configuration to an engine of `small_model` that no token stops."""

    def make(processor=None, model=None, mesh=None, **changes) -> Engine:
        return Engine(
            model or small_model, processor or Words(small_images, ()), EngineConfig(**SMALL | changes), mesh=mesh
        )

    return make


@pytest.fixture(scope="session")
def prompts(make_example):
    """Text and two images with crops, text alone, one image without crops: of different lengths and views."""
    return [
        make_example(4, (1, 2), 3, (1, 1), 4, seed=1),
        make_example(6, seed=2),
        make_example(2, (0, 0), 5, seed=3),
    ]


@pytest.fixture(scope="session")
def uncached(small_model):
    """A function from a prompt and a continuation to the logits [V] that follow, without a cache."""

    @jax.jit
    def logits_TV(model, tokens_BT, feature_index_BT, global_views_BGHWC, crops_BCHWC):
        hidden_BTD = model(
            tokens_BT=tokens_BT,
            positions_BT=np.arange(tokens_BT.shape[1])[None],
            feature_index_BT=feature_index_BT,
            global_views_BGHWC=global_views_BGHWC,
            crops_BCHWC=crops_BCHWC,
        )
        return model.decoder.logits(hidden_BTD)[0]

    def next_logits(example, continuation):
        length = len(example.tokens) + len(continuation)
        tokens_T = np.zeros(64, np.int32)  # causal: what follows is of no influence
        tokens_T[:length] = [*example.tokens, *continuation]
        index_T = np.full(64, -1, np.int32)
        index_T[: len(example.tokens)] = example.feature_index
        views, crops = example.global_views, example.crops
        out = logits_TV(small_model, tokens_T[None], index_T[None], views[None], crops[None])
        return np.asarray(out)[length - 1]

    return next_logits
