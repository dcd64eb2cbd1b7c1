"""Views against torch's antialiased bilinear interpolation, which the public processor applies after normalising."""

import numpy as np
import pytest
from PIL import Image

from stepjax.config import ImageConfig
from stepjax.processing.images import make_views

torch = pytest.importorskip("torch")

CONFIG = ImageConfig()
SMALL = ImageConfig(global_size=112, crop_size=56, max_side=336, thin_side=8)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def torch_view(image, side, config, dtype):
    """To [0, 1], normalise, resize: the order of the public processor."""
    pixels_CHW = torch.tensor(np.asarray(image)).permute(2, 0, 1).to(dtype) / 255
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (config.mean, config.std))
    pixels_CHW = (pixels_CHW - mean) / std
    if image.size != (side, side):
        resize = torch.nn.functional.interpolate
        pixels_CHW = resize(pixels_CHW[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    return pixels_CHW.permute(1, 2, 0).numpy()


SIZES = [(224, 224), (601, 403), (97, 61), (727, 728), (1, 1), (729, 500), (1001, 903), (2017, 1511), (3023, 2267)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_global_view(size):
    """Enlarging and shrinking, odd sizes. Against torch in float64, where its filter weights are exact."""
    image = noise(*size)
    view = make_views(image, CONFIG).global_view_HWC
    np.testing.assert_allclose(view, torch_view(image, 728, CONFIG, torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (601, 403), (2017, 1511)], ids=str)
def test_what_separates_us_from_float32_is_torchs_own_rounding(size):
    """torch in float32 also rounds filter positions and weights to float32: 1/50 of a grey level on pure noise."""
    image = noise(*size)
    view = make_views(image, CONFIG).global_view_HWC
    in_float32 = torch_view(image, 728, CONFIG, torch.float32)
    own_error = np.abs(in_float32 - torch_view(image, 728, CONFIG, torch.float64)).max()
    np.testing.assert_allclose(view, in_float32, rtol=0, atol=own_error + 1e-6)
    assert own_error < 3e-4


def test_identity_is_bit_exact():
    image = noise(728, 728)
    np.testing.assert_array_equal(
        make_views(image, CONFIG).global_view_HWC, torch_view(image, 728, CONFIG, torch.float32)
    )


@pytest.mark.parametrize(
    "size, config",
    [
        ((600, 300), CONFIG),
        ((301, 727), CONFIG),
        ((1000, 400), CONFIG),
        ((1280, 720), CONFIG),
        ((300, 40), SMALL),
        ((12, 36), SMALL),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"{value.global_size}",
)
def test_crops(size, config):
    image = noise(*size)
    views = make_views(image, config)
    resized = image.resize(views.plan.resized_size, Image.Resampling.BILINEAR)
    assert len(views.crops_NHWC) > 0
    for crop, box in zip(views.crops_NHWC, views.plan.boxes, strict=True):
        expected = torch_view(resized.crop(box), config.crop_size, config, torch.float64)
        np.testing.assert_allclose(crop, expected, rtol=0, atol=1e-6)
