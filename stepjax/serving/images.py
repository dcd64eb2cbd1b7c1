"""Images of requests: URL -> file bytes -> pixels -> views, within limits.

Sizes are checked before pixels are decoded. A malicious file can keep a decoder busy forever, so headers and pixels
are read in processes with time and memory limits.
"""

import base64
import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from stepjax.config import ImageConfig
from stepjax.errors import ImageError, ImageSizeError, LimitError
from stepjax.interop.text_processor import AnyProcessor, TextProcessor
from stepjax.processing import bounded
from stepjax.processing.image_files import decode_base64, pixels_of, size_of, split_data_uri
from stepjax.processing.images import ViewPlan, make_views, plan_views
from stepjax.serving.errors import ApiError, invalid
from stepjax.serving.schemas import ChatRequest, Features, FeaturesPart, ImagePart, ViewsRequest
from stepjax.serving.settings import Limits

_Result = TypeVar("_Result")

Place = tuple[int, int]  # where an image is in a conversation: message index, part index

SECONDS = 10.0  # of CPU time per image; 32 million pixels take about one
_MEMORY = 256 * 2**20
_PIXEL_BYTES = 24  # per pixel: 32-bit grey or alpha, and the copies made on the way to RGB
_PICTURE_SIDE = 256  # pixels of a view's thumbnail


def image_config(processor: AnyProcessor) -> ImageConfig:
    """Raises ApiError: 400, the model is text-only."""
    if isinstance(processor, TextProcessor):
        raise invalid("this is a text-only model: send no images", None, "images_not_supported")
    return processor.image_config


def image_urls(request: ChatRequest, limits: Limits, *, allow_remote: bool) -> dict[Place, str]:
    """Raises ApiError: 400, there are too many images, or one is remote and fetching is not allowed."""
    parts = _parts(request)
    urls = {place: part.image_url.url for place, part in parts.items() if isinstance(part, ImagePart)}
    if len(parts) > limits.images:
        message = f"messages have {len(parts)} images, more than the limit of {limits.images}"
        raise invalid(message, "messages", "too_many_images")
    for place, url in urls.items():
        if not is_data_uri(url) and not allow_remote:
            where = name_of(place)
            message = f"{where}: images are not fetched from URLs here; send a data URI: data:image/...;base64,..."
            raise invalid(message, where, "remote_images_not_allowed")
    return urls


def coded_images(request: ChatRequest) -> dict[Place, Features]:
    return {place: part.features for place, part in _parts(request).items() if isinstance(part, FeaturesPart)}


def _parts(request: ChatRequest) -> dict[Place, ImagePart | FeaturesPart]:
    return {
        (i, j): part
        for i, message in enumerate(request.messages)
        if isinstance(message.content, list)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart | FeaturesPart)
    }


def is_data_uri(url: str) -> bool:
    return url[:5].lower() == "data:"


def name_of(place: Place) -> str:
    """The image's name in errors."""
    return f"messages[{place[0]}].content[{place[1]}].image_url.url"


def name_of_coded(place: Place) -> str:
    return f"messages[{place[0]}].content[{place[1]}].features"


def data_uri_bytes(uri: str, limits: Limits, where: str) -> bytes:
    """The file in a `data:image/...;base64,...` URI. Raises ApiError: 400, it is not one; 413, it is too large."""
    message = f"{where}: the image is larger than {limits.image_bytes} bytes: scale it down"
    too_large = ApiError(413, message, param=where, code="image_too_large")
    parts = split_data_uri(uri)
    if parts is None:
        raise invalid(f"{where}: {uri[:60]!r} is not a data URI of an image", where, "invalid_image")
    payload, is_base64 = parts
    if not is_base64:
        raise invalid(f"{where}: encode the image as base64", where, "invalid_image")
    if len(payload) > 2 * limits.image_bytes:  # generous, for white space and escapes
        raise too_large
    try:
        data = decode_base64(payload)
    except ValueError as error:
        raise invalid(f"{where}: invalid base64 ({error})", where, "invalid_image") from None
    if len(data) > limits.image_bytes:
        raise too_large
    return data


def plan_of(data: bytes, config: ImageConfig, limits: Limits, where: str, frame: int | None = None) -> ViewPlan:
    """How the image will be cropped, from its header alone; EXIF rotation may change that. Raises ApiError: 400, it is
    not an image, is too large or cannot be cropped.
    """
    try:
        width, height = _bounded(size_of, data, limits, where, frame)
    except ImageError as error:
        raise image_error(error, where) from None
    if width * height > limits.image_pixels:
        message = f"{width}x{height} pixels are more than the limit of {limits.image_pixels}: scale it down"
        raise invalid(f"{where}: {message}", where, "image_too_large")
    try:
        return plan_views(width, height, config)
    except ImageError as error:
        raise invalid(f"{where}: {error}", where, "invalid_image") from None


def opener(limits: Limits) -> Callable[..., Image.Image]:
    """`image_files.open_image` with the limits on requests."""

    def open_image(source: bytes, *, name: str, frame: int | None = None) -> Image.Image:
        size, pixels = _bounded(pixels_of, source, limits, name, frame)
        return Image.frombytes("RGB", size, pixels)

    return open_image


def image_error(error: ImageError, where: str) -> ApiError:
    """The error response for an image that cannot be used."""
    return invalid(str(error), where, "image_too_large" if isinstance(error, ImageSizeError) else "invalid_image")


def view_bytes(plan: ViewPlan, config: ImageConfig) -> int:
    """Memory of the views, doubled: building the prompt copies them."""
    return 2 * 12 * (config.global_size**2 + plan.num_crops * config.crop_size**2)


def _bounded(
    function: Callable[[bytes, str, int | None], _Result], data: bytes, limits: Limits, name: str, frame: int | None
) -> _Result:
    memory = _MEMORY + _PIXEL_BYTES * limits.image_pixels
    try:
        return bounded.call(function, data, name, frame, seconds=SECONDS, memory=memory)
    except LimitError as error:
        raise ImageSizeError(f"{name}: {error}; save it again as a smaller PNG or JPEG") from None


def show_views(request: ViewsRequest, processor: AnyProcessor, limits: Limits) -> dict[str, Any]:
    """The views the model sees of an image, made from the same pixels that the encoder gets."""
    config = image_config(processor)
    data = data_uri_bytes(request.image, limits, "image")
    plan_of(data, config, limits, "image", request.frame)
    views = make_views(opener(limits)(data, name="image", frame=request.frame), config)
    plan = views.plan
    whole = {"size": config.global_size, "tokens": config.global_tokens}
    crop = {"size": config.crop_size, "tokens": config.crop_tokens}
    return {
        "object": "stepjax.views",
        "width": plan.image_size[0],
        "height": plan.image_size[1],
        "tokens": plan.num_tokens(config),
        "global_view": {**whole, "image": _picture(views.global_view_HWC, config)},
        "columns": plan.columns,
        "rows": plan.rows,
        "crops": [
            {"row": i // plan.columns, "column": i % plan.columns, **crop, "image": _picture(crop_HWC, config)}
            for i, crop_HWC in enumerate(views.crops_NHWC)
        ],
    }


def _picture(view_HWC: np.ndarray, config: ImageConfig) -> str:
    pixels_HWC = (view_HWC * np.asarray(config.std, np.float32) + np.asarray(config.mean, np.float32)) * 255
    picture = Image.fromarray(np.rint(pixels_HWC.clip(0, 255)).astype(np.uint8))
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
