"""Images that devices have coded: answers, batches and caches of a server with a codec, refusals, and the device.

The codec is that of a model with random parameters, fitted to noise: frames are real, only not small.
"""

import base64
import dataclasses
import http.server
import io
import json
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from running_server import chat_body, running
from tiny_tofc import config as tiny

from stepjax.cli import main
from stepjax.config import NumericsConfig, TokenizerConfig
from stepjax.errors import RefusedError, UnreachableError
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.interop.codec_files import _OF_DEVICE, device_programs
from stepjax.interop.text_processor import TextProcessor
from stepjax.models.step_vl import abstract_model
from stepjax.processing.images import make_views
from stepjax.processing.processor import Processor
from stepjax.processing.tokenizer import load_tokenizer
from stepjax.serving import features
from stepjax.serving.errors import ApiError
from stepjax.serving.schemas import Features
from stepjax.serving.settings import Limits
from stepjax.sharding import named_leaves
from stepjax.tofc import client, codec
from stepjax.tofc import device as files
from stepjax.tofc.client import Policy, Server, ask
from stepjax.tofc.codec import decode_image
from stepjax.tofc.device import CODEC, DEVICE, pack
from stepjax.tofc.hyperprior import freeze
from stepjax.tofc.range_coder import varint
from stepjax.tofc.tables import Tables

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


@pytest.fixture(scope="module")
def coded_processor():
    return Processor.from_config(tiny.images, TokenizerConfig())


@pytest.fixture(scope="module")
def model(coded_processor, randomized):
    vocab = coded_processor.tokenizer.vocab_size
    config = dataclasses.replace(tiny.model, decoder=dataclasses.replace(tiny.model.decoder, vocab_size=vocab))
    return randomized(abstract_model(config, NumericsConfig(compute_dtype="float32", remat="none")))


@pytest.fixture(scope="module")
def device(model):
    seen = Device(model, tiny.images, None)
    x_NC = np.concatenate([tile for seed in range(4) for tile in seen.features(photo(seed))[0]])
    model.tofc.hyperprior.calibrate(x_NC)
    return Device(model, tiny.images, freeze(model.tofc.hyperprior, origin=ORIGIN))


@pytest.fixture(scope="module")
def frame(device):
    return device.stream(photo(0))


@pytest.fixture(scope="module")
def edge(model, coded_processor, device):
    """A server with the real engine."""
    with running(coded_processor, AsyncEngine(Engine(model, coded_processor, CONFIG)), codec=device.tables) as one:
        yield one


@pytest.fixture
def door(coded_processor, device):
    """A function that starts a server with an engine that only greets."""
    stack = []

    def start(codec=device.tables, processor=coded_processor, **settings):
        server = running(processor, FakeEngine(), codec=codec, **settings)
        stack.append(server)
        return server.__enter__()

    yield start
    for server in stack:
        server.__exit__(None, None, None)


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


def logprobs_of(response):
    """Of the tokens of an answer: so small a model says the same of every image, but not as surely."""
    assert response.status_code == 200, response.text
    return [each["logprob"] for each in response.json()["choices"][0]["logprobs"]["content"]]


def error(response, status, code):
    assert response.status_code == status, response.text
    fields = response.json()["error"]
    assert fields["code"] == code and fields["message"], fields
    return fields


