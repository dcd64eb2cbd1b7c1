"""Streams of requests: a device's coded features -> an image that takes its place in the prompt, within limits.

A stream is parsed and compared with the codec and with the model's views, checksums included, before any is decoded.
Decoded streams are kept by the digest of their bytes, so that one sent again costs nothing here. The engine keeps what
it makes of them by the digest of the features, as it does with pixels.
"""

import base64
import hashlib
import threading
import time
from collections import OrderedDict

from stepjax.config import ImageConfig
from stepjax.errors import BitstreamError, CorruptStreamError, ImageError, StreamLimitError, UnknownModelError
from stepjax.processing.images import CodedImage, ViewPlan, coded_plan
from stepjax.serving.errors import ApiError, invalid
from stepjax.serving.metrics import Metrics
from stepjax.serving.schemas import Features
from stepjax.serving.settings import Limits
from stepjax.tofc import codec
from stepjax.tofc.server import decode_image
from stepjax.tofc.tables import Tables

_MOST_CROPS = 4096  # where the model's images have no limit


class Receiver:
    """Reads streams. Called from threads; all methods raise ApiErrors that name the part of the request."""

    def __init__(self, tables: Tables | None, images: ImageConfig | None, limits: Limits, metrics: Metrics):
        """
        Args:
            tables: the codec; None refuses all streams.
            images: the views of its model.
        """
        self._tables, self._images, self._metrics = tables, images, metrics
        self._max_bytes, self._cache_bytes = limits.stream_bytes, limits.stream_cache_bytes
        if images is not None:
            crops = _MOST_CROPS if images.max_crops is None else images.max_crops
            features = max(images.crop_tokens, images.global_tokens)
            self._limits = codec.Limits(frame_bytes=limits.stream_bytes, tiles=crops + 1, features=features)
        self._lock = threading.Lock()
        self._decoded: OrderedDict[bytes, CodedImage] = OrderedDict()  # least recently used first
        self._size = 0  # bytes of those

    def data(self, features: Features, where: str) -> bytes:
        """The bytes of a stream. Raises 400, it is not base64; 413, it is too large."""
        data = features.data
        if isinstance(data, str):
            if len(data) > 4 * -(-self._max_bytes // 3):
                raise self._error(StreamLimitError(f"{len(data)} characters of base64 are more than allowed"), where)
            try:
                data = base64.b64decode(data, validate=True)
            except ValueError as error:
                raise invalid(f"{where}.data: invalid base64 ({error})", f"{where}.data") from None
        return data

    def plan(self, data: bytes, where: str) -> ViewPlan:
        """The views of a stream, from its header, after all checks that need no decoding.

        Raises:
            ApiError: 400, the model has no codec, or the stream is damaged or of other views; 409, it was made with
                another codec; 413, it is larger than the limits.
        """
        if self._tables is None or self._images is None:
            message = f"{where}: this model has no codec for features; send the image"
            raise invalid(message, where, "features_not_supported")
        self._metrics.stream_bytes.inc(len(data))
        try:
            frame = codec.parse(data, limits=self._limits)
        except BitstreamError as error:
            raise self._error(error, where, is_checked=False) from None
        try:
            codec.model_of(self._tables, frame)
            return coded_plan(frame.features, frame.columns, self._images)
        except (BitstreamError, ImageError) as error:
            raise self._error(error, where) from None

    def image_bytes(self, plan: ViewPlan) -> int:
        """Memory of a stream's features, doubled: building the prompt copies them."""
        assert self._tables is not None and self._images is not None
        features = plan.num_crops * self._images.crop_tokens + self._images.global_tokens
        return 2 * 4 * features * self._tables.channels

    def image(self, data: bytes, where: str) -> CodedImage:
        """Decodes a stream that `plan` has accepted, or finds it. Raises 400: its checksums hold, but it is no stream
        of the codec.
        """
        assert self._tables is not None and self._images is not None
        key = hashlib.blake2b(data, digest_size=32).digest()
        with self._lock:
            found = self._decoded.get(key)
            if found is not None:
                self._decoded.move_to_end(key)
        if found is not None:
            self._metrics.streams.labels("cached").inc()
            return found
        began = time.perf_counter()
        try:
            image = decode_image(self._tables, data, self._images, limits=self._limits)
        except BitstreamError as error:
            raise self._error(error, where) from None
        self._metrics.stream_decode_seconds.observe(time.perf_counter() - began)
        self._metrics.streams.labels("decoded").inc()
        with self._lock:
            if key not in self._decoded:
                self._decoded[key] = image
                self._size += _size(image)
            while self._size > self._cache_bytes:
                self._size -= _size(self._decoded.popitem(last=False)[1])
        return image

    def _error(self, error: BitstreamError | ImageError, where: str, *, is_checked: bool = True) -> ApiError:
        """
        Args:
            is_checked: the checksums hold, so that the same bytes would fail again.
        """
        status, code, details = 400, "corrupt_stream", {}
        if isinstance(error, UnknownModelError):
            accepted = list(error.accepted) or ([] if self._tables is None else [self._tables.id])
            status, code, details = 409, "unknown_codec", {"accepted": accepted}
        elif isinstance(error, StreamLimitError):
            status, code = 413, "stream_too_large"
        else:
            tile = error.tile if isinstance(error, CorruptStreamError) else None
            details = {"retryable": not is_checked, "tile": tile}
        self._metrics.streams.labels(code).inc()
        return ApiError(status, f"{where}: {error}", param=where, code=code, details=details)


def _size(image: CodedImage) -> int:
    return image.global_view_QZ.nbytes + image.crops_NQZ.nbytes
