"""Devices and requests with coded images, for tests of the server and of a device."""

import base64
import json

import jax
import numpy as np
from PIL import Image
from running_server import chat_body

from stepjax.inference.config import EngineConfig
from stepjax.processing.images import make_views
from stepjax.tofc import codec

CONFIG = EngineConfig(max_sequences=8, smallest_batch=8, max_prefix_groups=1, max_context=256, page_size=16)
ORIGIN = "the tests' encoder"
SAMPLING = {"max_tokens": 6, "temperature": 0.0}
STREAMS = {"content-type": "application/octet-stream"}


def photo(seed, size=(130, 90)):
    """It has crops: 3 columns and 2 rows, and more for larger ones."""
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3))
    return Image.fromarray(noise_HWC.astype(np.uint8)).resize(size)


class Device:
    """Like `stepjax.tofc.device.Device`, without the files."""

    def __init__(self, model, images, tables):
        self.model, self.images, self.tables = model, images, tables
        self.run = jax.jit(type(model).merged_views)

    def features(self, image):
        views = make_views(image, self.images)
        crops = self.run(self.model, views.crops_NHWC) if len(views.crops_NHWC) else []
        (whole,) = self.run(self.model, views.global_view_HWC[None])
        return [np.asarray(tile) for tile in (*crops, whole)], views.plan.columns

    def stream(self, image, encode=codec.encode):
        tiles, columns = self.features(image)
        return encode(self.tables, tiles, columns=columns)


def part(frame):
    return {"type": "features", "features": {"data": base64.b64encode(frame).decode()}}


def post(server, *frames, text="What is it?", tail=b"", sizes=None, resend=None, **fields):
    """In a binary body. `resend` is of all frames."""
    sizes = [len(frame) for frame in frames] if sizes is None else sizes
    more = {} if resend is None else {"resend": resend}
    content = [{"type": "features", "features": {"bytes": size, **more}} for size in sizes]
    line = json.dumps(chat_body([*content, {"type": "text", "text": text}], **fields)).encode()
    return server.http.post(
        "/v1/chat/completions", content=b"\n".join([line, b"".join(frames) + tail]), headers=STREAMS
    )


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def flipped(frame, place):
    return frame[:place] + bytes([frame[place] ^ 16]) + frame[place + 1 :]


def damaged(frame, *tiles):
    parts = codec.pieces(frame)
    return b"".join(flipped(part, -5) if tile in tiles else part for tile, part in enumerate(parts))


def again(frame, *tiles):
    return b"".join(codec.pieces(frame)[tile] for tile in tiles)
