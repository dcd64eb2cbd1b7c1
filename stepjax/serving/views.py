"""`/stepjax/views`: what the model sees of an image, made from the very pixels that go into the encoder."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from starlette.responses import JSONResponse, Response

from stepjax.config import ImageConfig
from stepjax.processing.images import make_views
from stepjax.serving.context import EngineContext
from stepjax.serving.images import data_uri_bytes, opener, plan_of
from stepjax.serving.processors import image_config
from stepjax.serving.schemas import ViewsRequest
from stepjax.serving.validation import parse_request

MAX_SIDE = 256  # pixels of a picture


async def views(context: EngineContext, body: dict[str, Any]) -> Response:
    """
    Raises:
        ApiError, StepjaxError: the image is not usable.
    """
    request = parse_request(ViewsRequest, body)
    return JSONResponse(await context.prompts.image_threads.run(_views, context, request))


def _views(context: EngineContext, request: ViewsRequest) -> dict[str, Any]:
    config, limits = image_config(context.processor), context.settings.limits
    data = data_uri_bytes(request.image, limits, "image")
    plan_of(data, config, limits, "image", request.frame)
    made = make_views(opener(limits)(data, name="image", frame=request.frame), config)
    plan = made.plan
    return {
        "object": "stepjax.views",
        "width": plan.image_size[0],
        "height": plan.image_size[1],
        "tokens": plan.num_tokens(config),
        "global_view": {
            "size": config.global_size,
            "tokens": config.global_tokens,
            "image": _picture(made.global_view_HWC, config),
        },
        "columns": plan.columns,
        "rows": plan.rows,
        "crops": [
            {
                "row": index // plan.columns,
                "column": index % plan.columns,
                "size": config.crop_size,
                "tokens": config.crop_tokens,
                "image": _picture(crop_HWC, config),
            }
            for index, crop_HWC in enumerate(made.crops_NHWC)
        ],
    }


def _picture(view_HWC: np.ndarray, config: ImageConfig) -> str:
    pixels_HWC = (view_HWC * np.asarray(config.std, np.float32) + np.asarray(config.mean, np.float32)) * 255
    picture = Image.fromarray(np.rint(pixels_HWC.clip(0, 255)).astype(np.uint8))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
