"""Geometry against the published vectors, pixels against a straight-line float64 reading of the algorithm."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stepjax.config import ImageConfig
from stepjax.errors import ImageError
from stepjax.processing import image_files
from stepjax.processing.images import make_views, plan_views

INCLUSIVE = ImageConfig(max_crops=None)
EXCLUSIVE = ImageConfig(max_crops=None, small_is_inclusive=False)
SMALL = ImageConfig(global_size=112, crop_size=56, max_side=336, thin_side=8)

# width, height, window, resized size, grid, tokens
NO_CROPS = [(w, h, 0, (w, h), (0, 0), 171) for w, h in [(224, 224), (640, 480), (504, 504), (605, 605)]]
VECTORS = NO_CROPS + [
    (600, 300, 300, (600, 300), (2, 1), 337),
    (729, 729, 504, (1008, 1008), (2, 2), 504),
    (1008, 1008, 504, (1008, 1008), (2, 2), 504),
    (1108, 1108, 504, (1008, 1008), (2, 2), 504),
    (1024, 768, 504, (1008, 1008), (2, 2), 504),
    (800, 600, 504, (1008, 504), (2, 1), 337),
    (1000, 400, 504, (1008, 400), (2, 1), 337),
    (1109, 1109, 504, (1512, 1512), (3, 3), 920),
    (1280, 720, 504, (1512, 1008), (3, 2), 670),
    (1920, 1080, 504, (2016, 1008), (4, 2), 836),
    (1080, 1920, 504, (1008, 2016), (2, 4), 838),
    (4000, 3000, 504, (3024, 2520), (6, 5), 2665),
    (3024, 3024, 504, (3024, 3024), (6, 6), 3164),
    (3024, 100, 100, (3100, 100), (31, 1), 2744),
    (3024, 32, 32, (3040, 32), (95, 1), 8056),
    (20, 60, 20, (20, 60), (1, 3), 422),
    (20, 200, 0, (200, 200), (0, 0), 171),
    (5000, 10, 504, (3024, 3024), (6, 6), 3164),
    (10000, 33, 9, (3024, 9), (336, 1), 28059),
]
INCLUSIVE_VECTORS = [
    (728, 728, 0, (728, 728), (0, 0), 171),
    (728, 400, 400, (800, 400), (2, 1), 337),
    (400, 728, 400, (400, 800), (1, 2), 338),
]
EXCLUSIVE_VECTORS = [
    (728, 728, 504, (1008, 1008), (2, 2), 504),
    (728, 400, 504, (1008, 400), (2, 1), 337),
]


def check_vector(vector, config):
    width, height, window, resized, grid, tokens = vector
    plan = plan_views(width, height, config)
    assert plan.image_size == (width, height)
    assert (plan.window, plan.resized_size, (plan.columns, plan.rows)) == (window, resized, grid)
    assert plan.num_crops == grid[0] * grid[1] == len(plan.boxes) == len(plan.newline_after)
    assert plan.num_tokens(config) == tokens


@pytest.mark.parametrize("config", [INCLUSIVE, EXCLUSIVE], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector[0]}x{vector[1]}")
def test_vectors_on_which_both_boundary_rules_agree(vector, config):
    check_vector(vector, config)


@pytest.mark.parametrize("vector", INCLUSIVE_VECTORS, ids=lambda vector: f"{vector[0]}x{vector[1]}")
def test_vectors_where_a_long_side_of_728_is_small(vector):
    check_vector(vector, INCLUSIVE)


@pytest.mark.parametrize("vector", EXCLUSIVE_VECTORS, ids=lambda vector: f"{vector[0]}x{vector[1]}")
def test_vectors_where_a_long_side_of_728_is_large(vector):
    check_vector(vector, EXCLUSIVE)


@pytest.mark.parametrize(
    "size, window, num_crops",
    [((600, 400), 0, 0), ((601, 400), 400, 2), ((400, 601), 400, 2), ((1600, 400), 504, 3), ((1601, 400), 400, 4)],
)
def test_aspect_ratios_of_exactly_1_5_and_4_stay_below_their_thresholds(size, window, num_crops):
    plan = plan_views(*size, config=INCLUSIVE)
    assert (plan.window, plan.num_crops) == (window, num_crops)


@pytest.mark.parametrize(
    "size, padded, capped",
    [
        ((20, 200), (200, 200), (200, 200)),
        ((5000, 10), (5000, 5000), (3024, 3024)),
        ((20, 60), (20, 60), (20, 60)),
        ((32, 4000), (32, 4000), (24, 3024)),  # 32 is not thin
        ((31, 124), (31, 124), (31, 124)),  # 4 : 1 is not elongated
        ((4000, 3001), (4000, 3001), (3024, 2268)),  # 2268.756, truncated
        ((10000, 33), (10000, 33), (3024, 9)),
    ],
)
def test_padding_and_capping(size, padded, capped):
    plan = plan_views(*size, config=INCLUSIVE)
    assert (plan.padded_size, plan.capped_size) == (padded, capped)


def test_cap_truncates_the_float_product_even_on_the_long_side():
    """3024 / L * L may fall just short of 3024 in float64; the public processor then makes it 3023."""
    short = [side for side in range(3025, 5000) if int(side * (3024 / side)) == 3023]
    assert short
    assert plan_views(short[0], short[0], INCLUSIVE).capped_size == (3023, 3023)


def test_remainder_is_compared_in_float64():
    """1 / 5 of a window left over is no more than 0.2, but 11 / 5 - 2 is, by a last bit."""
    config = dataclasses.replace(INCLUSIVE, thin_side=0)
    assert plan_views(11, 5, config).resized_size == (15, 5)
    assert plan_views(5, 41, config).resized_size == (5, 40)  # 41 / 5 - 8 = 0.1999...
    assert 11 / 5 - 2 > 0.2 > 41 / 5 - 8


@pytest.mark.parametrize(
    "size, rows, columns", [((1280, 720), 2, 3), ((1080, 1920), 4, 2), ((400, 728), 2, 1), ((600, 300), 1, 2)]
)
def test_newline_follows_the_last_crop_of_every_row_but_the_last(size, rows, columns):
    row, last = [False] * (columns - 1) + [True], [False] * columns
    assert plan_views(*size, config=INCLUSIVE).newline_after == tuple(row * (rows - 1) + last)


def test_boxes_are_row_major():
    assert plan_views(1280, 720, INCLUSIVE).boxes == (
        (0, 0, 504, 504),
        (504, 0, 1008, 504),
        (1008, 0, 1512, 504),
        (0, 504, 504, 1008),
        (504, 504, 1008, 1008),
        (1008, 504, 1512, 1008),
    )


def literal_plan(width, height, inclusive):
    """Section 2.2 of our notes, step by step with bare numbers: (resized or None, window, boxes, columns, flags)."""
    if min(width, height) < 32 and (width / height > 4 or width / height < 1 / 4):
        width = height = max(width, height)
    if max(width, height) > 3024:
        scale = 3024 / max(width, height)
        width, height = int(width * scale), int(height * scale)
    capped = (width, height)
    longest, shortest = max(capped), min(capped)
    if longest < 728 or (inclusive and longest == 728):
        window = shortest if longest / shortest > 1.5 else 0
    else:
        window = min(shortest, 504) if longest / shortest > 4 else 504
    if window == 0:
        return capped, capped, 0, [], []
    sides, starts = [], []
    for side in capped:
        ratio = side / window
        if ratio >= 1:
            side = window * (int(ratio) + 1 if ratio - side // window > 0.2 else int(ratio))
        count = 1 if side <= window else math.ceil((side - window) / window + 1)
        positions = [window * i for i in range(count)]
        if count > 1 and positions[-1] + window > side:
            positions[-1] = side - window
        sides.append(side)
        starts.append(positions)
    boxes = [(x, y, x + window, y + window) for y in starts[1] for x in starts[0]]
    flags = [x == starts[0][-1] and y != starts[1][-1] for y in starts[1] for x in starts[0]]
    return capped, tuple(sides), window, boxes, flags


sides = st.one_of(st.integers(1, 100), st.integers(400, 1200), st.integers(1, 9000))


@given(width=sides, height=sides, inclusive=st.booleans())
def test_plan_follows_the_literal_steps_at_any_size(width, height, inclusive):
    config = INCLUSIVE if inclusive else EXCLUSIVE
    plan = plan_views(width, height, config)
    capped, resized, window, boxes, flags = literal_plan(width, height, inclusive)
    assert (plan.capped_size, plan.resized_size, plan.window) == (capped, resized, window)
    assert list(plan.boxes) == boxes and list(plan.newline_after) == flags
    assert len(plan.boxes) == plan.num_crops and sum(plan.newline_after) == plan.num_newlines
    assert plan.num_tokens(config) == 83 * len(boxes) + sum(flags) + 171


@given(width=sides, height=sides)
def test_boxes_tile_the_resized_image(width, height):
    plan = plan_views(width, height, INCLUSIVE)
    covered_width, covered_height = plan.columns * plan.window, plan.rows * plan.window
    for x0, y0, x1, y1 in plan.boxes:
        assert x1 - x0 == y1 - y0 == plan.window
        assert 0 <= x0 < plan.resized_size[0] and 0 <= y0 < plan.resized_size[1]
        assert x1 <= covered_width and y1 <= covered_height
    assert len(set(plan.boxes)) == plan.num_crops
    if plan.window:
        assert covered_width >= plan.resized_size[0] and covered_height >= plan.resized_size[1]


def test_refuses_more_crops_than_the_guard_allows():
    with pytest.raises(ImageError, match=r"10000x33 pixels.* 336 crops.*max_crops=128"):
        plan_views(10000, 33, ImageConfig())
    assert plan_views(3024, 32, ImageConfig(max_crops=95)).num_crops == 95
    with pytest.raises(ImageError, match="max_crops=94"):
        plan_views(3024, 32, ImageConfig(max_crops=94))


def test_refuses_images_that_would_vanish_when_shrunk():
    with pytest.raises(ImageError, match="100000x32 .*max_side=3024.* no pixels left"):
        plan_views(100_000, 32, INCLUSIVE)


def test_refuses_thin_images_whose_padding_would_exhaust_memory():
    with pytest.raises(ImageError, match=f"20000x10 .*20000x20000.*{image_files.MAX_PIXELS}"):
        plan_views(20_000, 10, INCLUSIVE)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-3, 5)])
def test_refuses_empty_images(size):
    with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} pixels: it is empty"):
        plan_views(*size, config=INCLUSIVE)


# Pixels --------------------------------------------------------------------------------------------------------------


def noise(width, height, seed=0):
    """Independent random pixels: the hardest content for a resize."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(pixels_HWC, config):
    return (pixels_HWC.astype(np.float32) / 255 - np.asarray(config.mean, np.float32)) / np.asarray(
        config.std, np.float32
    )


