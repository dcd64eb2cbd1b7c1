"""Draws pages: printed text, labelled fields in pencil and stamped marks on stained, grainy paper in uneven light.

A page is a form of square cells. A cell holds a printed label, a handwritten digit, two lines of printed text or a
mark; a field is a label and the digits in the cells after it. The text is dark and answers nothing; what answers is in
paler ink, on paper whose stains are as fine as its strokes. An image codec cannot tell them apart and has to spend
bytes on both.

Lengths are pixels; boxes are (left, top, right, bottom) with right and bottom exclusive. HW: pixels down and across.
"""

import dataclasses
import functools
import math
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from stepjax.data.digits_render import Box, enlarged, load_scans

SIDE, CELL = 320, 40  # of a page and of a cell
CELLS = SIDE // CELL  # along a side
DIGIT = 33  # side of a digit
SHAPES = ("circle", "square", "triangle", "cross")
MARK = 26  # side

_PAPER = np.array([226.0, 217.0, 200.0])
_PRINT = np.array([52.0, 48.0, 50.0])
_PENCIL = np.array([92.0, 104.0, 150.0])
_STAMP = np.array([186.0, 92.0, 96.0])
_BROWN = np.array([0.8, 1.0, 1.3])  # how strongly the texture shows in each colour
_TEXTURE = ((2, 7.0), (5, 6.0), (11, 6.0), (64, 16.0))  # distance of the knots, amplitude
_GRAIN = 22.0  # of a pixel's colours, from -1 to 1 times this
_LETTERS = np.array(list(string.ascii_lowercase))


Cell = tuple[int, int]  # column, row


@dataclasses.dataclass(frozen=True)
class Field:
    """A printed label and the digits written after it. The cell is the label's: column and row."""

    label: str
    scan_ids: tuple[int, ...]
    cell: Cell


@dataclasses.dataclass(frozen=True)
class Mark:
    """A shape and the cell it is stamped in."""

    shape: str
    cell: Cell


@dataclasses.dataclass(frozen=True)
class Page:
    fields: tuple[Field, ...]
    marks: tuple[Mark, ...]
    texts: tuple[Cell, ...]  # cells of printed text


def draw_page(rng: np.random.Generator, page: Page, *, wear: float) -> tuple[Image.Image, list[Box]]:
    """Draws a page, slightly turned and blurred.

    Args:
        wear: strength of grain, stains and uneven light, 0..1; 0: plain paper.

    Returns:
        The RGB image, 320 x 320 pixels, and the box of every mark.
    """
    printed, pencil, stamp = (Image.new("L", (SIDE, SIDE)) for _ in range(3))
    write, press = ImageDraw.Draw(printed), ImageDraw.Draw(stamp)
    for column, row in page.texts:
        for line in range(2):
            place = CELL * column + int(rng.integers(4)), CELL * row + 3 + 18 * line
            write.text(place, "".join(_LETTERS[rng.integers(26, size=5)]), 220, _font(14))
    for field in page.fields:
        column, row = field.cell
        write.text(
            (CELL * column + 1, CELL * (row + 0.5) + int(rng.integers(-3, 4))), field.label, 255, _font(17), "lm"
        )
        for place, scan in enumerate(field.scan_ids, start=column + 1):
            side, angle = DIGIT * rng.uniform(0.9, 1.1), math.radians(rng.uniform(-8, 8))
            ink = enlarged(load_scans().images[scan], side, angle, CELL)
            across, down = rng.integers(-3, 4, size=2).tolist()
            pencil.paste(255, (CELL * place + across, CELL * row + down), mask=ink)
    centres = []
    for mark in page.marks:
        jitter = (CELL - MARK) // 2 - 1
        x, y = ((place + 0.5) * CELL + rng.integers(-jitter, jitter + 1) for place in mark.cell)
        _stamp(press, mark.shape, x, y)
        centres.append((x, y))

    turn = math.radians(rng.uniform(-1.2, 1.2))
    blur = rng.uniform(0.0, 0.7)
    shares = [_scanned(layer, turn, blur) for layer in (printed, pencil, stamp)]
    paper_HWC = _paper(rng, wear)
    for share_HW, ink, strength in zip(shares, (_PRINT, _PENCIL, _STAMP), (0.9, 0.85, 0.65), strict=True):
        paper_HWC += (strength * share_HW)[:, :, None] * (ink.astype(np.float32) - paper_HWC)
    grain_HWC = rng.integers(-128, 128, paper_HWC.shape, dtype=np.int8) * np.float32(wear * _GRAIN / 128)
    image = Image.fromarray(np.clip(np.rint(paper_HWC + grain_HWC), 0, 255).astype(np.uint8))
    return image, [_turned_box(x, y, turn) for x, y in centres]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _stamp(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float) -> None:
    half = MARK / 2
    box = (x - half, y - half, x + half, y + half)
    match shape:
        case "circle":
            draw.ellipse(box, outline=255, width=4)
        case "square":
            draw.rectangle(box, outline=255, width=4)
        case "triangle":
            draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], outline=255, width=4)
        case _:
            draw.line((*box[:2], *box[2:]), 255, 5)
            draw.line((box[0], box[3], box[2], box[1]), 255, 5)


def _scanned(layer: Image.Image, turn: float, blur: float) -> np.ndarray:
    """The layer's share of ink [H, W], 0..1, turned by `turn` radians about the page's centre and blurred."""
    c, s, centre = math.cos(turn), math.sin(turn), layer.width / 2
    coefficients = (c, s, centre - (c + s) * centre, -s, c, centre - (c - s) * centre)  # from scan to page
    turned = layer.transform(layer.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(turned.filter(ImageFilter.GaussianBlur(blur)), np.float32) / 255


def _turned_box(x: float, y: float, turn: float) -> Box:
    """The box, in the scan, of a mark at (x, y) of the page."""
    c, s, centre, half = math.cos(turn), math.sin(turn), SIDE / 2, MARK / 2
    dx, dy = x - centre, y - centre
    x, y = centre + c * dx - s * dy, centre + s * dx + c * dy
    left, top, right, bottom = (min(max(round(edge), 0), SIDE) for edge in (x - half, y - half, x + half, y + half))
    return left, top, right, bottom


def _paper(rng: np.random.Generator, wear: float) -> np.ndarray:
    """Paper [H, W, 3] of random tint with fibres, stains and uneven light."""
    relief_HW = np.zeros((SIDE, SIDE), np.float32)
    for distance, amplitude in _TEXTURE:
        relief_HW += np.float32(wear * amplitude / 64) * (_smooth(rng, distance) - 128)
    paper = _PAPER + rng.uniform(-8, 8, size=3)
    return paper.astype(np.float32) + relief_HW[:, :, None] * _BROWN.astype(np.float32)


def _smooth(rng: np.random.Generator, distance: int) -> np.ndarray:
    """Random values 0..255 [H, W] that vary over `distance` pixels."""
    count = SIDE // distance + 2
    knots = Image.fromarray(rng.integers(256, size=(count, count), dtype=np.uint8))
    return np.asarray(knots.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
