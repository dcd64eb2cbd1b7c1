"""The whole model against recorded outputs of the reference implementations, through the public loader.

Legend: B rows, T tokens, G global views, C crops.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.processing.tokens import Example

TOLERANCE = 5e-5  # the recorded features and logits reach 5; all is float32
IMAGE_TOKEN = 308  # config.json: image_token_id


@pytest.fixture(scope="module")
def example(golden, tiny_vl):
    """The recorded prompt as an example: 2 crops and the view of image 0, 1 crop and the view of image 1."""
    _, images = tiny_vl
    counts = [int(n) for n in golden["num_patches"]]
    crops = np.arange(sum(counts) * images.crop_tokens).reshape(-1, images.crop_tokens)
    views = crops.size + np.arange(len(counts) * images.global_tokens).reshape(-1, images.global_tokens)
    order, first = [], 0
    for view, count in enumerate(counts):
        order += [*crops[first : first + count].ravel(), *views[view]]
        first += count
    tokens_T = golden["input_ids"][0]
    feature_index_T = np.full(len(tokens_T), -1, np.int32)
    feature_index_T[tokens_T == IMAGE_TOKEN] = order
    return Example(
        name="golden",
        tokens=tokens_T.astype(np.int32),
        loss_weights=np.zeros(len(tokens_T), np.float32),
        feature_index=feature_index_T,
        global_views=golden["pixel_values"].transpose(0, 2, 3, 1),
        crops=golden["patch_pixel_values"].transpose(0, 2, 3, 1),
    )


@pytest.fixture(scope="module")
def logits_of(tiny_vl):
    model, _ = tiny_vl

    @jax.jit
    def logits_BTV(tokens_BT, feature_index_BT, global_views_BGHWC, crops_BCHWC):
        hidden_BTD = model(
            tokens_BT=tokens_BT,
            positions_BT=np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape),
            feature_index_BT=feature_index_BT,
            global_views_BGHWC=global_views_BGHWC,
            crops_BCHWC=crops_BCHWC,
        )
        return model.decoder.logits(hidden_BTD)

    return logits_BTV


def close(ours, recorded):
    np.testing.assert_allclose(np.asarray(ours), recorded, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["global", "crop"])
def test_encoder_and_projected_features(tiny_vl, golden, example, kind):
    model, _ = tiny_vl
    views = example.global_views if kind == "global" else example.crops
    close(jax.jit(model.vision)(views), golden[f"trunk_{kind}"])
    features_1QD = jax.jit(model.encode_views)(views[None])
    close(features_1QD.reshape(golden[f"features_{kind}"].shape), golden[f"features_{kind}"])


def test_logits_of_text_with_two_images(golden, example, logits_of):
    logits_BTV = logits_of(
        example.tokens[None], example.feature_index[None], example.global_views[None], example.crops[None]
    )
    close(logits_BTV, golden["logits"])


def test_logits_of_text_alone(golden, example, logits_of):
    ids_BT = golden["text_ids"]
    no_views, no_crops = example.global_views[None, :0], example.crops[None, :0]
    close(logits_of(ids_BT, np.full_like(ids_BT, -1), no_views, no_crops), golden["text_logits"])


def test_greedy_continuation(tiny_vl, golden, example):
    model, images = tiny_vl
    recorded = tuple(int(token) for token in golden["greedy_tokens"])
    engine = Engine(model, SimpleNamespace(decode=str, stop_ids=(), image_config=images), EngineConfig(max_sequences=1))
    [[completion]] = engine.generate([example], SamplingParams(temperature=0.0, max_tokens=len(recorded)))
    assert completion.tokens == recorded
    assert completion.finish_reason == "length"
