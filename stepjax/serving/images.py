"""Images of requests: from a URI to the bytes of a file, within limits that are checked before a pixel is decoded."""

import io

from PIL import Image

from stepjax.config import ImageConfig
from stepjax.errors import ImageError
from stepjax.processing.image_files import FORMATS, decode_base64, split_data_uri
from stepjax.processing.images import ViewPlan, plan_views
from stepjax.serving.errors import ApiError
from stepjax.serving.settings import Limits


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


def plan_of(data: bytes, config: ImageConfig, limits: Limits, where: str) -> ViewPlan:
    """How the image will be cut, by its header alone. Upright it may turn out to be on its side.

    Raises:
        ApiError: 400, it is no image, is too large, or cannot be cut.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
        if width * height > limits.image_pixels:
            message = f"{width}x{height} pixels are more than the limit of {limits.image_pixels}: scale it down"
            raise ApiError(400, f"{where}: {message}", param=where, code="image_too_large")
        return plan_views(width, height, config)
    except ImageError as error:
        raise ApiError(400, f"{where}: {error}", param=where, code="invalid_image") from None
    except ApiError:
        raise
    except Exception as error:  # broken bytes make PIL's readers raise anything
        message = f"no image that can be read ({type(error).__name__}); known are {', '.join(FORMATS)}"
        raise ApiError(400, f"{where}: {message}", param=where, code="invalid_image") from None


def view_bytes(plan: ViewPlan, config: ImageConfig) -> int:
    """Memory of the views, twice: they are copied when the prompt is laid out."""
    return 2 * 12 * (config.global_size**2 + plan.num_crops * config.crop_size**2)


def _too_large(limits: Limits, where: str) -> ApiError:
    message = f"{where}: the image is larger than {limits.image_bytes} bytes: scale it down"
    return ApiError(413, message, param=where, code="image_too_large")
