"""Images of requests: from a URI to the bytes of a file, and to pixels, within limits.

Sizes are checked before a pixel is decoded. What a decoder does with a file that was made to hurt it nobody can check,
so headers and pixels are read in processes that have limits.
"""

from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from stepjax.config import ImageConfig
from stepjax.errors import ImageError, ImageSizeError, LimitError
from stepjax.processing import bounded
from stepjax.processing.image_files import decode_base64, pixels_of, size_of, split_data_uri
from stepjax.processing.images import ViewPlan, plan_views
from stepjax.serving.errors import ApiError
from stepjax.serving.settings import Limits

_Result = TypeVar("_Result")

SECONDS = 10.0  # of processor time for an image; 32 million pixels take about one
_MEMORY = 256 * 2**20
_PIXEL_BYTES = 24  # of an image in 32-bit grey, or with alpha, and its copies while it becomes RGB


def data_uri_bytes(uri: str, limits: Limits, where: str) -> bytes:
    """The file in a `data:image/...;base64,...` URI.

    Raises:
        ApiError: 400, it is not one; 413, it is too large.
    """
    parts = split_data_uri(uri)
    if parts is None:
        raise ApiError(400, f"{where}: {uri[:60]!r} is no data URI of an image", param=where, code="invalid_image")
    payload, is_base64 = parts
    if not is_base64:
        raise ApiError(400, f"{where}: encode the image as base64", param=where, code="invalid_image")
    if len(payload) > 2 * limits.image_bytes:  # white space and escapes are generously allowed for
        raise _too_large(limits, where)
    try:
        data = decode_base64(payload)
    except ValueError as error:
        raise ApiError(
            400, f"{where}: its base64 text is broken ({error})", param=where, code="invalid_image"
        ) from None
    if len(data) > limits.image_bytes:
        raise _too_large(limits, where)
    return data


def plan_of(data: bytes, config: ImageConfig, limits: Limits, where: str, frame: int | None = None) -> ViewPlan:
    """How the image will be cut, by its header alone. Upright it may turn out to be on its side.

    Raises:
        ApiError: 400, it is no image, is too large, or cannot be cut.
    """
    try:
        width, height = _bounded(size_of, data, limits, where, frame)
    except ImageError as error:
        raise image_error(error, where) from None
    if width * height > limits.image_pixels:
        message = f"{width}x{height} pixels are more than the limit of {limits.image_pixels}: scale it down"
        raise ApiError(400, f"{where}: {message}", param=where, code="image_too_large")
    try:
        return plan_views(width, height, config)
    except ImageError as error:
        raise ApiError(400, f"{where}: {error}", param=where, code="invalid_image") from None


def opener(limits: Limits) -> Callable[..., Image.Image]:
    """`image_files.open_image` for files of requests."""

    def open_image(source: bytes, *, name: str, frame: int | None = None) -> Image.Image:
        size, pixels = _bounded(pixels_of, source, limits, name, frame)
        return Image.frombytes("RGB", size, pixels)

    return open_image


def image_error(error: ImageError, where: str) -> ApiError:
    """The answer to an image that cannot be used."""
    code = "image_too_large" if isinstance(error, ImageSizeError) else "invalid_image"
    return ApiError(400, str(error), param=where, code=code)


def _bounded(
    function: Callable[[bytes, str, int | None], _Result],
    data: bytes,
    limits: Limits,
    name: str,
    frame: int | None,
) -> _Result:
    memory = _MEMORY + _PIXEL_BYTES * limits.image_pixels
    try:
        return bounded.call(function, data, name, frame, seconds=SECONDS, memory=memory)
    except LimitError as error:
        raise ImageSizeError(f"{name}: {error}; save it anew, as a smaller PNG or JPEG") from None


def view_bytes(plan: ViewPlan, config: ImageConfig) -> int:
    """Memory of the views, twice: they are copied when the prompt is laid out."""
    return 2 * 12 * (config.global_size**2 + plan.num_crops * config.crop_size**2)


def _too_large(limits: Limits, where: str) -> ApiError:
    message = f"{where}: the image is larger than {limits.image_bytes} bytes: scale it down"
    return ApiError(413, message, param=where, code="image_too_large")