def metrics(server):
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {
        (sample.name.removeprefix("stepjax_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


# Answers --------------------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_decoded_features(edge, model, coded_processor, device, frame):
    """Fed to an engine directly; by a binary body, base64 and raw features that decode to the same."""
    question = [{"type": "image", "image": frame}, {"type": "text", "text": "What is it?"}]

    def received(data, **_):
        return decode_image(device.tables, data, tiny.images)

    options = {"open_image": received, "enable_thinking": False}
    example = coded_processor.process_prompt([{"role": "user", "content": question}], **options)
    assert [view.shape for view in (*example.crops, *example.global_views)] == [(2, 24)] * 6 + [(4, 24)]
    ((direct,),) = Engine(model, coded_processor, CONFIG).generate([example], SamplingParams(**SAMPLING, logprobs=0))
    expected = [each.logprob for each in direct.logprobs]
    fields = {**SAMPLING, "logprobs": True, "chat_template_kwargs": {"enable_thinking": False}}
    response = post(edge, frame, **fields)
    assert text_of(response) == direct.text
    np.testing.assert_allclose(logprobs_of(response), expected, rtol=1e-4)
    assert response.json()["usage"]["prompt_tokens"] == len(example.tokens)
    again = edge.chat([part(frame), {"type": "text", "text": "What is it?"}], **fields)
    np.testing.assert_allclose(logprobs_of(again), expected, rtol=1e-4)
    other = logprobs_of(post(edge, device.stream(photo(9)), **fields))
    assert np.abs(np.subtract(other, expected)).max() > 1e-2, "the model sees the image"


def test_coded_and_other_images_stand_in_one_conversation(edge, model, coded_processor, device, frame):
    """In both orders. The engine makes of an image file what would arrive from a device."""
    other, png = photo(1, (90, 90)), io.BytesIO()
    other.save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    file = {"type": "image_url", "image_url": {"url": url}}
    frames = {"coded": frame, "file": device.stream(other)}
    seen = {name: decode_image(device.tables, each, tiny.images) for name, each in frames.items()}
    options = {"enable_thinking": False, "open_image": lambda image, **_: seen[image]}
    engine = Engine(model, coded_processor, CONFIG)
    for order in (1, -1):
        images = [{"type": "image", "image": name} for name in ("coded", "file")][::order]
        text = {"type": "text", "text": "Which?"}
        example = coded_processor.process_prompt([{"role": "user", "content": [*images, text]}], **options)
        ((direct,),) = engine.generate([example], SamplingParams(**SAMPLING, logprobs=0))
        fields = {**SAMPLING, "logprobs": True, "chat_template_kwargs": {"enable_thinking": False}}
        response = edge.chat([*[part(frame), file][::order], text], **fields)
        np.testing.assert_allclose(logprobs_of(response), [each.logprob for each in direct.logprobs], rtol=1e-3)


def test_many_devices_share_batches_and_a_stream_sent_again_costs_nothing(edge, device, monkeypatch):
    frames = [device.stream(photo(seed, (130, 90 + 40 * (seed % 2)))) for seed in range(20, 28)]
    fields = {**SAMPLING, "logprobs": True, "text": "Alone?"}
    alone = [logprobs_of(post(edge, frame, **fields)) for frame in frames]
    edge.wait_until(lambda: edge.engine.stats().running == 0)
    before, batches, runner = metrics(edge), [], edge.engine._engine._runner
    encode = runner.encode
    monkeypatch.setattr(runner, "encode", lambda kind, views: batches.append((kind, len(views))) or encode(kind, views))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, edge, frame, **fields) for frame in frames]
        np.testing.assert_allclose([logprobs_of(each.result()) for each in asked], alone, rtol=1e-4)
    after = metrics(edge)
    assert after["streams_total", "cached"] - before.get(("streams_total", "cached"), 0) == 8
    assert after["streams_total", "decoded"] == before["streams_total", "decoded"] and not batches
    new = [device.stream(photo(seed)) for seed in range(30, 38)]
    with ThreadPoolExecutor(8) as pool:
        assert all(each.status_code == 200 for each in pool.map(lambda frame: post(edge, frame, **SAMPLING), new))
    assert {kind for kind, _ in batches} == {"coded crop", "coded global"}
    assert sum(count for _, count in batches) == 8 * 7 and len(batches) < 16
    assert after["stream_bytes_total",] - before["stream_bytes_total",] == sum(map(len, frames))
    assert after["stream_decode_seconds_count",] == after["streams_total", "decoded"]


def test_rounds_of_pacore_read_features(edge, frame):
    response = post(edge, frame, max_tokens=4, seed=1, pacore={"schedule": [2]})
    assert response.status_code in (200, 502), response.text  # so small a model may never end its reasoning
    assert metrics(edge)["pacore_calls_total", "ok"] >= 2


def test_a_device_is_answered_by_whatever_its_server_can_read(edge, device):
    """Its entropy model is another, so raw features; then its encoder is, too, so the picture."""
    image = photo(5)
    found = ask(Server(f"{edge.url}/v1"), device, image, "What is it?", **SAMPLING)
    assert found.kind == "stream" and found.text == text_of(post(edge, device.stream(image), **SAMPLING))
    step = {"step": device.tables.arrays["step"] * 2}
    newer = Device(device.model, tiny.images, Tables({**device.tables.arrays, **step}, ORIGIN))
    found = ask(Server(f"{edge.url}/v1"), newer, image, "What is it?", **SAMPLING)
    assert [each.kind for each in found.attempts] == ["stream", "int8"]
    assert found.attempts[0].reason == "unknown_codec" and found.attempts[0].status == 409
    assert found.text == text_of(post(edge, device.stream(image, codec.encode_raw), **SAMPLING))
    alien = Device(device.model, tiny.images, Tables(device.tables.arrays, "another encoder"))
    found = ask(Server(f"{edge.url}/v1"), alien, image, "What is it?", **SAMPLING)
    assert [each.kind for each in found.attempts] == ["stream", "int8", "jpeg"]
    with pytest.raises(RefusedError, match="cannot read any of stream, int8"):
        ask(Server(f"{edge.url}/v1"), alien, image, "What is it?", policy=Policy(kinds=("stream", "int8")))
    with pytest.raises(RefusedError, match="limit of 255 for a prompt") as refused:
        ask(Server(f"{edge.url}/v1"), device, image, "What? " * 400)
    assert len(refused.value.attempts) == 1, "no other form would help"


# What is refused ------------------------------------------------------------------------------------------------------


def sealed(frame, *, model=None, columns=None, change=lambda tile, payload: payload):
    """The frame with right checksums around other payloads."""
    parts = codec.parse(frame)
    payloads = [change(tile, payload) for tile, payload in enumerate(parts.payloads)]
    sizes = b"".join(varint(n) + varint(len(p)) for n, p in zip(parts.features, payloads, strict=True))
    made = (
        frame[:1]
        + (frame[1:5] if model is None else model)
        + varint(len(payloads))
        + varint(parts.columns if columns is None else columns)
        + sizes
    )
    crc = zlib.crc32(made)
    for payload in payloads:
        crc = zlib.crc32(payload, crc)
        made += payload + crc.to_bytes(4, "little")
    return made


def flipped(frame, place):
    return frame[:place] + bytes([frame[place] ^ 16]) + frame[place + 1 :]


def test_what_is_refused_and_how(door, device, frame, monkeypatch):
    """The table in docs/serving.md. Nothing is decoded where something is refused before."""
    server, decoded = door(limits=Limits(stream_bytes=4096, images=3)), []

    def decoding(*args, **options):
        decoded.append(1)
        return decode_image(*args, **options)

    monkeypatch.setattr(features, "decode_image", decoding)
    raw = device.stream(photo(0), codec.encode_raw)
    other = bytes(4).hex()
    for data in (sealed(frame, model=bytes(4)), sealed(raw, model=bytes(4))):
        told = error(post(server, frame, data), 409, "unknown_codec")
        known = device.tables.id if data[0] == frame[0] else device.tables.features_id
        assert told["accepted"] == [known] and other in told["message"]
        assert told["param"] == "messages[0].content[1].features"
    told = error(post(server, bytes([frame[0] + 1]) + frame[1:]), 409, "unknown_codec")
    assert told["accepted"] == [device.tables.id] and "version 2" in told["message"]
    error(post(server, frame + bytes(4097 - len(frame))), 413, "stream_too_large")
    error(server.chat([part(bytes(4097 * 2))]), 413, "stream_too_large")
    error(post(server, frame[:5] + varint(200) + bytes(300)), 413, "stream_too_large")
    for data, tiles in (
        (b"", []),
        (b"\0" * 9, []),
        (frame[:-1], []),
        (frame + b"\0", []),
        (flipped(frame, 5), []),
        (flipped(frame, len(frame) - 1), [6]),
        (flipped(raw, len(raw) - 9), [6]),
    ):
        told = error(post(server, data), 400, "corrupt_stream")
        assert told["retryable"] is True and told["tiles"] == tiles and bool(told["frame"]) == bool(tiles), told
    for data in (sealed(frame, columns=4), sealed(frame, columns=0), sealed(raw, change=lambda tile, p: p[:-1])):
        told = error(post(server, data), 400, "corrupt_stream")
        assert told["retryable"] is False, "the same bytes would be refused again"
    assert not decoded
    for data, tile in (
        (sealed(frame, change=lambda tile, p: p[:-1] if tile == 2 else p), 2),
        (sealed(raw, change=lambda tile, p: b"\xff\xff\xff\x7f" + p[4:] if tile == 3 else p), 3),
    ):
        told = error(post(server, data), 400, "corrupt_stream")
        assert (told["retryable"], told["tiles"], told["frame"]) == (False, [tile], None), told
    error(post(server, *[frame] * 4), 400, "too_many_images")
    told = metrics(server)
    assert told["streams_total", "unknown_codec"] == 3 and told["streams_total", "stream_too_large"] == 3
    assert text_of(post(server, raw, frame, frame)) and text_of(server.chat([part(frame)]))


def damaged(frame, *tiles):
    parts = codec.pieces(frame)
    return b"".join(flipped(part, -5) if tile in tiles else part for tile, part in enumerate(parts))


def again(frame, *tiles):
    return b"".join(codec.pieces(frame)[tile] for tile in tiles)


def resend_of(response):
    """What an error asks for."""
    told = error(response, 400, "corrupt_stream")
    assert told["retryable"] is True and told["frame"]
    return {"frame": told["frame"], "tiles": told["tiles"]}


@pytest.mark.parametrize("encode", [codec.encode, codec.encode_raw])
@pytest.mark.parametrize("tiles", [(2,), (0, 6), (0, 1, 2, 3, 4, 5)], ids=str)
def test_damaged_tiles_are_sent_again_alone(door, device, encode, tiles):
    server, frame = door(), device.stream(photo(3), encode)
    resend = resend_of(post(server, damaged(frame, *tiles)))
    assert resend["tiles"] == list(tiles)
    assert text_of(post(server, again(frame, *tiles), resend=resend)) and text_of(post(server, frame))
    (found, _), (expected, _) = server.engine.served
    np.testing.assert_array_equal(found.crops, expected.crops)
    np.testing.assert_array_equal(found.global_views, expected.global_views)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    told = metrics(server)
    assert told["streams_total", "corrupt_stream"] == told["streams_total", "cached"] == 1
    told = error(post(server, again(frame, *tiles), resend=resend), 409, "unknown_frame")
    assert told["retryable"] is True and told["param"] == "messages[0].content[0].features.resend.frame"
    assert metrics(server)["streams_total", "unknown_frame"] == 1


def test_damaged_tiles_are_sent_again_in_base64_and_for_all_rounds_of_pacore(door, frame):
    server = door()
    resend = resend_of(server.chat([part(damaged(frame, 1))]))
    features = {**part(again(frame, 1))["features"], "resend": resend}
    assert text_of(server.chat([{"type": "features", "features": features}]))
    resend = resend_of(post(server, damaged(frame, 1)))
    assert text_of(post(server, again(frame, 1), resend=resend, pacore={"schedule": [2, 2]}))
    assert len(server.engine.served) == 1 + 5
    first, *others = (example.crops for example, _ in server.engine.served)
    for crops in others:
        np.testing.assert_array_equal(crops, first)


def test_what_is_sent_again_is_checked_like_any_frame(door, device, frame, monkeypatch):
    server, other = door(limits=Limits(stream_bytes=4096)), device.stream(photo(8), codec.encode_raw)
    raw = device.stream(photo(0), codec.encode_raw)  # its tiles are as long as the other's
    monkeypatch.setattr(features, "decode_image", None)

    def offer(data, sent, *tiles):
        resend = resend_of(post(server, data))
        return post(server, sent, resend={**resend, "tiles": list(tiles) or resend["tiles"]})

    # Damaged once more: again, it is asked for.
    resend = resend_of(offer(damaged(frame, 1, 4), again(damaged(frame, 4), 1, 4)))
    assert resend["tiles"] == [4]
    # Of another frame: neither it nor the next fits.
    assert resend_of(offer(damaged(raw, 1), again(other, 1)))["tiles"] == [1, 2]
    assert resend_of(offer(damaged(raw, 6), again(other, 6)))["tiles"] == [6]
    # What does not fit at all.
    for sent, tiles in (
        (again(frame, 1), (2, 3)),
        (again(frame, 1)[:-1], (1,)),
        (b"", (1,)),
        (again(frame, 1) * 2, (1, 1)),
        (again(frame, 1), (-1,)),
        (again(frame, 6), (7,)),
        (bytes(4000), (1,)),
    ):
        told = error(offer(damaged(frame, 1), sent, *tiles), 400, "corrupt_stream")
        assert (told["retryable"], told["tiles"], told["frame"]) == (True, [], None), told
    # The header is the first tile's: what is sent with that is read, so it may be of another codec.
    assert error(offer(damaged(raw, 0), bytes([raw[0] + 1]) + again(raw, 0)[1:]), 409, "unknown_codec")
    # Requests that are none.
    for resend in ({}, {"frame": "x"}, {"tiles": [1]}, {"frame": 3, "tiles": [1]}, {"frame": "x", "tiles": [1.5]}, 3):
        response = post(server, b"123", resend=resend)
        assert response.status_code == 400 and ".features.resend" in response.json()["error"]["param"], response.text
    error(post(server, b"123", resend={"frame": "x", "tiles": list(range(10_000))}), 409, "unknown_frame")
    resend = resend_of(post(server, damaged(frame, 1)))
    told = error(post(server, again(frame, 1), again(frame, 1), resend=resend), 409, "unknown_frame")
    assert told["param"] == "messages[0].content[1].features.resend.frame"
    assert error(post(door(codec=None), b"123", resend=resend), 409, "unknown_frame")["retryable"] is True
    # A frame without a good tile is not kept.
    assert error(post(server, damaged(frame, *range(7))), 400, "corrupt_stream")["frame"] is None


def test_damaged_frames_are_kept_within_bounds(monkeypatch):
    kept = features._Damaged()
    names = [kept.keep(bytes(2**20)) for _ in range(9)]
    assert kept._size == 8 * 2**20 and kept.take(names[0]) is None and kept.take(names[8]) == bytes(2**20)
    names = [kept.keep(b"abc") for _ in range(300)]
    assert len(kept._frames) == 256 and kept._size == 3 * 256 and len({*names}) == 300
    assert kept.take(kept.keep(bytes(9 * 2**20))) is None and not kept._frames and not kept._size
    now = time.monotonic()
    old = [kept.keep(b"abc") for _ in range(2)]
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert kept.take(old[0]) is None
    new = kept.keep(b"def")
    assert [*kept._frames] == [new] and kept._size == 3 and kept.take("") is None


def test_bodies_that_do_not_hold_what_they_name_are_refused(door, frame):
    server = door()
    size = len(frame)
    for sizes, tail in (([size + 1], b""), ([-1], frame), ([True], b""), (["9"], b""), ([2**70], b""), ([1.0], b"")):
        told = error(post(server, frame, sizes=sizes, tail=tail), 400, "invalid_value")
        assert told["param"] == "messages[0].content[0].features.bytes"
    assert "3 bytes after" in error(post(server, frame, tail=b"abc"), 400, "extra_bytes")["message"]
    for value in (frame[:9].hex() + "!", "ab", "\u00e9" * 4):
        told = error(server.chat([{"type": "features", "features": {"data": value}}]), 400, "invalid_value")
        assert told["param"] == "messages[0].content[0].features.data"
    assert error(server.chat([{"type": "features", "features": {"bytes": 9}}]), 400, "unknown_parameter")
    assert error(server.chat([{"type": "features", "features": {"data": [1]}}]), 400, "invalid_value")
    for body in (
        b"",
        b"\n",
        b"{",
        b"\xff\n\xff",
        b'{"messages": 3}\n',
        b'{"messages": [{"content": [{"features": 1}]}]}',
    ):
        assert server.http.post("/v1/chat/completions", content=body, headers=STREAMS).status_code == 400, body
    assert server.http.post("/v1/completions", content=b'{"prompt": "x"}\nrest', headers=STREAMS).status_code == 400
    assert text_of(server.http.post("/v1/chat/completions", content=json.dumps(chat_body()), headers=STREAMS))


def test_a_server_without_a_codec_says_so(door, frame):
    text = TextProcessor(load_tokenizer("demo")._raw, chat_template="{{ messages[0].content }}")
    for server in (door(codec=None), door(codec=None, processor=text)):
        assert "send the image" in error(post(server, frame), 400, "features_not_supported")["message"]
        assert error(server.chat([part(frame)]), 400, "features_not_supported")


def test_no_body_is_kept_beyond_the_limit(door):
    server = door(limits=Limits(body_bytes=100_000))
    sent = []

    def endless():
        while len(sent) < 400:
            sent.append(1)
            yield bytes(50_000)

    assert server.http.post("/v1/chat/completions", content=bytes(100_001), headers=STREAMS).status_code == 413
    response = server.http.post("/v1/chat/completions", content=endless(), headers=STREAMS)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_every_truncation_and_every_flip_is_a_typed_error(door, device):
    """Of a frame of each kind; by the server's reader. No response would be other than those that the table has."""
    server = door()
    receiver = server.context.prompts._receiver
    tiles, columns = device.features(photo(1))
    for frame in (codec.encode(device.tables, tiles, columns=columns), codec.encode_raw(device.tables, tiles[-1:])):
        receiver.plan(frame, "here")
        for data in (*(frame[:end] for end in range(len(frame))), *(flipped(frame, i) for i in range(len(frame)))):
            with pytest.raises(ApiError) as refused:
                receiver.plan(data, "here")
            assert refused.value.code in ("corrupt_stream", "unknown_codec", "stream_too_large")
    rng = np.random.default_rng(0)
    for _ in range(200):  # mended checksums: it may decode, or not
        place = int(rng.integers(0, 1 << 20))
        data = sealed(frame, change=lambda _, p, place=place: flipped(p, place % len(p)))
        receiver.plan(data, "here")
        try:
            assert np.isfinite(receiver.image(data, "here").global_view_QZ).all()
        except ApiError as told:
            assert told.code == "corrupt_stream" and told.details["retryable"] is False


def test_decoded_streams_are_kept_within_the_limit(door, device):
    frames = [device.stream(photo(seed)) for seed in range(3)]
    size = 4 * 24 * (6 * 2 + 4)
    receiver = door(limits=Limits(stream_cache_bytes=2 * size)).context.prompts._receiver
    images = [receiver.image(frame, "") for frame in frames]
    assert receiver.image(frames[1], "") is images[1] and receiver.image(frames[2], "") is images[2]
    assert receiver._size == 2 * size and receiver.image(frames[0], "") is not images[0]
    assert receiver.data(Features(data=frames[0]), "") is frames[0]


# The device's policy, against a server that refuses in every way ---------------------------------------------------


ANSWER = {"choices": [{"message": {"content": "a cat"}}]}


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers the next reply of a script: a status with a JSON body and headers, or a function of the handler."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        line, _, rest = body.partition(b"\n")
        [first] = [item for item in json.loads(line)["messages"][0]["content"] if item["type"] != "text"]
        resend = first.get("features", {}).get("resend")
        kind = "jpeg" if first["type"] == "image_url" else "int8" if rest[0] & 8 else "stream"
        self.server.asked.append(kind if resend is None else f"tiles {resend['tiles']} of {resend['frame']}")
        reply = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if callable(reply):
            reply(self)
            return
        status, fields, *headers = reply
        data = json.dumps(fields).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers[0] if headers else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_): ...


