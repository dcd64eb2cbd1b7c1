"""Composes scans of handwritten digits into images: dark ink on light paper.

The scans are scikit-learn's `load_digits`: 1,797 images of 8x8 pixels with ink 0..16, downsampled from 32x32 bitmaps of
digits written by 43 people (UCI "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak, 1998). The scans are
split before anything is composed, so held-out images contain no scan used in training.

Lengths are pixels; boxes are (left, top, right, bottom) with right and bottom exclusive.
"""

import dataclasses
import functools
import math
from typing import Any, cast

import numpy as np
from PIL import Image, ImageChops

from stepjax.config import Split

SCAN_SIDE = 8
SCAN_INK = 16  # darkest value in a scan
BOXES = (12, 15)  # smallest and largest side of a digit's square
MAX_STRETCH = 0.15  # in squares: how much wider than its squares a strip may be
MAX_SIZE = (110, 70)  # largest scattered image (width, height)

_PADDING = 2  # blank pixels around a scan; ink on its border then fades out when enlarged
# Fits a digit of side 1 scaled by 1.1 and rotated by 8 degrees, with ink 3/4 as wide as high.
_BOX_SCALE = 1.2
_FAINT = 63  # of 255: fainter ink is ignored for a digit's box
_PAPER_SHARE = np.linspace(1.0, 0.0, 256)[:, None]  # ink value -> share of paper in a pixel
_INK_SHARE = 1 - _PAPER_SHARE
_SPLIT_SEED = 20_171  # fixed: a run's seed must not move scans between splits
_HELD_OUT_FRACTION = 0.2

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Scans:
    """All scans, padded, with ink as 0..255; `by_class[split][digit]` lists scan ids."""

    images: tuple[Image.Image, ...]
    labels: tuple[int, ...]
    by_class: dict[Split, tuple[tuple[int, ...], ...]]