def black(config):
    return (np.float32(0) - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)


def triangle_weights(size, target):
    """[target, size] weights of an antialiased bilinear resize: triangles as wide as the scale, cut at the edges."""
    scale = size / target
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


def literal_view(image, side, config):
    """float64 throughout: to [0, 1], normalise, then resize."""
    pixels = (np.asarray(image) / 255 - np.array(config.mean)) / np.array(config.std)
    down, across = triangle_weights(image.height, side), triangle_weights(image.width, side)
    return np.einsum("sh,hwc,tw->stc", down, pixels, across, optimize=True)


def literal_views(image, plan, config):
    canvas = Image.new("RGB", plan.padded_size, 0)
    canvas.paste(image, (0, 0))
    capped = canvas.resize(plan.capped_size, Image.Resampling.BILINEAR)
    resized = capped.resize(plan.resized_size, Image.Resampling.BILINEAR)
    crops = [literal_view(resized.crop(box), config.crop_size, config) for box in plan.boxes]
    return literal_view(capped, config.global_size, config), crops


@pytest.mark.parametrize(
    "size, config",
    [
        ((640, 480), INCLUSIVE),  # enlarged, no crops
        ((300, 600), INCLUSIVE),  # crops from a window of 300
        ((1000, 400), INCLUSIVE),  # crops beyond the image
        ((1280, 720), INCLUSIVE),
        ((90, 400), SMALL),  # capped, window of 56
        ((7, 90), SMALL),  # padded
        ((5, 400), SMALL),  # padded, then capped
        ((300, 40), SMALL),  # window of 40
        ((333, 97), SMALL),
        ((12, 36), SMALL),  # window of 12
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"{value.global_size}",
)
def test_pixels_follow_the_literal_steps(size, config):
    image = noise(*size)
    views = make_views(image, config)
    global_view, crops = literal_views(image, views.plan, config)
    assert views.global_view_HWC.dtype == views.crops_NHWC.dtype == np.float32
    assert views.global_view_HWC.shape == (config.global_size, config.global_size, 3)
    assert views.crops_NHWC.shape == (len(crops), config.crop_size, config.crop_size, 3)
    np.testing.assert_allclose(views.global_view_HWC, global_view, rtol=0, atol=2e-6)
    for crop, expected in zip(views.crops_NHWC, crops, strict=True):
        np.testing.assert_allclose(crop, expected, rtol=0, atol=2e-6)


def test_views_of_the_right_size_are_not_resampled():
    image = noise(728, 728)
    np.testing.assert_array_equal(
        make_views(image, INCLUSIVE).global_view_HWC, normalised(np.asarray(image), INCLUSIVE)
    )
    image = noise(1008, 1008)
    crops_NHWC = make_views(image, INCLUSIVE).crops_NHWC
    np.testing.assert_array_equal(crops_NHWC[1], normalised(np.asarray(image)[:504, 504:], INCLUSIVE))


def test_crops_beyond_the_image_are_filled_with_normalised_black():
    """1000x400: two crops of 504 from 1008x400, so 104 rows below the picture."""
    views = make_views(Image.new("RGB", (1000, 400), "white"), INCLUSIVE)
    assert views.crops_NHWC.shape == (2, 504, 504, 3)
    np.testing.assert_array_equal(views.crops_NHWC[:, 400:], np.broadcast_to(black(INCLUSIVE), (2, 104, 504, 3)))
    white = (1 - np.asarray(INCLUSIVE.mean, np.float32)) / np.asarray(INCLUSIVE.std, np.float32)
    np.testing.assert_array_equal(views.crops_NHWC[:, :400], np.broadcast_to(white, (2, 400, 504, 3)))


def test_crops_come_row_by_row():
    colours = [(10, 0, 0), (0, 20, 0), (0, 0, 30), (40, 40, 0), (0, 50, 50), (60, 0, 60)]
    image = Image.new("RGB", (168, 112))  # 3 x 2 windows of 56, so neither resize changes a pixel
    for index, colour in enumerate(colours):
        image.paste(colour, (index % 3 * 56, index // 3 * 56, index % 3 * 56 + 56, index // 3 * 56 + 56))
    views = make_views(image, SMALL)
    assert len(views.crops_NHWC) == 6
    for crop, colour in zip(views.crops_NHWC, colours, strict=True):
        np.testing.assert_array_equal(crop, np.broadcast_to(normalised(np.array(colour), SMALL), crop.shape))


def test_thin_images_lie_at_the_top_left_of_a_black_square():
    """7x112 becomes 112x112, the global size itself: nothing is resampled."""
    image = noise(7, 112)
    view = make_views(image, SMALL).global_view_HWC
    np.testing.assert_array_equal(view[:, :7], normalised(np.asarray(image), SMALL))
    np.testing.assert_array_equal(view[:, 7:], np.broadcast_to(black(SMALL), (112, 105, 3)))


def test_the_callers_image_is_left_alone():
    for size in [(112, 112), (7, 90), (333, 97)]:
        image = noise(*size)
        before = image.tobytes()
        make_views(image, SMALL)
        assert image.size == size and image.tobytes() == before


def test_refuses_images_that_are_not_rgb():
    with pytest.raises(ImageError, match="mode 'L'.*open_image"):
        make_views(Image.new("L", (50, 50)), INCLUSIVE)