@pytest.fixture
def scripted():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.daemon_threads, server.asked = True, []
        server.handle_error = lambda *_: None  # the device hangs up
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def refusal(status, code, **details):
    return status, {"error": {"message": f"because of {code}", "code": code, **details}}


DAMAGED = refusal(400, "corrupt_stream", retryable=True, tiles=[], frame=None)
UNREADABLE = refusal(400, "corrupt_stream", retryable=False, tiles=[1], frame=None)
TILES = refusal(400, "corrupt_stream", retryable=True, tiles=[1, 3], frame="abc")
BUSY = (429, {"error": {"message": "busy", "code": "server_busy"}}, {"retry-after": "0"})
OK = (200, ANSWER)


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ([OK], ["stream"]),
        ([DAMAGED, OK], ["stream", "stream"]),
        ([DAMAGED, DAMAGED, DAMAGED, OK], ["stream", "stream", "stream", "int8"]),
        ([UNREADABLE, OK], ["stream", "int8"]),
        ([refusal(409, "unknown_codec", accepted=["00000000"]), OK], ["stream", "int8"]),
        ([refusal(409, "unknown_codec"), refusal(409, "unknown_codec"), OK], ["stream", "int8", "jpeg"]),
        ([refusal(413, "stream_too_large"), refusal(413, "stream_too_large"), OK], ["stream", "int8", "jpeg"]),
        ([refusal(400, "features_not_supported")] * 2 + [OK], ["stream", "int8", "jpeg"]),
        ([refusal(415, "unsupported_media_type")] * 2 + [OK], ["stream", "int8", "jpeg"]),
        ([(422, {"detail": "what?"}), (400, {"object": "error", "code": 400}), OK], ["stream", "int8", "jpeg"]),
        ([BUSY, OK], ["stream", "stream"]),
        ([TILES, OK], ["stream", "tiles [1, 3] of abc"]),
        ([TILES, BUSY, OK], ["stream", "tiles [1, 3] of abc", "stream"]),
        ([TILES, refusal(409, "unknown_frame", retryable=True), OK], ["stream", "tiles [1, 3] of abc", "stream"]),
        ([UNREADABLE, TILES, OK], ["stream", "int8", "tiles [1, 3] of abc"]),
        ([lambda handler: handler.connection.close(), OK], ["stream", "stream"]),
    ],
)
def test_the_next_kind_follows_from_the_error(scripted, device, script, kinds):
    scripted.script = list(script)
    answer = ask(Server(f"http://127.0.0.1:{scripted.server_port}/v1/"), device, photo(0), "What?", max_tokens=3)
    assert answer.text == "a cat" and scripted.asked == kinds
    attempts = [f"tiles {[*each.tiles]} of abc" if each.tiles else each.kind for each in answer.attempts]
    assert (
        attempts == kinds
        and answer.kind == answer.attempts[-1].kind
        and answer.attempts[-1].sent > 0
        and answer.encode_ms > 0
    )
    assert all(each.reason for each in answer.attempts[:-1])


