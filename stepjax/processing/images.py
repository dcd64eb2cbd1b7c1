"""The views of an image: one global view and, for larger images, crops at native resolution.

`plan_views` computes the geometry; `make_views` cuts the pixels, and `uncut` postpones that until there is an array to
cut them into. All follow the public checkpoint's processor, including its order of rounding steps, so that features
match: 8-bit resizing for the size cap and the grid of crops, then float resizing to the encoder's input sizes.

H, W: pixels down and across. C: the 3 colours. N: crops. Sizes are (width, height), as in PIL.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from stepjax.config import ImageConfig
from stepjax.errors import ImageError
from stepjax.processing import image_files
from stepjax.processing.view_pixels import write_views

Size = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """How to cut an image of a given size. Lengths are pixels; `window` and the grid are 0 if there are no crops.

    image_size --pad if thin--> padded_size --shrink if large--> capped_size --> the global view
                                                                      |
                                                                      +--> resized_size --> columns x rows crops
    """

    image_size: Size
    padded_size: Size
    capped_size: Size
    resized_size: Size  # the crops are cut from this; capped_size if there are none
    window: int  # side of a crop before it is resized to crop_size
    columns: int
    rows: int

    @property
    def num_crops(self) -> int:
        return self.columns * self.rows

    @property
    def num_newlines(self) -> int:
        return max(self.rows - 1, 0)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """(x0, y0, x1, y1) of each crop in the resized image, row by row.

        A box may extend beyond an image smaller than the window; that part is black.
        """
        starts = [(self.window * x, self.window * y) for y in range(self.rows) for x in range(self.columns)]
        return tuple((x, y, x + self.window, y + self.window) for x, y in starts)

    @property
    def newline_after(self) -> tuple[bool, ...]:
        """Whether `<patch_newline>` follows each crop: at the end of every row but the last."""
        last = self.num_crops - 1
        return tuple((i + 1) % self.columns == 0 and i != last for i in range(self.num_crops))

    def num_tokens(self, config: ImageConfig) -> int:
        """The image's tokens in a sequence: features, start and end tokens of each view, and newlines."""
        return (config.crop_tokens + 2) * self.num_crops + self.num_newlines + config.global_tokens + 2


@dataclasses.dataclass(frozen=True, eq=False)
class ImageViews:
    """Normalised pixels of one image. S = global_size, C = crop_size."""

    global_view_HWC: Float[np.ndarray, "S S 3"]
    crops_NHWC: Float[np.ndarray, "N C C 3"]
    plan: ViewPlan

    def write(self, global_view_HWC: np.ndarray, crops_NHWC: np.ndarray) -> None:
        global_view_HWC[:], crops_NHWC[:] = self.global_view_HWC, self.crops_NHWC


@dataclasses.dataclass(frozen=True, eq=False)
class UncutImage:
    """An image before its views are cut: a fraction of their size, and no copy on the way to a batch."""

    image: Image.Image  # of plan.capped_size
    plan: ViewPlan
    config: ImageConfig

    def write(self, global_view_HWC: np.ndarray, crops_NHWC: np.ndarray) -> None:
        """Writes the normalised views to contiguous arrays, in float32 or rounded to their dtype."""
        write_views(global_view_HWC[None], self.image, self.image.size, 1, self.config)
        if self.plan.num_crops:
            window = self.plan.window, self.plan.window
            write_views(crops_NHWC, _resize(self.image, self.plan.resized_size), window, self.plan.columns, self.config)


@dataclasses.dataclass(frozen=True, eq=False)
class CodedImage:
    """An image of which only the features arrived: it takes its place in a prompt. Q features of a view, Z channels."""

    global_view_QZ: np.ndarray
    crops_NQZ: np.ndarray
    plan: ViewPlan  # only the grid of crops is known

    @classmethod
    def of(cls, tiles: list[np.ndarray], columns: int, config: ImageConfig) -> "CodedImage":
        """
        Args:
            tiles: float32 features [Q, Z] of the crops, row by row, and of the global view.
            columns: of the grid of crops; 0 without crops.

        Raises:
            ImageError: no image has such views.
        """
        plan = coded_plan([len(tile) for tile in tiles], columns, config)
        *crops, global_view_QZ = tiles
        empty = np.zeros((0, config.crop_tokens, global_view_QZ.shape[1]), np.float32)
        return cls(global_view_QZ, np.stack(crops) if crops else empty, plan)


def coded_plan(features: Sequence[int], columns: int, config: ImageConfig) -> ViewPlan:
    """The views of a coded image, of which only the grid of crops is known.

    Args:
        features: of the crops, row by row, and of the global view.
        columns: of the grid of crops; 0 without crops.

    Raises:
        ImageError: no image has such views.
    """
    num_crops = len(features) - 1
    rows, rest = divmod(num_crops, columns) if columns else (0, num_crops)
    is_known = {*features[:-1]} <= {config.crop_tokens} and features[-1] == config.global_tokens
    if rest or (columns and not rows) or not is_known:
        raise ImageError(
            f"coded image: {num_crops} crops in {columns} columns and a global view, of "
            f"{', '.join(map(str, features[:8]))} features; this model's crops have {config.crop_tokens} and global "
            f"views {config.global_tokens}"
        )
    if config.max_crops is not None and num_crops > config.max_crops:
        raise ImageError(f"coded image: {num_crops} crops, over images.max_crops={config.max_crops}")
    return ViewPlan((0, 0), (0, 0), (0, 0), (0, 0), window=0, columns=columns, rows=rows)


