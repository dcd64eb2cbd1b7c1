"""Streams of requests: a device's coded features -> an image that takes its place in the prompt, within limits.

A stream is parsed and compared with the codec and with the model's views, checksums included, before any is decoded.
Decoded streams are kept by the digest of their bytes, so that one sent again costs nothing here. The engine keeps what
it makes of them by the digest of the features, as it does with pixels.

A frame some of whose tiles are damaged is kept for a while, too: the error names it and them, and a device sends these
alone again. The frame that they complete is then read like any other that has arrived, with all its checks.
"""

import base64
import hashlib
import secrets
import threading
import time
from collections import OrderedDict

from stepjax.config import ImageConfig
from stepjax.errors import BitstreamError, CorruptStreamError, ImageError, StreamLimitError, UnknownModelError
from stepjax.processing.images import CodedImage, ViewPlan, coded_plan
from stepjax.serving.errors import ApiError, invalid
from stepjax.serving.images import name_of_coded
from stepjax.serving.metrics import Metrics
from stepjax.serving.schemas import ChatRequest, Features, FeaturesPart, Part
from stepjax.serving.settings import Limits, MiB
from stepjax.tofc import codec
from stepjax.tofc.codec import decode_image
from stepjax.tofc.tables import Tables

_MOST_CROPS = 4096  # where the model's images have no limit
_DAMAGED_FRAMES, _DAMAGED_BYTES, _DAMAGED_SECONDS = 256, 8 * MiB, 60.0  # that are kept


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
        self._damaged = _Damaged()
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

    def complete(self, request: ChatRequest) -> ChatRequest:
        """The request with frames in the place of the tiles that were sent again. A frame can be completed once.

        Raises:
            ApiError: 400, the frame has not such tiles; 409, it is not kept here, or no longer; and as `data`.
        """

        def whole(part: Part, where: str) -> Part:
            if not isinstance(part, FeaturesPart) or part.features.resend is None:
                return part
            resend, sent = part.features.resend, self.data(part.features, where)
            frame = self._damaged.take(resend.frame)
            if frame is None:
                self._metrics.streams.labels("unknown_frame").inc()
                message = f"{where}.resend.frame: this server does not have the frame, or no longer; send it whole"
                details = {"retryable": True}
                raise ApiError(409, message, param=f"{where}.resend.frame", code="unknown_frame", details=details)
            try:
                data = codec.mended(frame, resend.tiles, sent, limits=self._limits)
            except BitstreamError as error:
                raise self._error(error, where, is_checked=False) from None
            return part.model_copy(update={"features": Features(data=data)})

        messages = []
        for i, message in enumerate(request.messages):
            if isinstance(message.content, list):
                parts = [whole(part, name_of_coded((i, j))) for j, part in enumerate(message.content)]
                message = message.model_copy(update={"content": parts})
            messages.append(message)
        return request.model_copy(update={"messages": messages})

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
            tiles, frame = error.tiles if isinstance(error, CorruptStreamError) else (), None
            if tiles and len(tiles) < len(codec.pieces(data, limits=self._limits)):
                frame = self._damaged.keep(data)
            raise self._error(error, where, is_checked=False, frame=frame) from None
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

    def _error(
        self, error: BitstreamError | ImageError, where: str, *, is_checked: bool = True, frame: str | None = None
    ) -> ApiError:
        """
        Args:
            is_checked: the checksums hold, so that the same bytes would fail again.
            frame: under which name it is kept.
        """
        status, code, details = 400, "corrupt_stream", {}
        if isinstance(error, UnknownModelError):
            accepted = list(error.accepted) or ([] if self._tables is None else [self._tables.id])
            status, code, details = 409, "unknown_codec", {"accepted": accepted}
        elif isinstance(error, StreamLimitError):
            status, code = 413, "stream_too_large"
        else:
            tiles = list(error.tiles) if isinstance(error, CorruptStreamError) else []
            details = {"retryable": not is_checked, "tiles": tiles, "frame": frame}
        self._metrics.streams.labels(code).inc()
        return ApiError(status, f"{where}: {error}", param=where, code=code, details=details)


class _Damaged:
    """Damaged frames that wait for their tiles. A name is random: only who sent the frame knows it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._frames: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # until when, and what; oldest first
        self._size = 0  # bytes of those

    def keep(self, frame: bytes) -> str:
        """Its name."""
        name, now = secrets.token_urlsafe(12), time.monotonic()
        with self._lock:
            self._frames[name] = now + _DAMAGED_SECONDS, frame
            self._size += len(frame)
            while self._frames and (
                len(self._frames) > _DAMAGED_FRAMES
                or self._size > _DAMAGED_BYTES
                or next(iter(self._frames.values()))[0] <= now
            ):
                self._size -= len(self._frames.popitem(last=False)[1][1])
        return name

    def take(self, name: str) -> bytes | None:
        """A frame, which is then kept no longer; None if there is none."""
        with self._lock:
            end, frame = self._frames.pop(name, (0.0, b""))
            self._size -= len(frame)
        return frame if time.monotonic() < end else None


def _size(image: CodedImage) -> int:
    return image.global_view_QZ.nbytes + image.crops_NQZ.nbytes