def lossy(monkeypatch, *changes):
    """Changes the bodies of the first requests of a device."""
    left, post = list(changes), client.Server.post

    def lost(self, media_type, body, seconds):
        return post(self, media_type, left.pop(0)(body) if left else body, seconds)

    monkeypatch.setattr(client.Server, "post", lost)


def test_a_device_sends_only_damaged_tiles_again(edge, device, monkeypatch):
    """Once and twice; whole, where the server has forgotten the frame."""
    server, image = Server(f"{edge.url}/v1"), photo(40)
    expected = ask(server, device, image, "What is it?", **SAMPLING)
    stream = device.stream(image)
    head = expected.attempts[0].sent - len(stream)

    def hit(*tiles):
        return lambda body: body[:head] + damaged(body[head:], *tiles)

    lossy(monkeypatch, hit(2, 5), lambda body: flipped(body, len(body) - 5))
    found = ask(server, device, image, "What is it?", **SAMPLING)
    assert found.text == expected.text and found.kind == "stream"
    assert [each.form for each in found.attempts] == ["stream", "tiles 2, 5 of stream", "tiles 5 of stream"]
    assert [each.reason for each in found.attempts] == ["corrupt_stream", "corrupt_stream", ""]
    for each in found.attempts[1:]:
        assert head < each.sent - len(again(stream, *each.tiles)) < head + 60, "the question, the frame and the tiles"

    def forgetting(body):
        edge.context.prompts._receiver._damaged._frames.clear()
        return body

    lossy(monkeypatch, hit(0), forgetting)
    found = ask(server, device, image, "What is it?", **SAMPLING)
    assert found.text == expected.text
    assert [each.form for each in found.attempts] == ["stream", "tiles 0 of stream", "stream"]
    assert [each.reason for each in found.attempts] == ["corrupt_stream", "unknown_frame", ""]
    # A header that is damaged in a length, then elsewhere: the first tile's checksum covers it.
    lossy(monkeypatch, lambda body: flipped(body, head + 5), lambda body: flipped(body, head + 6))
    found = ask(server, device, image, "What is it?", **SAMPLING)
    assert [each.form for each in found.attempts] == ["stream", "stream", "tiles 0 of stream"]
    assert found.text == expected.text


