"""Pictures of requests: which one is refused and why, and what those do that were made to do harm."""

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image
from running_server import picture, running

from stepjax.interop.text_processor import TextProcessor
from stepjax.processing.tokenizer import load_tokenizer
from stepjax.serving import images


def error(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def animation():
    frames = [Image.new("RGB", (60, 40), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def cut_short():
    file = io.BytesIO()
    Image.effect_noise((60, 40), 50).save(file, "PNG")
    return file.getvalue()[:500]


def uri(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def beside_text(url, **fields):
    return [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}, **fields}]


@pytest.mark.parametrize(
    ("url", "fields", "reason"),
    [
        (uri(b"hello"), {}, "not an image in a known format"),
        (uri(b"qoif" + bytes(100)), {}, "not an image in a known format"),
        (uri(cut_short()), {}, "cannot be read"),
        (uri(animation()), {}, 'it has several frames or pages; add "frame": 0 to the image'),
        (uri(animation()), {"frame": 2}, "there is no frame 2"),
        (picture(), {"frame": 1}, "there is no frame 1"),
        ("http://127.0.0.1/a.png", {}, "its host has a non-public address"),
    ],
)
def test_an_image_that_is_refused_is_named_by_its_place(start, url, fields, reason):
    server = start(allow_remote_images=True)
    told = error(server.chat(beside_text(url, **fields)), 400)
    assert "messages[0].content[1]" in told["message"] and reason in told["message"], told
    assert told["code"] in ("invalid_image", "image_not_fetched") and told["param"].startswith("messages")
    assert server.chat(beside_text(uri(animation()), frame=0)).status_code == 200


def test_a_frame_is_chosen(server):
    for frame, color in enumerate([(255, 0, 0), (0, 0, 255)]):
        assert server.chat(beside_text(uri(animation()), frame=frame)).status_code == 200
        config = server.context.processor.image_config
        expected = (np.asarray(color) / 255 - config.mean) / config.std
        pixels = server.engine.served[-1][0].global_views[0].reshape(-1, 3)
        np.testing.assert_allclose(pixels.mean(0), expected, atol=1e-4)
    views = server.http.post("/stepjax/views", json={"image": uri(animation()), "frame": 1})
    assert views.status_code == 200
    error(server.chat(beside_text(picture(), frame=-1)), 400)


def endless():
    """A JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "JPEG", progressive=True)
    scans, last = file.getvalue()[:-2], file.getvalue().rfind(b"\xff\xda")
    return scans + scans[last:] * 3000


def test_images_that_take_for_ever_keep_no_text_waiting(start, monkeypatch):
    monkeypatch.setattr(images, "SECONDS", 0.5)
    server = start()
    server.chat(beside_text(picture()))  # its process is there
    data = uri(endless())
    with ThreadPoolExecutor(3) as pool:
        bad = [pool.submit(server.chat, beside_text(data)) for _ in range(3)]
        time.sleep(0.2)
        for _ in range(10):
            assert server.chat().status_code == 200
        assert not any(answer.done() for answer in bad)
        for answer in bad:
            assert "takes more than 0.5 seconds" in error(answer.result(), 400)["message"]
    assert server.chat(beside_text(picture())).status_code == 200


def test_images_that_take_all_memory_are_refused(start):
    """A WebP of 130 million pixels in 50 bytes; and a JPEG 2000 whose stream is larger than its header says."""
    server = start()
    file = io.BytesIO()
    Image.new("L", (1000, 1000)).save(file, "JPEG2000")
    lying = bytearray(file.getvalue())
    at = lying.find(b"ihdr")
    lying[at + 4 : at + 12] = (16).to_bytes(4) * 2
    large = b"RIFF" + (42).to_bytes(4, "little") + b"WEBPVP8X" + (10).to_bytes(4, "little")
    large += b"\x02\x00\x00\x00" + (16382).to_bytes(3, "little") + (7999).to_bytes(3, "little")
    for data in (lying, large):
        assert "messages[0].content[1]" in error(server.chat(beside_text(uri(data))), 400)["message"]


def test_a_template_that_fails_is_the_requests_fault_and_named():
    for template, reason in (
        ("{{ 1 / 0 }}", "the chat template 'default' cannot render: line 1: ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "the chat template 'default' refuses the conversation: no"),
        ("{{ messages[0].content * 10 ** 9 }}", "the chat template 'default' takes more than 512 MiB of memory"),
    ):
        text = TextProcessor(load_tokenizer("demo")._raw, chat_template=template)
        with running(text, FakeEngine()) as server:
            assert error(server.chat(), 400)["message"].startswith(reason)
