"""Images that devices have coded: answers, batches and caches of a server with a codec, and what it refuses.

The codec is that of a model with random parameters, fitted to noise: frames are real, only not small.
"""

import base64
import io
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from coded_images import CONFIG, SAMPLING, STREAMS, again, damaged, flipped, part, photo, post, text_of
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from running_server import chat_body, running
from tiny_tofc import config as tiny

from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.interop.text_processor import TextProcessor
from stepjax.processing.tokenizer import load_tokenizer
from stepjax.serving import features
from stepjax.serving.errors import ApiError
from stepjax.serving.schemas import Features
from stepjax.serving.settings import Limits
from stepjax.tofc import codec
from stepjax.tofc.codec import decode_image
from stepjax.tofc.range_coder import varint


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


def test_the_answer_is_that_of_the_decoded_features(edge, coded_model, coded_processor, device, frame):
    """Fed to an engine directly; by a binary body, base64 and raw features that decode to the same."""
    question = [{"type": "image", "image": frame}, {"type": "text", "text": "What is it?"}]

    def received(data, **_):
        return decode_image(device.tables, data, tiny.images)

    options = {"open_image": received, "enable_thinking": False}
    example = coded_processor.process_prompt([{"role": "user", "content": question}], **options)
    assert [view.shape for view in (*example.crops, *example.global_views)] == [(2, 24)] * 6 + [(4, 24)]
    ((direct,),) = Engine(coded_model, coded_processor, CONFIG).generate(
        [example], SamplingParams(**SAMPLING, logprobs=0)
    )
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


def test_coded_and_other_images_stand_in_one_conversation(edge, coded_model, coded_processor, device, frame):
    """In both orders. The engine makes of an image file what would arrive from a device."""
    other, png = photo(1, (90, 90)), io.BytesIO()
    other.save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    file = {"type": "image_url", "image_url": {"url": url}}
    frames = {"coded": frame, "file": device.stream(other)}
    seen = {name: decode_image(device.tables, each, tiny.images) for name, each in frames.items()}
    options = {"enable_thinking": False, "open_image": lambda image, **_: seen[image]}
    engine = Engine(coded_model, coded_processor, CONFIG)
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