@pytest.mark.parametrize(
    "asking",
    [
        {"tiles": [7], "frame": "a"},
        {"tiles": [-1], "frame": "a"},
        {"tiles": ["1"], "frame": "a"},
        {"tiles": [True], "frame": "a"},
        {"tiles": [1] * 8, "frame": "a"},
        {"tiles": 1, "frame": "a"},
        {"tiles": [1], "frame": 1},
        {"tiles": [1], "frame": "a" * 65},
    ],
    ids=str,
)
def test_a_server_that_asks_for_no_tiles_of_the_frame_gets_it_whole(scripted, device, asking):
    scripted.script = [refusal(400, "corrupt_stream", retryable=True, **asking), OK]
    ask(Server(f"http://127.0.0.1:{scripted.server_port}/v1"), device, photo(0), "What?")
    assert scripted.asked == ["stream", "stream"]


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (refusal(401, "invalid_api_key"), 1),
        (refusal(404, "model_not_found"), 1),
        (refusal(400, "context_length_exceeded"), 1),
        (refusal(400, "invalid_value"), 1),
        (refusal(409, "unknown_codec"), 3),
        (DAMAGED, 9),
        ((200, {"choices": []}), 1),
        ((200, ["?"]), 1),
    ],
)
def test_a_refusal_is_typed_and_tells_what_was_tried(scripted, device, reply, count):
    scripted.script = [reply]
    with pytest.raises(RefusedError) as refused:
        ask(Server(f"http://127.0.0.1:{scripted.server_port}/v1"), device, photo(0), "What?")
    assert len(refused.value.attempts) == len(scripted.asked) == count


