"""PaCoRe in front of another server, which fails now and then."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess

import openai
import pytest
from fake_engine import FakeEngine
from running_server import chat_body, picture, running, running_app, serving_process, wait_for
from upstream import Upstream, answering, serving, text_of

from stepjax.cli import main
from stepjax.pacore.config import RoundLimits
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.serving.app import make_upstream_app
from stepjax.serving.settings import PACORE, Limits, ServerSettings

ROUNDS = RoundLimits(backoff_seconds=0.01, max_backoff_seconds=0.05)


@pytest.fixture
def serve():
    """A function that puts PaCoRe in front of a URL for the rest of the test."""
    with contextlib.ExitStack() as stack:

        def start(url, *, schedule=(4,), rounds=ROUNDS, endpoint=None, **settings):
            async def make(_):
                sampler = EndpointSampler(EndpointConfig(url=url, **(endpoint or {})))
                pacore = dataclasses.replace(PACORE, schedule=schedule, limits=rounds)
                return None, make_upstream_app(sampler, ServerSettings(**settings), pacore)

            return stack.enter_context(running_app(make))

        yield start


@pytest.fixture
def upstream():
    with serving(Upstream()) as one:
        yield one


def stream_of(server, **fields):
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, **fields)) as response:
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_every_chat_is_answered_with_rounds(serve, upstream):
    server = serve(upstream.url)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()][:2] == ["fake", "fake:pacore-low"]
        answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "6 x 7?"}], seed=1)
        assert answer.pacore["totals"]["calls"] == 5 == len(upstream.bodies)
        assert answer.choices[0].message.content.startswith(r"It is \boxed{42}.")
        assert answer.choices[0].message.reasoning_content.strip() == "hm, let me see"
        assert answer.usage.completion_tokens == answer.pacore["totals"]["output_tokens"] > 0
        text = ""
        stream = client.chat.completions.create(
            model="fake:pacore-medium", messages=[{"role": "user", "content": "6 x 7?"}], stream=True
        )
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == answer.choices[0].message.content and len(upstream.bodies) == 5 + 17
    assert {body["model"] for body in upstream.bodies} == {"fake"} and "pacore" not in upstream.bodies[0]
    assert len({body["seed"] for body in upstream.bodies}) == 22
    options = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 0.3, "max_tokens": 9, "top_k": 5}
    upstream.bodies.clear()
    one = server.chat(pacore={"schedule": []}, **options).json()
    assert len(upstream.bodies) == 1 and one["pacore"]["schedule"] == []
    assert {name: upstream.bodies[0][name] for name in options} == options
    assert server.chat(model="other").status_code == 404


def test_images_and_tools_are_passed_on(serve, upstream):
    server = serve(upstream.url, schedule=(2,), limits=Limits(images=1, image_bytes=5000, text_bytes=5000))
    image = {"type": "image_url", "image_url": {"url": picture()}}
    tool = {"type": "function", "function": {"name": "look"}}
    question = [image, {"type": "text", "text": "what?"}]
    assert server.chat(question, tools=[tool]).status_code == 200
    for body in upstream.bodies:
        assert body["messages"][-1]["content"][0]["image_url"]["url"] == image["image_url"]["url"]
        assert body["tools"] == [tool]
    assert "Reference 2:" in text_of(upstream.bodies[-1]["messages"])
    upstream.bodies.clear()
    assert server.chat("hi", tools=[tool], tool_choice="none").status_code == 200 and "tools" not in upstream.bodies[0]
    for url in ("https://example.com/a.png", "file:///etc/hostname", "/etc/hostname"):
        refused = server.chat([{"type": "image_url", "image_url": {"url": url}}])
        assert refused.json()["error"]["code"] == "remote_images_not_allowed"
        refused = server.chat([{"type": "features", "features": {"data": "8Q=="}}])
        assert refused.json()["error"]["code"] == "features_not_supported"
    assert server.chat([image, image]).json()["error"]["code"] == "too_many_images"
    assert server.chat("x" * 6000).json()["error"]["code"] == "context_length_exceeded"
    assert server.http.post("/v1/completions", json={"prompt": "x"}).status_code == 404
    assert server.http.post("/stepjax/views", json={"image": picture()}).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_is_lost_to_an_upstream_that_fails(serve, stream):
    """A third of the calls fail: with statuses, silence, broken streams, thoughts without an end."""
    with serving(Upstream(fault_share=0.33, stall_seconds=30)) as upstream:
        rounds = RoundLimits(backoff_seconds=0.01, max_backoff_seconds=0.05, call_seconds=0.6, retries=8)
        server = serve(upstream.url, schedule=(8, 3), rounds=rounds)
        for seed in range(4):
            if stream:
                *_, last = chunks = stream_of(server, seed=seed)
                text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
                told = last["pacore"]
            else:
                answer = server.chat(seed=seed)
                assert answer.status_code == 200, answer.text
                told, text = answer.json()["pacore"], answer.json()["choices"][0]["message"]["content"]
            assert r"\boxed{42}" in text and told["answered_by"] in ("synthesis", "fallback")
        assert len(upstream.faults) >= 5
    text = server.http.get("/metrics").text
    assert "stepjax_pacore_failed_attempts_total{" in text and 'stepjax_pacore_losses_total{reason="truncated"}' in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields, named",
    [
        ({"finish_reason": [1]}, "finish_reason is"),
        ({"content": ["42"]}, "content is"),
        ({"tool_calls": [3]}, "tool_calls is 3"),
        ({"content": "x" * 20_000}, "is longer than 10000 bytes"),
    ],
)
def test_malformed_answers_are_a_bad_gateway(serve, upstream, fields, named, stream):
    upstream.responds = lambda body: answering(body, **fields)
    server = serve(upstream.url, rounds=RoundLimits(retries=0), endpoint={"max_response_bytes": 10_000})
    if stream:
        error = stream_of(server)[-1]["error"]
    else:
        answer = server.chat()
        error = answer.json()["error"]
        assert answer.status_code == 502
    assert error["code"] == "pacore_failed" and named in error["message"]


def test_odd_counts_are_not_relayed(serve, upstream):
    upstream.responds = lambda body: answering(body, usage={"prompt_tokens": "7", "completion_tokens": [1]})
    answer = serve(upstream.url).chat().json()
    assert answer["usage"]["prompt_tokens"] == 0 and answer["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("models", ["x", {"data": 3}, {"data": [3]}, {"data": [{"id": 3}]}, {"data": []}])
def test_an_upstream_without_a_model_is_a_bad_gateway(serve, upstream, models):
    upstream.models = models
    answer = serve(upstream.url).http.get("/v1/models")
    assert answer.status_code == 502 and answer.json()["error"]["code"] == "upstream_failed"


def test_an_upstream_that_is_away_or_refuses_is_named(serve, upstream):
    rounds = RoundLimits(retries=0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    away = serve(f"http://127.0.0.1:{port}/v1", rounds=rounds, endpoint={"model": "m"})
    assert away.http.get("/health").status_code == 200 and away.http.get("/v1/models").status_code == 200
    answer = away.chat()
    assert answer.status_code == 502 and "4 error" in answer.json()["error"]["message"]
    unnamed = serve(f"http://127.0.0.1:{port}/v1")
    assert unnamed.chat().json()["error"]["code"] == "upstream_failed"
    assert unnamed.http.get("/v1/models").status_code == 502

    with running(None, FakeEngine()) as plain:
        front = serve(f"{plain.url}/v1", rounds=rounds, endpoint={"model": "wrong"})
        refused = front.chat().json()["error"]
        assert refused["code"] == "upstream_refused" and "does not exist" in refused["message"]
    with running(None, FakeEngine(), api_keys=("key-of-upstream",)) as locked:
        front = serve(f"{locked.url}/v1", rounds=rounds, endpoint={"model": "tiny", "api_key": "sk-wrong"})
        answer = front.chat()
        assert answer.status_code == 502 and "refuses this server's key" in answer.text and "sk-" not in answer.text


def test_pacore_works_in_front_of_our_own_server(serve, processor):
    def script(prompt, params, sample):
        is_synthesis = "Reference 1:" in processor.decode(prompt.tokens)
        return ["Reference 1?", "</think>\n\n", "42" if is_synthesis else "41"]

    with running(processor, FakeEngine(script)) as behind:
        server = serve(f"{behind.url}/v1", schedule=(3,))
        answer = server.chat().json()
        assert answer["choices"][0]["message"]["content"] == "42" and answer["model"] == "tiny"
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 * 3
        behind.engine.script = lambda *_: ["</think>", *["on "] * 20_000]
        with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
            reader = response.iter_lines()
            next(reader)
            behind.wait_until(lambda: len(behind.engine.requests) == 3)
        behind.wait_until(lambda: not behind.engine.requests, seconds=3)
        behind.wait_until(lambda: behind.context.admission.count == 0)


def test_reasoning_within_the_content_is_split_off(serve):
    with serving(Upstream(lambda body: {"content": "hm, let me see </think> 42"})) as upstream:
        server = serve(upstream.url, schedule=(2,), endpoint={"opens_thinking": True})
        message = server.chat().json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm, let me see ", " 42 ")
        deltas = [chunk["choices"][0]["delta"] for chunk in stream_of(server)]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == message["reasoning_content"]
        assert "let me see" not in text_of(upstream.bodies[-1]["messages"])


def test_keys_hosts_and_limits_hold(serve, upstream):
    server = serve(upstream.url, api_keys=("open sesame",))
    assert server.chat().status_code == server.http.get("/metrics").status_code == 401
    assert server.http.get("/").status_code == server.http.get("/health").status_code == 200
    named = serve(upstream.url, hosts=("localhost",), model_name="mine", limits=Limits(pacore_calls=3))
    assert named.chat().status_code == 403
    named.http.headers["host"] = "localhost"
    assert named.http.get("/v1/models").json()["data"][0]["id"] == "mine"
    assert "limit of 3" in named.chat().json()["error"]["message"]


@pytest.mark.parametrize(
    "given, part",
    [
        (["--schedule", "lots"], "'lots'"),
        (["--schedule", "64"], "--limits.pacore-calls"),
        (["--port", "70000"], "--port 70000"),
        (["--upstream.url", "localhost:80"], "upstream 'localhost:80'"),
        (["--upstream.max-context", "100"], "needs a tokenizer"),
        (["--quorum", "0"], "quorum=0"),
        (["--template", "/nowhere/x.jinja"], "cannot be read"),
    ],
)
def test_options_that_cannot_work_are_named(capsys, given, part):
    with contextlib.suppress(SystemExit):
        assert main(["pacore", "serve", "--upstream.url", "http://127.0.0.1:1/v1", *given]) == 1
    assert part in capsys.readouterr().err


def test_an_upstream_must_be_named(capsys):
    assert main(["pacore", "serve", "--port", "0"]) == 1
    assert "upstream.url is missing" in capsys.readouterr().err


def test_the_command_serves_and_ends_in_order(upstream):
    program = "import sys; from stepjax.cli import main; code = main(sys.argv[1:]); "
    program += "assert 'jax' not in sys.modules; sys.exit(code)"
    options = ["pacore", "serve", "--upstream.url", upstream.url, "--schedule", "2", "--port"]
    environment = {**os.environ, "STEPJAX_API_KEY": "secret", "STEPJAX_UPSTREAM_API_KEY": "inner"}
    with serving_process(
        lambda port: ["-c", program, *options, str(port)], env=environment, stderr=subprocess.PIPE, text=True
    ) as (process, client):
        wait_for(client, process)
        assert client.post("/v1/chat/completions", json=chat_body()).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        answer = client.post("/v1/chat/completions", json=chat_body()).json()
        assert answer["pacore"]["schedule"] == [2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        log = process.stderr.read()
    assert upstream.headers[0]["authorization"] == "Bearer inner"
    assert "listening on" in log and "secret" not in log and "inner" not in log and "Traceback" not in log, log