def plan_views(width: int, height: int, config: ImageConfig) -> ViewPlan:
    """Decides the views of an image of `width` x `height` pixels.

    Quotients and products are float64 and truncated exactly where the public processor does so: the last bit decides
    borderline sizes.

    Raises:
      ImageError: the image is empty, is so thin that it would vanish when shrunk or explode when padded, or needs more
        than `config.max_crops` crops.
    """
    name = f"image of {width}x{height} pixels"
    if width < 1 or height < 1:
        raise ImageError(f"{name}: it is empty; remove it")
    padded_size = _pad_size(width, height, config)
    if padded_size != (width, height) and padded_size[0] * padded_size[1] > image_files.MAX_PIXELS:
        raise ImageError(
            f"{name}: it is so thin that it would be padded to {padded_size[0]}x{padded_size[1]}, over the limit of "
            f"{image_files.MAX_PIXELS} pixels; crop it or scale it down"
        )
    capped_size = _cap_size(*padded_size, config)
    if min(capped_size) < 1:
        raise ImageError(f"{name}: shrunk to images.max_side={config.max_side} it has no pixels left; crop it")
    window = _window(*capped_size, config)
    if window == 0:
        return ViewPlan((width, height), padded_size, capped_size, capped_size, window=0, columns=0, rows=0)

    resized_width, resized_height = (_whole_windows(side, window, config) for side in capped_size)
    # A resized side is a multiple of the window, or shorter than it.
    columns, rows = max(1, resized_width // window), max(1, resized_height // window)
    plan = ViewPlan((width, height), padded_size, capped_size, (resized_width, resized_height), window, columns, rows)
    if config.max_crops is not None and plan.num_crops > config.max_crops:
        raise ImageError(
            f"{name}: it would be cut into {plan.num_crops} crops ({plan.num_tokens(config)} tokens), over "
            f"images.max_crops={config.max_crops}; raise the limit, or cut the image into less elongated pieces"
        )
    return plan


def _pad_size(width: int, height: int, config: ImageConfig) -> Size:
    aspect = width / height
    is_elongated = aspect > config.elongated_aspect or aspect < 1 / config.elongated_aspect
    if min(width, height) < config.thin_side and is_elongated:
        return max(width, height), max(width, height)
    return width, height


def _cap_size(width: int, height: int, config: ImageConfig) -> Size:
    longest = max(width, height)
    if longest <= config.max_side:
        return width, height
    scale = config.max_side / longest
    return int(width * scale), int(height * scale)


def _window(width: int, height: int, config: ImageConfig) -> int:
    """Side of the square crops; 0 for none."""
    longest, shortest = max(width, height), min(width, height)
    aspect = longest / shortest
    is_small = longest <= config.global_size if config.small_is_inclusive else longest < config.global_size
    if is_small:
        return shortest if aspect > config.small_aspect else 0
    return min(shortest, config.crop_size) if aspect > config.elongated_aspect else config.crop_size


def _whole_windows(side: int, window: int, config: ImageConfig) -> int:
    """`side` rounded to a multiple of the window; a side below one window is kept."""
    if side < window:
        return side
    whole = side // window
    return window * (whole + 1 if side / window - whole > config.round_up_fraction else whole)


def uncut(image: Image.Image, config: ImageConfig) -> UncutImage:
    """Plans the views of an RGB image (`image_files.open_image` makes one).

    Raises:
      ImageError: the image is not RGB, or `plan_views` refuses its size.
    """
    if image.mode != "RGB":
        raise ImageError(f"image of mode {image.mode!r}: views need mode 'RGB'; read it with open_image")
    plan = plan_views(*image.size, config)
    if plan.padded_size != plan.image_size:
        canvas = Image.new("RGB", plan.padded_size)
        canvas.paste(image)
        image = canvas
    return UncutImage(_resize(image, plan.capped_size), plan, config)


def make_views(image: Image.Image, config: ImageConfig) -> ImageViews:
    """Cuts an RGB image into normalised float32 views. Raises as `uncut`."""
    planned = uncut(image, config)
    global_view_HWC = np.empty((config.global_size, config.global_size, 3), np.float32)
    crops_NHWC = np.empty((planned.plan.num_crops, config.crop_size, config.crop_size, 3), np.float32)
    planned.write(global_view_HWC, crops_NHWC)
    return ImageViews(global_view_HWC, crops_NHWC, planned.plan)


def _resize(image: Image.Image, size: Size) -> Image.Image:
    """8-bit bilinear, widened when shrinking. Returns the image itself if the size is unchanged."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