def trickling(handler):
    for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n" + b"x: y\r\n" * 50:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def flooding(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(80):
        handler.wfile.write(bytes(2**16))


@pytest.mark.parametrize("reply", [lambda handler: time.sleep(3), trickling, flooding, (503, {}), (500, {"error": 1})])
def test_a_server_that_does_not_answer_keeps_no_device_waiting(scripted, device, reply, monkeypatch):
    monkeypatch.setattr(client, "_PAUSE", 0.01)
    scripted.script = [reply]
    device.features(photo(0))
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="no answer in [12] attempts"):
        server = Server(f"http://127.0.0.1:{scripted.server_port}/v1")
        ask(server, device, photo(0), "What?", policy=Policy(seconds=1.0, resends=1))
    assert time.monotonic() - began < 5


def closing(handler):
    handler.close_connection = True


def test_a_connection_stays_open_and_one_that_was_closed_is_made_again(scripted, device, monkeypatch):
    monkeypatch.setattr(Scripted, "protocol_version", "HTTP/1.1")
    connected = []
    monkeypatch.setattr(Scripted, "setup", lambda self, setup=Scripted.setup: (connected.append(1), setup(self))[1])
    scripted.script = [OK, OK, closing, OK, (200, ANSWER, {"connection": "close"}), OK]
    with Server(f"http://127.0.0.1:{scripted.server_port}/v1") as server:
        for connections, attempts in ((1, 1), (1, 1), (2, 1), (2, 1), (3, 1)):
            answer = ask(server, device, photo(0), "What?")
            assert (len(connected), len(answer.attempts)) == (connections, attempts)
    assert scripted.asked == ["stream"] * 6, "the third question was asked twice, for the connection was closed"


