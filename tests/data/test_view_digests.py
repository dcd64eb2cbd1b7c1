"""Batches and views are those that were recorded before they were made faster, to the last bit."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from stepjax.config import ImageConfig
from stepjax.config_file import load_recipe
from stepjax.data.loader import Loader
from stepjax.processing.images import make_views
from stepjax.processing.processor import Processor
from stepjax.processing.view_pixels import resize_small

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((Path(__file__).parent / "view_digests.json").read_text())
CONFIGS = {
    "public": ImageConfig(),
    "small": ImageConfig(global_size=112, crop_size=56, patch_size=14, max_crops=None),
}

# Other versions of Pillow may render and resize with other last bits.
same_pillow = pytest.mark.skipif(
    PIL.__version__.split(".")[0] != RECORDED["pillow"].split(".")[0], reason="recorded with another Pillow"
)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@same_pillow
def test_first_batches_of_the_demo():
    config = load_recipe(ROOT / "configs/digits/pretrain.py")
    processor = Processor.from_config(config.images, config.tokenizer)
    batches = iter(Loader(config.data, config.batch, config.images, processor, seed=0))
    try:
        for batch, recorded in zip(itertools.islice(batches, 3), RECORDED["batches"], strict=True):
            assert {name: digest(array.tobytes()) for name, array in batch.arrays.items()} == recorded["arrays"]
            assert digest(json.dumps(batch.names).encode()) == recorded["names"]
            assert digest(json.dumps(batch.states).encode()) == recorded["states"]
            assert batch.used.tolist() == recorded["used"]
    finally:
        batches.close()


@same_pillow
@pytest.mark.parametrize("case", RECORDED["views"])
def test_views(case):
    name, size = case.split()
    width, height = map(int, size.split("x"))
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    views = make_views(Image.fromarray(pixels), CONFIGS[name])
    assert digest(views.global_view_HWC.tobytes() + views.crops_NHWC.tobytes()) == RECORDED["views"][case]


@pytest.mark.parametrize("side", [1, 7, 40, 80])
def test_small_windows_are_resized_as_pillow_resizes_them(side):
    rng = np.random.default_rng(side)
    for _ in range(60):
        height, width = rng.integers(1, 120, size=2)
        pixels = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        resized = resize_small(pixels, side)
        for image, ours in zip(map(Image.fromarray, pixels), resized, strict=True):
            channels = [c.convert("F").resize((side, side), Image.Resampling.BILINEAR) for c in image.split()]
            np.testing.assert_allclose(ours, np.stack([np.asarray(c) for c in channels], axis=-1), rtol=2e-7)
