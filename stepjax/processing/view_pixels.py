"""Writes the pixels of views: windows of an 8-bit image, resized in float and normalised, straight to where they go.

The arithmetic is that of Pillow's resize of float images, to the last bit, and of the reference's normalisation: divide
by 255, subtract the mean, divide by the standard deviation, in float32. The reference normalises before it resizes. The
two commute: bilinear weights sum to 1 and normalising is affine per channel. A view is usually smaller than its image,
so it is cheaper to normalise the view.

Legend: N windows, H W their height and width, S side of a view, K taps of the filter; the last axis is 3 colours.
"""

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

from stepjax.config import ImageConfig

_SMALL = 2**14  # pixels of a window and its view together; below it, calls to PIL take longer than their work
_BLOCK = 2**14  # values normalised at a time where they are copied afterwards


def write_views(
    views_NSSC: np.ndarray, image: Image.Image, window: tuple[int, int], columns: int, config: ImageConfig
) -> None:
    """Cuts N windows from an RGB image, row by row, and writes a view of each.

    Args:
        views_NSSC: contiguous, float32 or a 16-bit float.
        window: width and height. What a window has beyond the image is black.
        columns: windows side by side.
    """
    side = views_NSSC.shape[1]
    width, height = window
    if window == (side, side):
        for view_SSC, window_HWC in zip(views_NSSC, _windows(image, window, columns, len(views_NSSC)), strict=True):
            _write(view_SSC.reshape(side, -1), window_HWC.reshape(side, -1), *_rows(config.mean, config.std, side))
    elif width * height + side * side < _SMALL:
        pixels_NSSC = resize_small(np.array(_windows(image, window, columns, len(views_NSSC))), side)
        rows = len(views_NSSC) * side, 3 * side
        _write(views_NSSC.reshape(rows), pixels_NSSC.reshape(rows), *_rows(config.mean, config.std, side))
    else:
        for index, view_SSC in enumerate(views_NSSC):
            left, top = width * (index % columns), height * (index // columns)
            part = image if window == image.size else image.crop((left, top, left + width, top + height))
            # Casting values that are not neighbours takes several times as long.
            float_SSC = view_SSC if view_SSC.dtype == np.float32 else np.empty(view_SSC.shape, np.float32)
            for colour, channel in enumerate(part.split()):
                channel = channel.convert("F").resize((side, side), Image.Resampling.BILINEAR)
                mean, std = np.float32(config.mean[colour]), np.float32(config.std[colour])
                _write(float_SSC[:, :, colour], np.asarray(channel), mean, std)
            if float_SSC is not view_SSC:
                view_SSC[:] = float_SSC


def _windows(image: Image.Image, window: tuple[int, int], columns: int, count: int) -> list[np.ndarray]:
    """8-bit pixels [H, W, 3] of each window."""
    width, height = window
    rows = count // columns
    if image.size != (columns * width, rows * height):
        image = image.crop((0, 0, columns * width, rows * height))
    parts = np.asarray(image).reshape(rows, height, columns, width, 3)
    return [parts[y, :, x] for y in range(rows) for x in range(columns)]


def _write(view_SX: np.ndarray, pixels_SX: np.ndarray, mean: npt.ArrayLike, std: npt.ArrayLike) -> None:
    """Normalises rows of values; `mean` and `std` are of one value, or of a row of them."""
    in_place = view_SX.dtype == np.float32 and view_SX.flags.c_contiguous
    step = len(view_SX) if in_place else max(1, _BLOCK // view_SX.shape[1])
    scratch_SX = view_SX if in_place else np.empty((step, view_SX.shape[1]), np.float32)
    for top in range(0, len(view_SX), step):
        pixels = pixels_SX[top : top + step]
        values = np.divide(pixels, np.float32(255), out=scratch_SX[: len(pixels)])
        values -= mean
        values /= std
        if not in_place:
            view_SX[top : top + step] = values


@functools.lru_cache(maxsize=8)
def _rows(mean: tuple[float, ...], std: tuple[float, ...], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each value in a row of `width` pixels, channels innermost: NumPy is several times
    slower when broadcasting over an axis of 3."""
    return np.tile(np.asarray(mean, np.float32), width), np.tile(np.asarray(std, np.float32), width)


def resize_small(windows_NHWC: np.ndarray, side: int) -> np.ndarray:
    """float32 [N, S, S, 3]: all windows and colours at once. Equal to PIL's resize of each channel in mode F."""
    count, height, width, _ = windows_NHWC.shape
    values = windows_NHWC
    # PIL starts with the rows where there are many more of them to lose.
    rows_first = height > side and height - side > 2 * (width - side)
    for axis in "HW" if rows_first else "WH":
        if axis == "W" and width != side:
            at_KX, weights_KX = _taps(width, side, 3)
            values = _filtered(values.reshape(-1, 3 * width), at_KX, weights_KX).reshape(count, -1, side, 3)
        if axis == "H" and height != side:
            at_KX, weights_KX = _taps(height, side, 1)
            values = _filtered(values.reshape(count, height, -1), at_KX, weights_KX[:, :, None])
            values = values.reshape(count, side, -1, 3)
    return values


def _filtered(values: np.ndarray, at_KX: np.ndarray, weights_KX: np.ndarray) -> np.ndarray:
    """Weighted sums along axis 1, in float64, rounded to float32."""
    values = values.astype(np.float64)
    total = values.take(at_KX[0], axis=1, mode="clip")
    total *= weights_KX[0]
    for at_X, weights_X in zip(at_KX[1:], weights_KX[1:], strict=True):
        part = values.take(at_X, axis=1, mode="clip")
        part *= weights_X
        total += part
    return total.astype(np.float32)


@functools.lru_cache(maxsize=512)
def _taps(size: int, side: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights, each [K, S * channels], that resize `size` pixels of interleaved channels to `side`.

    Triangles as wide as the scale, cut at the edges, and computed as PIL does.
    """
    scale = size / side
    support = max(scale, 1.0)
    centre_S = (np.arange(side) + 0.5) * scale
    first_S = np.maximum((centre_S - support + 0.5).astype(int), 0)
    end_S = np.minimum((centre_S + support + 0.5).astype(int), size)
    at_KS = first_S + np.arange(np.max(end_S - first_S))[:, None]
    weights_KS = np.maximum(1 - np.abs((at_KS - centre_S + 0.5) * (1 / support)), 0)
    weights_KS[at_KS >= end_S] = 0
    total_S = np.zeros(side)
    for weights_S in weights_KS:  # one by one: np.sum adds in another order
        total_S += weights_S
    at_KX = np.minimum(at_KS, size - 1)[:, :, None] * channels + np.arange(channels)
    return at_KX.reshape(len(at_KS), -1), np.repeat(weights_KS / total_S, channels, axis=1)