def test_the_question_can_come_before_the_image(scripted, device, monkeypatch):
    scripted.script, bodies = [UNREADABLE, OK, OK], []
    lossy(monkeypatch, *[lambda body: (bodies.append(body), body)[1]] * 3)
    for first in (True, False):
        ask(Server(f"http://127.0.0.1:{scripted.server_port}/v1"), device, photo(0), "What?", prompt_first=first)
    contents = [json.loads(body.partition(b"\n")[0])["messages"][0]["content"] for body in bodies]
    assert [[part["type"] for part in content] for content in contents] == [["text", "features"]] * 2 + [
        ["features", "text"]
    ]


def test_addresses_and_policies_that_cannot_be_used(device):
    for url in ("127.0.0.1:8000", "ftp://a/v1", "http://me@a/v1", "http:///v1", "http://a:99999/v1"):
        with pytest.raises(ValueError, match="URL"):
            Server(url)
    for fields in ({"kinds": ()}, {"resends": -1}, {"seconds": 0.0}, {"jpeg_quality": 0}):
        with pytest.raises(ValueError, match="policy"):
            Policy(**fields)
    with pytest.raises(UnreachableError, match="refused"):  # nobody listens there
        ask(Server("http://127.0.0.1:9/v1"), device, photo(0), "What?", policy=Policy(resends=0))
    broken = Device(device.model, tiny.images, device.tables)
    broken.features = lambda image: ([np.full((4, 24), np.nan)], 0)
    with pytest.raises(UnreachableError) as failed:
        ask(Server("http://127.0.0.1:9/v1"), broken, photo(0), "What?", policy=Policy(resends=0))
    assert [each.kind for each in failed.value.attempts] == ["stream", "int8", "jpeg"]


