"""Many clients, clients that leave, clients that do not read, and the end of the server."""

import asyncio
import gc
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from running_server import ask_many, chat_body, picture, running, serving_process, wait_for

from stepjax.serving.settings import Limits


def long_answer(*_):
    return ["</think>", *["word "] * 500]


def endless(*_):
    return ["</think>", *["many words, " * 1000] * 20_000]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_two_hundred_at_once_and_memory_is_flat(start):
    server = start(FakeEngine(step_seconds=0.002))
    sizes = []
    for _ in range(3):
        answers = asyncio.run(ask_many(server, 200))
        assert answers == [(200, "Hello, world 0!")] * 200
        gc.collect()
        sizes.append(resident_bytes())
    server.wait_until(lambda: server.context.admission.count == 0)
    assert not server.engine.requests and not server.engine.cancelled
    assert sizes[2] - sizes[0] < 16 * 2**20, sizes


def test_a_client_that_leaves_cancels_its_request(start):
    server = start(FakeEngine(endless, step_seconds=0.005))
    for body in (chat_body(stream=True), chat_body(), {"prompt": ["a", "b"], "max_tokens": 9999}):
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        data = json.dumps({**body, "max_tokens": 3000}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head.encode() + data)
        server.wait_until(lambda: server.engine.requests)
        connection.close()
        server.wait_until(lambda: not server.engine.requests, seconds=2)
    assert len(server.engine.cancelled) == 4
    server.wait_until(lambda: server.context.admission.count == 0)
    assert "stepjax_disconnects_total 3.0" in server.http.get("/metrics").text


def test_a_slow_reader_holds_up_nobody_and_is_cut_off(start):
    server = start(FakeEngine(endless), limits=Limits(write_seconds=1.5))
    data = json.dumps(chat_body(stream=True)).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(data)}\r\n\r\n".encode()
            + data
        )
        server.wait_until(lambda: server.engine.requests)
        time.sleep(0.5)
        start_time = time.monotonic()
        quick = server.chat(max_tokens=5)
        assert quick.status_code == 200 and time.monotonic() - start_time < 0.5
        assert server.engine.requests, "the slow reader is still waited for"
        server.wait_until(lambda: not server.engine.requests, seconds=5)
    assert len(server.engine.cancelled) == 1


def test_at_most_a_few_deltas_wait_for_a_slow_reader(start):
    server = start(FakeEngine(endless))
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        reader = response.iter_lines()
        next(reader)
        server.wait_until(lambda: next(iter(server.engine.requests.values())).deltas.qsize() > 200)
        # The rest waits in the engine, where it is bounded by max_tokens.
    server.wait_until(lambda: not server.engine.requests)


def test_shutdown_lets_streams_end(processor):
    with running(processor, FakeEngine(long_answer, step_seconds=0.0005), drain_seconds=20) as server:
        lines, other = [], httpx.Client(base_url=server.url, trust_env=False)
        other.get("/health")
        with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
            reader = response.iter_lines()
            next(reader)
            server.server.handle_exit(signal.SIGTERM, None)
            server.wait_until(lambda: server.context.admission.is_draining)
            assert other.get("/health").status_code == 503
            refused = other.post("/v1/chat/completions", json=chat_body())
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            lines = [line for line in reader if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 100
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_shutdown_cancels_what_takes_too_long(processor):
    with running(processor, FakeEngine(endless, step_seconds=0.01), drain_seconds=0.3) as server:
        whole = {}
        asking = threading.Thread(target=lambda: whole.update(answer=server.chat(max_tokens=3000)))
        asking.start()
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=chat_body(stream=True), timeout=30
        ) as response:
            reader = response.iter_lines()
            next(reader)
            server.wait_until(lambda: len(server.engine.requests) == 2)
            server.server.handle_exit(signal.SIGTERM, None)
            lines = [line for line in reader if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        asking.join(5)
        assert whole["answer"].status_code == 503
        server.thread.join(5)
        assert not server.thread.is_alive() and len(server.engine.cancelled) == 2


PROGRAM = """
import asyncio, sys

sys.path.insert(0, {folder!r})
from fake_engine import FakeEngine
from stepjax.config import ImageConfig, TokenizerConfig
from stepjax.processing.processor import Processor
from stepjax.serving.app import make_app
from stepjax.serving.server import bind, serve
from stepjax.serving.settings import ServerSettings

async def main():
    engine = FakeEngine(lambda *_: ["</think>"] + ["w "] * 300, step_seconds=0.002)
    app = make_app(engine, Processor.from_config(ImageConfig(), TokenizerConfig()), ServerSettings(model_name="m"))
    await serve(app, bind("127.0.0.1", {port}))

asyncio.run(main())
"""


def test_a_process_ends_in_order_at_ctrl_c():
    """At SIGTERM, too: see the tests of the commands."""
    folder = str(Path(__file__).parent)
    with serving_process(lambda port: ["-c", PROGRAM.format(folder=folder, port=port)]) as (started, client):
        wait_for(client)
        with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
            reader = response.iter_lines()
            next(reader)
            started.send_signal(signal.SIGINT)
            lines = [line for line in reader if line]
        assert lines[-1] == "data: [DONE]"
        assert started.wait(10) == 0


def test_images_of_many_requests_are_given_back(start):
    server = start()
    content = [{"type": "image_url", "image_url": {"url": picture(112, 112)}}, {"type": "text", "text": "what?"}]
    before = None
    for round_ in range(3):
        for _ in range(30):
            assert server.chat(content).status_code == 200
        server.engine.served.clear()
        gc.collect()
        if round_ == 0:
            before = resident_bytes()
    assert before is not None and resident_bytes() - before < 16 * 2**20
    assert server.context.prompts.view_budget.free == server.context.prompts.view_budget.total
