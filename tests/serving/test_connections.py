"""Clients that open connections and say little or nothing: what they may hold while others are answered."""

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from running_server import chat_body, serving_process, wait_for

from stepjax.errors import ConfigError
from stepjax.serving.server import RESERVED_FILES, OncePerMinute, affordable
from stepjax.serving.settings import Limits

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SOON = 4  # seconds: a tenth of one, on a machine that has nothing else to do
NO_BODY = HEAD + b"content-length: 5000\r\n\r\n"


@contextlib.contextmanager
def clients(port, count, data=b""):
    """So many connections that have sent the same."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(count)]
        for each in made:
            with contextlib.suppress(OSError):  # it is closed already
                each.sendall(data)
        yield made


def status(client):
    """Of the answer; None where the connection is closed without one."""
    with contextlib.suppress(ConnectionError):
        data = client.recv(4096)
        return int(data.split()[1]) if data else None


def seconds_of_a_chat(server):
    start = time.monotonic()
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as fresh:
        assert fresh.post("/v1/chat/completions", json=chat_body(max_tokens=3)).status_code == 200
    return time.monotonic() - start


def open_files():
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("data", [b"", b"GET / HTT", HEAD], ids=["nothing", "half a line", "no end"])
def test_connections_without_a_request_shut_nobody_out(start, data):
    server = start(limits=Limits(connections=100))
    before = open_files()
    with clients(server.port, 500, data) as opened:
        assert seconds_of_a_chat(server) < SOON
        assert len(server.server.server_state.connections) <= 100
        assert status(opened[0]) is None, "the first had to make room"
    server.wait_until(lambda: open_files() <= before)


def test_a_head_that_drips_gets_no_more_time(start):
    server = start(limits=Limits(head_seconds=0.6))
    answered = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for first in (b"", answered):
        with clients(server.port, 1, first) as (client,):
            if first:
                assert status(client) == 200
            begin = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - begin < 10:
                    client.sendall(b"G")
                    time.sleep(0.1)
            assert 0.5 < time.monotonic() - begin < 4


def test_a_connection_is_used_again_within_its_time(start):
    server = start(limits=Limits(head_seconds=1.5))
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with clients(server.port, 1) as (client,):
        for _ in range(3):
            client.sendall(ask)
            time.sleep(0.6)
            assert client.recv(10_000).count(b"200 OK") == 1
        client.sendall(ask * 3)
        time.sleep(0.4)
        assert client.recv(10_000).count(b"200 OK") == 3
        assert status(client) is None


def test_long_answers_outlast_the_time_for_heads(start):
    server = start(FakeEngine(step_seconds=0.1), limits=Limits(head_seconds=0.3))
    assert server.chat().status_code == 200  # 0.9 seconds


def test_an_answer_that_nobody_reads_is_given_up(start):
    server = start(FakeEngine(lambda *_: ["</think>", "x" * 2**23]), limits=Limits(head_seconds=0.3, write_seconds=0.5))
    body = json.dumps(chat_body()).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        server.wait_until(lambda: server.server.server_state.total_requests == 1)
        server.wait_until(lambda: not server.server.server_state.connections, seconds=8)


def test_a_connection_over_the_limit_gets_503(start):
    server = start(FakeEngine(lambda *_: ["</think>"] + ["x"] * 10_000), limits=Limits(connections=8))
    body = json.dumps(chat_body(stream=True)).encode()
    with clients(server.port, 8, HEAD + b"content-length: %d\r\n\r\n" % len(body) + body):
        server.wait_until(lambda: len(server.engine.requests) == 8)
        refused = server.http.get("/health")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "server_busy"
    server.wait_until(lambda: not server.engine.requests)
    assert server.http.get("/health").status_code == 200


def test_heads_are_bounded_however_they_come(start):
    server = start()
    for line in (b"a:\r\n", b"a: " + b"x" * 300_000):
        with clients(server.port, 1, b"GET /health HTTP/1.1\r\n" + line * 60_000 if len(line) < 9 else line) as (
            client,
        ):
            assert status(client) in (400, None)
    assert seconds_of_a_chat(server) < SOON


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_bodies_that_never_come_take_no_places(start):
    server = start(limits=Limits(requests=2))
    with clients(server.port, 300, NO_BODY + b"{") as opened:
        arriving = server.context.bodies.arriving
        server.wait_until(lambda: len(arriving) == 64)
        assert server.context.admission.count == 0
        assert seconds_of_a_chat(server) < SOON
        assert len(arriving) < 64
        assert status(opened[0]) == 408, "the slowest made room"
    server.wait_until(lambda: not arriving)


def test_the_slowest_body_gives_way(start):
    server = start(limits=Limits(requests=2))
    body = json.dumps(chat_body("x" * 200_000)).encode()
    arriving = server.context.bodies.arriving
    with contextlib.ExitStack() as stack:
        stack.enter_context(clients(server.port, 64, NO_BODY))
        server.wait_until(lambda: len(arriving) == 64)
        time.sleep(0.2)
        part = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body[:150_000]
        (honest,) = stack.enter_context(clients(server.port, 1, part))
        for _ in range(3):
            time.sleep(0.1)
            stack.enter_context(clients(server.port, 40, NO_BODY))
        honest.sendall(body[150_000:])
        assert status(honest) in (200, 400)  # 400: longer than the context


def test_clients_without_a_key_hold_nothing(start):
    server = start(api_keys=("key",), limits=Limits(requests=2))
    with clients(server.port, 100, NO_BODY) as opened:
        assert {status(each) for each in opened} == {401}
        assert not server.context.bodies.arriving and server.context.admission.count == 0


# Open files and lines of the log --------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, resource, signal, sys

sys.path.insert(0, {folder!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from fake_engine import FakeEngine
from stepjax.config import ImageConfig, TokenizerConfig
from stepjax.processing.processor import Processor
from stepjax.serving.app import make_app
from stepjax.serving.server import bind, serve, start_log
from stepjax.serving.settings import ServerSettings

start_log()
open_files = []
signal.signal(signal.SIGUSR1, lambda *_: open_files.extend(open("/dev/null") for _ in range(160)))

async def main():
    settings = ServerSettings(model_name="m", drain_seconds=1)
    app = make_app(FakeEngine(), Processor.from_config(ImageConfig(), TokenizerConfig()), settings)
    await serve(app, bind("127.0.0.1", {port}))

asyncio.run(main())
"""


