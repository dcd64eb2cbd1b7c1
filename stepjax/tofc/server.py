"""The server's end: a frame to an image that takes its place in a prompt. It needs no JAX."""

from stepjax.config import ImageConfig
from stepjax.errors import CorruptStreamError, ImageError
from stepjax.processing.images import CodedImage
from stepjax.tofc import codec
from stepjax.tofc.codec import Limits
from stepjax.tofc.tables import Tables


def decode_image(tables: Tables, frame: bytes, images: ImageConfig, *, limits: Limits | None = None) -> CodedImage:
    """A device's frame as the model reads it.

    Raises:
        CorruptStreamError: it is no frame, truncated, or damaged, or no image has such views.
        StreamLimitError: it is larger than the limits.
        UnknownModelError: it was made with another model, or its format has another version.
    """
    tiles = codec.decode(tables, frame, limits=limits)
    try:
        return CodedImage.of(tiles, codec.parse(frame, limits=limits).columns, images)
    except ImageError as error:
        raise CorruptStreamError(f"frame of {len(frame)} bytes: {error}") from error