@functools.lru_cache(maxsize=1)
def load_scans() -> Scans:
    """Loads the scans and their stratified split, about 80 to 20 per class. Cached per process."""
    from sklearn.datasets import load_digits  # slow import (1 s), only needed by digits sources

    digits = cast(Any, load_digits())
    images = np.pad(np.asarray(digits["images"]), ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
    ink = np.round(images * (255 / SCAN_INK)).astype(np.uint8)
    labels = np.asarray(digits["target"])
    rng = np.random.default_rng(_SPLIT_SEED)
    train, held_out = [], []
    for digit in range(10):
        ids = rng.permutation(np.flatnonzero(labels == digit)).tolist()
        num_held_out = round(len(ids) * _HELD_OUT_FRACTION)
        held_out.append(tuple(sorted(ids[:num_held_out])))
        train.append(tuple(sorted(ids[num_held_out:])))
    return Scans(
        images=tuple(Image.fromarray(scan) for scan in ink),
        labels=tuple(labels.tolist()),
        by_class={"train": tuple(train), "held_out": tuple(held_out)},
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places for digits of equal side: each is centred in a square of `box` pixels, given by its top left corner."""

    width: int
    height: int
    side: float
    box: int
    corners: tuple[tuple[int, int], ...]


def strip_layout(rng: np.random.Generator, num_digits: int) -> Layout:
    """Places digits in a row, each near the centre of a square as high as the strip: from 12x12 (one) to 77x15 (five).

    The aspect ratio is slightly above the number of digits, as in evenly spaced handwriting.
    """
    box = int(rng.integers(BOXES[0], BOXES[1] + 1))
    width = math.ceil(num_digits * box * (1 + rng.uniform(0.0, MAX_STRETCH) / num_digits))
    slack = width - num_digits * box
    # Jitter uses up the stretch, plus a pixel or two of the neighbour's margin.
    shifts = [max(slack / 2 + jitter * box, 0.0) for jitter in rng.uniform(-0.08, 0.08, size=num_digits).tolist()]
    lefts = [min(round(i * box + shift), width - box) for i, shift in enumerate(shifts)]
    return Layout(width=width, height=box, side=box / _BOX_SCALE, box=box, corners=tuple((left, 0) for left in lefts))


def scatter_layout(rng: np.random.Generator, num_digits: int, capacity: int) -> Layout:
    """Scatters digits in random order, without overlap, over a canvas of random size and aspect ratio.

    The canvas is sized for `capacity` digits, so its size does not reveal their number.
    """
    assert num_digits <= capacity
    box = int(rng.integers(BOXES[0], BOXES[1] + 1))
    grids = _grids(box, capacity)
    columns, rows = grids[rng.integers(len(grids))]
    width = min(round(columns * box * rng.uniform(1.0, 1.5)), MAX_SIZE[0])
    height = min(round(rows * box * rng.uniform(1.0, 1.5)), MAX_SIZE[1])
    # One digit per slot, anywhere within it: no overlap, no retries.
    slot_width, slot_height = width / columns, height / rows
    slots = rng.permutation(columns * rows)[:num_digits].tolist()
    slack = rng.uniform(0.0, 1.0, size=(num_digits, 2)).tolist()
    corners = []
    for slot, (slack_x, slack_y) in zip(slots, slack, strict=True):
        row, column = divmod(slot, columns)
        left = math.ceil(column * slot_width) + int(slack_x * math.floor(slot_width - box))
        top = math.ceil(row * slot_height) + int(slack_y * math.floor(slot_height - box))
        corners.append((min(left, width - box), min(top, height - box)))
    return Layout(width=width, height=height, side=box / _BOX_SCALE, box=box, corners=tuple(corners))


@functools.cache
def _grids(box: int, capacity: int) -> list[tuple[int, int]]:
    """Columns and rows of the canvases that `capacity` digits fit."""
    return [
        (columns, rows)
        for columns in range(1, 7)
        for rows in range(1, 5)
        if capacity <= columns * rows <= 2 * capacity and columns * box <= MAX_SIZE[0] and rows * box <= MAX_SIZE[1]
    ]


@dataclasses.dataclass(frozen=True)
class Digit:
    """A digit in an image: its ink as 0..255, its place's top left corner, and by how much its place has changed."""

    ink: Image.Image
    corner: tuple[int, int]
    wear: float = 0.0  # mean change of its pixels, 0..255

    def square(self) -> tuple[slice, slice]:
        """Rows and columns of its place in the image."""
        left, top = self.corner
        return slice(top, top + self.ink.height), slice(left, left + self.ink.width)

    def box(self) -> Box:
        """The box of its ink in the image."""
        faint = Image.new("L", self.ink.size, _FAINT)
        box = ImageChops.subtract(self.ink, faint).getbbox()
        assert box is not None, "no ink"
        left, top = self.corner
        return left + box[0], top + box[1], left + box[2], top + box[3]


def compose(
    rng: np.random.Generator,
    scan_ids: list[int],
    layout: Layout,
    *,
    augment: bool,
    degradation: float = 0.0,
) -> tuple[Image.Image, list[Digit]]:
    """Draws the scans at the layout's places.

    Args:
        scan_ids: one scan per corner of the layout; corners beyond them stay empty.
        augment: scale each digit by up to 10 %, rotate it by up to 8 degrees, and vary the tint of the paper and the
            contrast.
        degradation: see `degraded`; 0..1.

    Returns:
        The RGB image, and the digits as drawn.
    """
    images = load_scans().images
    num_digits = len(scan_ids)
    if augment:
        scales = rng.uniform(0.9, 1.1, size=num_digits).tolist()
        angles = np.radians(rng.uniform(-8, 8, size=num_digits)).tolist()
        paper = rng.uniform(225, 245) + rng.uniform(-10, 10, size=3)
        ink = rng.uniform(10, 90) + rng.uniform(-10, 10, size=3)
    else:
        scales, angles = [1.0] * num_digits, [0.0] * num_digits
        paper, ink = np.array([250.0, 248.0, 243.0]), np.array([28.0, 28.0, 34.0])

    inks = Image.new("L", (layout.width, layout.height), 0)
    digits = []
    for scan_id, corner, scale, angle in zip(scan_ids, layout.corners, scales, angles, strict=False):
        digit = enlarged(images[scan_id], layout.side * scale, angle, layout.box)
        inks.paste(255, corner, mask=digit)
        digits.append(Digit(digit, corner))
    if degradation:
        clear_HW, inks = np.asarray(inks, np.float32), degraded(rng, inks, degradation, layout.box)
        change_HW = np.abs(np.asarray(inks) - clear_HW)
        digits = [dataclasses.replace(each, wear=float(change_HW[each.square()].mean())) for each in digits]

    # A palette maps ink to colour: only 256 colours to mix, for any image size.
    palette = _PAPER_SHARE * paper + _INK_SHARE * ink
    inks.putpalette(np.rint(palette).astype(np.uint8).tobytes())
    return inks.convert("RGB"), digits


def enlarged(scan: Image.Image, side: float, angle: float, box: int) -> Image.Image:
    """The scan's ink at `side` pixels, rotated by `angle` radians, centred in a square of `box` pixels."""
    step = SCAN_SIDE / side
    a, b = step * math.cos(angle), step * math.sin(angle)
    centre = scan.width / 2
    coefficients = (a, b, centre - (a + b) * box / 2, -b, a, centre - (a - b) * box / 2)
    return scan.transform((box, box), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def degraded(rng: np.random.Generator, ink: Image.Image, degradation: float, cell: int) -> Image.Image:
    """Ink (0..255) that has faded in patches, and specks on the paper.

    Cells of `cell` pixels differ in severity, uniform from 0 to twice `degradation`, so that of digits in a row some
    stay clear and some become ambiguous.
    """
    columns, rows = math.ceil(ink.width / cell), math.ceil(ink.height / cell)
    whole, severity = (columns * cell, rows * cell), rng.uniform(0, 2 * degradation, (rows, columns)).astype(np.float32)
    patches = Image.fromarray(rng.integers(256, size=(3 * rows, 3 * columns), dtype=np.uint8))
    fading_HW = np.asarray(patches.resize(whole, Image.Resampling.BICUBIC))[: ink.height, : ink.width] / np.float32(255)
    specks_HW = rng.random((ink.height, ink.width), np.float32) ** 2
    severity_HW = severity.repeat(cell, 0).repeat(cell, 1)[: ink.height, : ink.width]
    worn_HW = np.asarray(ink) * np.maximum(1 - severity_HW * fading_HW, 0) + 255 * severity_HW * specks_HW
    return Image.fromarray(np.rint(np.minimum(worn_HW, 255)).astype(np.uint8))