def test_open_files_are_not_exhausted_and_the_log_stays_small(tmp_path):
    """Neither by many connections, nor where others take the reserve."""
    log = tmp_path / "log"

    def program(port):
        return ["-c", PROGRAM.format(folder=str(Path(__file__).parent), port=port)]

    with log.open("wb") as file, serving_process(program, stderr=file) as (process, client):
        port = client.base_url.port

        def health():
            return httpx.get(f"{client.base_url}/health", trust_env=False, timeout=20).status_code

        wait_for(client, process)
        for others in (False, True):
            if others:
                process.send_signal(signal.SIGUSR1)
            with clients(port, 400), clients(port, 50, b"nonsense\r\n\r\n"):
                if not others:
                    begin = time.monotonic()
                    assert health() == 200
                    assert time.monotonic() - begin < SOON
                time.sleep(1)
            assert health() == 200
            assert ("out of system resource" in log.read_text()) == others
    text = log.read_text()
    assert len(text) < 10_000, text[:3000]
    assert "the limit on open files is 300" in text and text.count("Invalid HTTP request") <= 1
    assert text.count("out of system resource") == 1


@pytest.mark.parametrize(
    "limits, wanted, expected",
    [((1024, 4096), 1000, 1000), ((300, 300), 1000, None), ((100, 100), 1000, ConfigError)],
    ids=["raised", "fewer", "too few"],
)
def test_connections_follow_the_limit_on_open_files(monkeypatch, limits, wanted, expected):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: raised.append(new))
    if expected is ConfigError:
        with pytest.raises(ConfigError, match="open files is 100: raise it"):
            affordable(wanted)
        return
    most = affordable(wanted)
    room = RESERVED_FILES
    assert most == wanted and raised[0][0] >= wanted + room if expected else 8 <= most < limits[0] - room


def test_the_log_has_one_line_a_kind_and_minute(caplog):
    now, lines = [0.0], []
    limit = OncePerMinute(lambda: now[0])
    log = logging.getLogger("test.logs")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    handler.addFilter(limit)
    log.addHandler(handler)
    try:
        for second in range(0, 130, 10):
            now[0] = second
            for i in range(50):
                log.warning("no. %d", i)
                log.info("told")
                for kind in (ValueError, KeyError):
                    try:
                        raise kind(i)
                    except kind:
                        log.exception("failed")
    finally:
        log.removeHandler(handler)
    assert lines.count("told") == 0 or lines.count("told") == 13 * 50  # by the level of the logger
    told = [line for line in lines if line != "told"]
    assert sorted(told) == sorted(
        ["no. 0", "failed", "failed"]
        + 2 * ["no. 0 (299 more since the last one)", *2 * ["failed (299 more since the last one)"]]
    )
