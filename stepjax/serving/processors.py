"""What the server asks of a processor that may be asked of those with eyes only."""

from stepjax.config import ImageConfig
from stepjax.interop.text_processor import AnyProcessor, TextProcessor
from stepjax.serving.errors import ApiError


def image_config(processor: AnyProcessor) -> ImageConfig:
    """
    Raises:
        ApiError: 400, the model has no eyes.
    """
    if isinstance(processor, TextProcessor):
        raise ApiError(400, "this model reads text only: send no images", code="images_not_supported")
    return processor.image_config
