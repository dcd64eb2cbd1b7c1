"""A device that asks a server about coded images: what it sends, by the server's errors, and over which connection."""

import dataclasses
import http.server
import json
import re
import threading
import time

import numpy as np
import pytest
from coded_images import ORIGIN, SAMPLING, Device, again, damaged, flipped, photo, post, text_of
from tiny_tofc import config as tiny

from stepjax.cli import main
from stepjax.errors import RefusedError, UnreachableError
from stepjax.interop.codec_files import _OF_DEVICE, device_programs
from stepjax.sharding import named_leaves
from stepjax.tofc import client, codec
from stepjax.tofc import device as files
from stepjax.tofc.client import Policy, Server, ask
from stepjax.tofc.device import CODEC, DEVICE, pack
from stepjax.tofc.tables import Tables


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


def test_the_command_asks_and_says_what_it_cost(edge, coded_model, device, tmp_path, capsys):
    """With a device's own files; its program gives the features that the model does."""
    images = dataclasses.asdict(tiny.images)
    del images["most_tokens"]
    parameters = {
        name: np.asarray(leaf[...]) for name, leaf in named_leaves(coded_model).items() if _OF_DEVICE.match(name)
    }
    programs = device_programs(dataclasses.replace(tiny, model=coded_model.config))
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
