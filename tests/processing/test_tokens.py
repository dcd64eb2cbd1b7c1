"""The layout of images among tokens, and of their features in the feature table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepjax.config import ImageConfig
from stepjax.processing.images import ImageViews, plan_views
from stepjax.processing.tokenizer import load_tokenizer
from stepjax.processing.tokens import TextSpan, assemble, image_tokens

PUBLIC = ImageConfig()
SMALL = ImageConfig(global_size=112, crop_size=56, patch_size=14)  # 4 features a global view, 1 a crop
specials = load_tokenizer("demo").special_tokens


def fake_views(width: int, height: int, config: ImageConfig, mark: float = 0.0) -> ImageViews:
    """Views without pixels: crop i is filled with mark + i, the global view with -mark."""
    plan = plan_views(width, height, config)
    crops = np.zeros((plan.num_crops, config.crop_size, config.crop_size, 3), np.float32)
    crops += mark + np.arange(plan.num_crops, dtype=np.float32)[:, None, None, None]
    return ImageViews(np.full((config.global_size, config.global_size, 3), -mark, np.float32), crops, plan)


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "num_tokens"),
    [
        (640, 480, 0, 171),
        (600, 300, 2, 337),
        (400, 728, 2, 338),
        (1000, 400, 2, 337),
        (1024, 768, 4, 504),
        (1109, 1109, 9, 920),
        (1280, 720, 6, 670),
        (1920, 1080, 8, 836),
        (1080, 1920, 8, 838),
        (4000, 3000, 30, 2665),
        (3024, 3024, 36, 3164),
        (3024, 100, 31, 2744),
        (20, 60, 3, 422),
    ],
)
def test_token_counts_of_the_public_checkpoint(width, height, num_crops, num_tokens):
    """The published test vectors; 670 at 1280 x 720 was also observed on the real model."""
    plan = plan_views(width, height, PUBLIC)
    ids = image_tokens(plan, PUBLIC, specials)
    assert len(ids) == num_tokens == plan.num_tokens(PUBLIC)
    assert ids.count(specials.patch_start) == ids.count(specials.patch_end) == num_crops
    assert ids.count(specials.image_patch) == 81 * num_crops + 169
    assert ids.count(specials.patch_newline) == sum(plan.newline_after)
    assert ids.count(specials.image_start) == ids.count(specials.image_end) == 1


def test_layout_token_by_token():
    """Two rows of two crops: a newline after the first row only, and the global view last."""
    plan = plan_views(113, 113, SMALL)
    assert (plan.columns, plan.rows) == (2, 2)
    names = {
        specials.patch_start: "[",
        specials.image_patch: "x",
        specials.patch_end: "]",
        specials.patch_newline: "/",
        specials.image_start: "{",
        specials.image_end: "}",
    }
    assert "".join(names[index] for index in image_tokens(plan, SMALL, specials)) == "[x][x]/[x][x]{xxxx}"


def test_feature_index_counts_all_crops_before_all_global_views():
    """Two crops, none, four crops: crop features 0..5, then three global views of 4 features each."""
    images = [fake_views(200, 40, SMALL, 10), fake_views(100, 100, SMALL, 20), fake_views(113, 113, SMALL, 30)]
    images[0] = fake_views(100, 50, SMALL, 10)
    assert [image.plan.num_crops for image in images] == [2, 0, 4]
    spans = [TextSpan([7], 1.0), images[0], TextSpan([8, 9], 1.0), images[1], images[2], TextSpan([5], 0.0)]
    example = assemble("e", spans, SMALL, specials)

    features = example.feature_index[example.feature_index >= 0]
    assert features.tolist() == [
        *(0, 1, 6, 7, 8, 9),  # crops of image 0, its global view
        *(10, 11, 12, 13),  # global view of image 1
        *(2, 3, 4, 5, 14, 15, 16, 17),  # crops of image 2, its global view
    ]
    assert np.array_equal(example.feature_index >= 0, example.tokens == specials.image_patch)
    assert example.crops[:, 0, 0, 0].tolist() == [10, 11, 30, 31, 32, 33]
    assert example.global_views[:, 0, 0, 0].tolist() == [-10, -20, -30]


def test_loss_weights_cover_text_alone_and_never_the_first_token():
    image = fake_views(100, 50, SMALL)
    spans = [TextSpan([7, 8], 1.0), image, TextSpan([9], 0.5), TextSpan([10], 0.0), TextSpan([11], 1.0)]
    example = assemble("e", spans, SMALL, specials)
    num_image = image.plan.num_tokens(SMALL)
    assert example.loss_weights.tolist() == [0, 1, *[0] * num_image, 0.5, 0, 1]
    assert example.tokens.tolist() == [7, 8, *image_tokens(image.plan, SMALL, specials), 9, 10, 11]


@pytest.mark.parametrize("spans", [[], [TextSpan([], 1.0)], [TextSpan([3, 4], 1.0)]])
def test_examples_without_images_have_empty_views(spans):
    example = assemble("text", spans, SMALL, specials)
    assert example.global_views.shape == (0, 112, 112, 3)
    assert example.crops.shape == (0, 56, 56, 3)
    assert (example.feature_index == -1).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.tuples(st.integers(20, 300), st.integers(20, 300))), max_size=6))
def test_every_feature_is_used_exactly_once(items):
    """Integers are text of that length, pairs are images of that size."""
    spans = [
        TextSpan([1] * item, 1.0) if isinstance(item, int) else fake_views(item[0], item[1], SMALL) for item in items
    ]
    example = assemble("e", spans, SMALL, specials)
    num_features = len(example.crops) * SMALL.crop_tokens + len(example.global_views) * SMALL.global_tokens
    assert sorted(example.feature_index[example.feature_index >= 0].tolist()) == list(range(num_features))
    assert len(example.tokens) == len(example.loss_weights) == len(example.feature_index)
    assert example.tokens.dtype == example.feature_index.dtype == np.int32
    assert example.loss_weights.dtype == example.global_views.dtype == example.crops.dtype == np.float32
    assert not example.loss_weights[example.feature_index >= 0].any()