def test_the_command_asks_and_says_what_it_cost(edge, model, device, tmp_path, capsys):
    """With a device's own files; its program gives the features that the model does."""
    images = dataclasses.asdict(tiny.images)
    del images["most_tokens"]
    parameters = {name: np.asarray(leaf[...]) for name, leaf in named_leaves(model).items() if _OF_DEVICE.match(name)}
    programs = device_programs(dataclasses.replace(tiny, model=model.config))
    device.tables.save(tmp_path / CODEC)
    (tmp_path / DEVICE).write_bytes(pack(parameters, programs, images, device.tables))
    photo(5).save(tmp_path / "a.png")
    for ours, theirs in zip(files.Device(tmp_path).features(photo(5))[0], device.features(photo(5))[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    words = ["tofc", "ask", f"{edge.url}/v1", str(tmp_path), str(tmp_path / "a.png"), "--prompt", "What is it?"]
    assert main([*words, "--max-tokens", "6", "--thinking", "False"]) == 0
    told = capsys.readouterr()
    assert told.out.strip() and re.search(r"stream: \d+ bytes sent; encoded in [\d.]+ ms, sent in", told.err), told
    assert main([*words, "--kinds", "jpeg", "--jpeg-quality", "20", "--max-tokens", "999"]) == 1
    assert "999" in capsys.readouterr().err
