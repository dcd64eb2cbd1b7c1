"""Who is let in, and what is too much."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fake_engine import FakeEngine
from running_server import chat_body, picture

from stepjax.serving.settings import Limits


def error(response, status):
    assert response.status_code == status, response.text
    fields = response.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"} and fields["message"]
    return fields


@pytest.mark.parametrize(
    "body, part",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"messages": [}', "line 1, column"),
        (b"[]", "a JSON list"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_bodies_that_are_not_json_objects_are_refused(server, body, part):
    response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert part in error(response, 400)["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "value", ["[" + "1," * 2_000_000 + '"x"]', "[" + '"x",' * 1_000_000 + "1]", "[" + "{}," * 500_000 + "1]"]
)
def test_a_million_mistakes_take_no_time(server, path, value):
    field = "messages" if "chat" in path else "prompt"
    start = time.monotonic()
    response = server.http.post(
        path, content=f'{{"{field}": {value}}}'.encode(), headers={"content-type": "application/json"}
    )
    assert len(error(response, 400)["message"]) < 1000
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("depth, status", [(60, 200), (65, 400), (300, 400), (900, 400)])
def test_tools_nested_too_deep_are_refused(server, depth, status):
    deep = '{"a":' * depth + "1" + "}" * depth
    body = '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": '
    body += f'{{"name": "f", "parameters": {deep}}}}}]}}'
    response = server.http.post(
        "/v1/chat/completions", content=body.encode(), headers={"content-type": "application/json"}
    )
    assert response.status_code == status, response.text


def test_other_paths_methods_and_types_are_refused(server):
    assert "/v1/chat/completions" in error(server.http.get("/v1/nothing"), 404)["message"]
    assert "GET" in error(server.http.get("/v1/chat/completions"), 405)["message"]
    error(server.http.post("/v1/models"), 405)
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}):
        error(server.http.post("/v1/chat/completions", content=b"{}", headers=headers), 415)


def test_requests_need_an_api_key(start):
    server = start(api_keys=("first key", "second"))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic second"},
        {"authorization": "second"},
    ):
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert error(server.http.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        error(server.http.post("/v1/chat/completions", json=chat_body(), headers=headers), 401)
        error(server.http.post("/stepjax/views", json={"image": picture()}, headers=headers), 401)
    for key in ("first key", "second"):
        assert server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/", "/style.css", "/chat.js", "/health"):
        assert server.http.get(path).status_code == 200


def test_other_names_are_not_answered_to(start):
    server = start(hosts=("127.0.0.1", "[::1]"))
    assert server.http.get("/v1/models").status_code == 200
    assert server.http.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200
    for name in ("evil.test", "127.0.0.1.evil.test", ""):
        assert error(server.http.get("/v1/models", headers={"host": name}), 403)["code"] == "host_not_allowed"


def test_bodies_too_large_or_too_slow_are_refused(start):
    server = start(limits=Limits(body_bytes=10_000, body_seconds=0.3))
    large = json.dumps(chat_body("x" * 20_000)).encode()
    headers = {"content-type": "application/json"}
    assert (
        error(server.http.post("/v1/chat/completions", content=large, headers=headers), 413)["code"] == "body_too_large"
    )
    chunked = server.http.post("/v1/chat/completions", content=iter([large[:9_000], large[9_000:]]), headers=headers)
    error(chunked, 413)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 50\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(4096)
    assert server.chat().status_code == 200
    server.wait_until(lambda: server.context.admission.count == 0)


def test_images_too_many_or_too_large_are_refused(start):
    server = start(limits=Limits(images=2, image_bytes=3000, image_pixels=10_000))

    def images(*urls):
        return server.chat([{"type": "image_url", "image_url": {"url": url}} for url in urls])

    assert images(picture(), picture()).status_code == 200
    assert error(images(*[picture()] * 3), 400)["code"] == "too_many_images"
    assert error(images(picture(200, 100)), 400)["code"] == "image_too_large"
    assert error(images(picture(form="BMP")), 413)["code"] == "image_too_large"
    assert error(images("data:image/png;base64," + "A" * 7000), 413)["code"] == "image_too_large"


def test_too_long_is_told_in_one_way_however_it_is_found(start):
    server = start(limits=Limits(text_bytes=10_000))
    wide = [{"type": "image_url", "image_url": {"url": picture(112, 112)}}]
    images = start(limits=Limits(prompt_tokens=30))
    found = {
        "10001 bytes of text are more than the limit of 10000": server.chat("x" * 10_001),
        "tokens are more than the limit of 4095": server.chat("x y" * 3_000),
        "at least": start().chat("x" * 100_000),
        "the images alone: ": images.chat(wide),
        "too long for 4096": server.chat(max_tokens=4096),
        "prompt: 4096 tokens are more than the limit of 4095": server.http.post(
            "/v1/completions", json={"prompt": [65] * 4096}
        ),
        "prompt: 10001 bytes": server.http.post("/v1/completions", json={"prompt": ["x" * 9_000, "x" * 1_001]}),
    }
    for part, response in found.items():
        fields = error(response, 400)
        assert part in fields["message"] and fields["code"] == "context_length_exceeded", fields


def test_work_is_bounded_before_it_begins(start):
    """The event loop goes on while a large request is looked at, whatever it holds."""
    server = start(limits=Limits(body_values=20_000))
    call = {"type": "function", "function": {"name": "f" * 2_000_000, "arguments": "{}"}}
    deep = {"type": "function", "function": {"name": "f", "arguments": '{"a": [' + "[]," * 100_000 + "1]}"}}
    bodies = {
        "more than 20000 values": {"messages": [{"role": "user", "content": ""}] * 100_000},
        "at least": chat_body("word " * 800_000),
        "bytes of text": {"messages": [{"role": "assistant", "content": "x" * 3_000_000, "tool_calls": [call]}]},
        "its JSON has more": {"messages": [{"role": "assistant", "tool_calls": [deep]}]},
        "is not a known field": {**chat_body(), "f" * 5_000_000: 1},
    }
    for part, body in bodies.items():
        begin = time.monotonic()
        response = server.http.post("/v1/chat/completions", json=body)
        assert part in error(response, 400)["message"]
        assert time.monotonic() - begin < 5, part


def test_prompts_that_are_too_long_are_refused(start):
    server = start(limits=Limits(prompt_tokens=40, text_bytes=1000))
    assert server.chat("hi").status_code == 200
    assert error(server.chat("hi " * 100), 400)["code"] == "context_length_exceeded"
    assert error(server.chat("x" * 1001), 400)["code"] == "context_length_exceeded"
    wide = [{"type": "image_url", "image_url": {"url": picture(112, 112)}}]
    assert "the images alone" in error(server.chat(wide), 400)["message"]
    assert server.context.prompts.view_budget.free == server.context.prompts.view_budget.total


def test_views_wait_for_memory(start):
    one = 2 * 12 * (56**2 + 4 * 28**2)  # 60 x 40 pixels are cut into four crops
    server = start(FakeEngine(step_seconds=0.05), limits=Limits(view_bytes=2 * one))
    content = [{"type": "image_url", "image_url": {"url": picture()}}]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(server.chat, content) for _ in range(6)]
    assert [answer.result().status_code for answer in answers] == [200] * 6
    assert server.engine.most_requests == 2
    too_many = server.chat(content * 3)
    assert "memory" in error(too_many, 400)["message"]


def test_requests_over_the_limit_get_429(start):
    server = start(FakeEngine(step_seconds=0.05), limits=Limits(requests=2))
    with ThreadPoolExecutor(8) as pool:
        answers = [answer.result() for answer in [pool.submit(server.chat) for _ in range(8)]]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 6
    for answer in refused:
        assert error(answer, 429)["code"] == "server_busy" and answer.headers["retry-after"] == "1"


def test_a_full_queue_of_the_engine_is_busy(start):
    server = start(FakeEngine(max_requests=0))
    for stream in (False, True):
        response = server.chat(stream=stream)
        assert error(response, 429)["type"] == "rate_limit_error" and response.headers["retry-after"]


def test_a_failed_engine_ends_streams_and_the_server(start):
    server = start(FakeEngine(lambda *_: ["</think>"] + ["x"] * 10_000))
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        server.engine.fail(RuntimeError("a secret of the inside"))
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed" and "secret" not in last
    server.thread.join(10)
    assert not server.thread.is_alive() and server.server.has_failed


def test_an_unexpected_failure_is_not_told(start):
    server = start(FakeEngine())
    server.engine.failure = RuntimeError("a secret of the inside")
    assert "secret" not in error(server.chat(), 500)["message"]
    assert server.http.get("/health").status_code == 200


def test_a_server_whose_engine_failed_answers_what_is_under_way_and_ends(start):
    """As where one of several engines has failed."""
    server = start(FakeEngine(lambda *_: ["</think>"] + ["x"] * 500))
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        server.engine.healthy = False
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            for answer in (other.get("/health"), other.post("/v1/chat/completions", json=chat_body())):
                assert error(answer, 503)["code"] == "engine_failed"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    server.thread.join(10)
    assert not server.thread.is_alive() and server.server.has_failed


def test_metrics_count_requests_and_tokens(start):
    server = start()
    assert server.chat().status_code == 200
    server.chat(temperature=-1)
    server.http.get("/x" * 50)
    text = server.http.get("/metrics").text
    for line in (
        'stepjax_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'stepjax_requests_total{path="/v1/chat/completions",status="400"} 1.0',
        'stepjax_requests_total{path="other",status="404"} 1.0',
        'stepjax_request_seconds_count{path="/v1/chat/completions"} 2.0',
        'stepjax_first_byte_seconds_count{path="/v1/chat/completions"} 1.0',
        "stepjax_engine_generated_tokens_total 9.0",
        "stepjax_engine_pages 100.0",
        "stepjax_requests_under_way 0.0",
    ):
        assert line in text, text


def test_views_are_those_of_the_model(server):
    views = server.http.post("/stepjax/views", json={"image": picture(112, 60)}).json()
    assert (views["width"], views["height"], views["columns"], views["rows"]) == (112, 60, 4, 2)
    assert len(views["crops"]) == 8 and views["crops"][5]["row"] == 1 and views["crops"][5]["column"] == 1
    assert views["global_view"]["image"].startswith("data:image/jpeg;base64,")
    assert views["tokens"] == 8 * (views["crops"][0]["tokens"] + 2) + 1 + views["global_view"]["tokens"] + 2
    error(server.http.post("/stepjax/views", json={"image": "/etc/hostname"}), 400)
    error(server.http.post("/stepjax/views", json={"picture": "x"}), 400)


def test_the_page_is_served_with_its_policy(server):
    page = server.http.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert server.http.get("/chat.js").headers["content-type"].startswith("text/javascript")
    assert server.http.get("/style.css").headers["content-type"].startswith("text/css")
