"""The server over the real engine and a tiny model."""

import asyncio
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from running_server import ask_many, chat_body, picture, running, serving_process, wait_for
from tiny_checkpoint import write_tiny_checkpoint

from stepjax.config import NumericsConfig
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.interop.load import load
from stepjax.interop.text_processor import TextProcessor

CONFIG = EngineConfig(max_sequences=4, max_prefix_groups=1, max_context=512, page_size=16, prefill_tokens=64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def tiny(directory):
    return load(directory, numerics=NumericsConfig(compute_dtype="float32", remat="none"))


@pytest.fixture(scope="module")
def server(tiny):
    model, processor = tiny
    with running(processor, AsyncEngine(Engine(model, processor, CONFIG))) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


def question(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_streamed_and_whole_say_the_same(client):
    for messages in (question("what is it?"), question("and this?", picture(60, 40), picture(300, 90, "red"))):
        fields = dict(model="tiny", messages=messages, seed=5, max_tokens=24, n=2)
        whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
        chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        for choice in whole.choices:
            deltas = [c.choices[0].delta for c in chunks[:-1] if c.choices[0].index == choice.index]
            assert "".join(delta.content or "" for delta in deltas) == choice.message.content
            reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            assert reasoning == (getattr(choice.message, "reasoning_content", None) or "")
            assert len(choice.logprobs.content) <= 24
            for entry in choice.logprobs.content:
                assert len(entry.top_logprobs) == 3 and entry.logprob < entry.top_logprobs[0].logprob + 1e-5
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 10
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
        again = client.chat.completions.create(**{**fields, "n": 1})
        assert again.choices[0].message == whole.choices[0].message


def test_completions_continue_text_and_tokens_alike(client, tiny):
    ids = tiny[1].tokenizer.encode("one two three")
    by_text = client.completions.create(model="tiny", prompt="one two three", temperature=0, max_tokens=8, logprobs=2)
    by_ids = client.completions.create(model="tiny", prompt=[ids, ids], temperature=0, max_tokens=8)
    assert by_text.choices[0].text == by_ids.choices[0].text == by_ids.choices[1].text
    assert by_text.usage.prompt_tokens == len(ids)


def test_prompts_that_are_too_long_are_refused(server):
    response = server.chat("word " * 600)
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    response = server.chat(max_tokens=512)
    assert response.status_code == 400 and "512" in response.json()["error"]["message"]


def test_two_hundred_at_once_are_all_answered(server):
    before = server.engine.stats()
    answers = asyncio.run(ask_many(server, 200, max_tokens=3))
    assert [status for status, _ in answers] == [200] * 200
    stats = server.engine.stats()
    assert stats.finished_samples - before.finished_samples == 200
    assert stats.running == stats.waiting == stats.pages_used == 0


def test_a_client_that_leaves_frees_its_pages(server):
    before = server.engine.stats().cancelled_samples
    body = chat_body("tell me more", stream=True, n=4, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        reader = response.iter_lines()
        next(reader)
        assert server.engine.stats().pages_used > 0
    server.wait_until(lambda: server.engine.stats().pages_used == 0, seconds=5)
    assert server.engine.stats().cancelled_samples - before == 4


def test_rounds_of_pacore_whole_streamed_and_cancelled(server, client):
    """Without a thought, which so small a model would not end."""
    fields = dict(model="tiny", messages=question("and this?", picture(60, 40)), seed=3, max_tokens=12)
    options = {"pacore": {"schedule": [3, 2]}, "chat_template_kwargs": {"enable_thinking": False}}
    whole = client.chat.completions.create(**fields, extra_body=options)
    rounds = whole.pacore["rounds"]
    assert [len(each["trajectories"]) for each in rounds] == [3, 2, 1] and not any(each["losses"] for each in rounds)
    calls = [call for each in rounds for call in each["trajectories"]]
    assert whole.usage.completion_tokens == sum(call["output_tokens"] for call in calls) > 6
    assert len({call["message"] for call in rounds[0]["trajectories"]}) == 3, "seeds differ"
    assert whole.usage.prompt_tokens_details.cached_tokens > 0, "trajectories share their prompt"
    chunks = list(
        client.chat.completions.create(
            **fields, extra_body=options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    told = [chunk.pacore for chunk in chunks[:-1] if hasattr(chunk, "pacore")]
    messages = [event.get("message") for event in told if event["type"] == "trajectory_ended" and not event["round"]]
    assert sorted(messages) == sorted(call["message"] for call in rounds[0]["trajectories"])

    body = chat_body("tell me more", stream=True, ignore_eos=True, pacore={"schedule": [4]})
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        reader = response.iter_lines()
        next(reader)
        server.wait_until(lambda: server.engine.stats().running > 0)
    server.wait_until(lambda: server.engine.stats().running + server.engine.stats().waiting == 0, seconds=5)
    assert server.engine.stats().pages_used == 0


def test_metrics_show_the_engine(server):
    text = server.http.get("/metrics").text
    values = dict(line.split(" ") for line in text.splitlines() if line.startswith("stepjax_engine_"))
    assert float(values["stepjax_engine_generated_tokens_total"]) > 100
    assert float(values["stepjax_engine_images_encoded_total"]) > 0


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
)


def test_a_text_model_answers_text_only(directory, tiny):
    text = TextProcessor.from_directory(directory)
    text.chat_templates = {"default": TEMPLATE}
    with running(text, AsyncEngine(Engine(tiny[0].decoder, text, CONFIG))) as server:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        answer = server.chat(parts, max_tokens=4, temperature=0).json()
        message = answer["choices"][0]["message"]
        assert message["content"] and "reasoning_content" not in message
        assert answer["usage"]["prompt_tokens"] == len(
            text.process_prompt([{"role": "user", "content": "one\ntwo"}]).tokens
        )
        thinking = server.chat("one", max_tokens=4, ignore_eos=True, chat_template_kwargs={"enable_thinking": True})
        assert thinking.json()["choices"][0]["message"]["reasoning_content"], thinking.text
        for prompt in ("one two", text.encode("one two")):
            plain = server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "logprobs": 1})
            assert len(plain.json()["choices"][0]["logprobs"]["tokens"]) <= 4, plain.text
        refused = server.chat([{"type": "image_url", "image_url": {"url": picture()}}])
        assert refused.status_code == 400 and "text-only" in refused.json()["error"]["message"]
        assert server.http.post("/stepjax/views", json={"image": picture()}).status_code == 400


def serving(directory, program, *options):
    options = ["--dtype", "float32", "--engine.max-context", "128", "--limits.images", "1", "--no-warm-up", *options]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "STEPJAX_API_KEY": "secret"}
    return serving_process(
        lambda port: [*program, "serve", str(directory), "--port", str(port), *options],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


DYING = """
import sys

from stepjax.cli import main
from stepjax.inference.engine import Engine

step, left = Engine.step, iter(range(8))

def dying(self):
    if next(left, None) is None:
        raise RuntimeError("INTERNAL: the device is lost")
    return step(self)

Engine.step = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def processes(directory):
    """Of a server, and of one whose engine dies; both start at a time."""
    with (
        serving(directory, ["-m", "stepjax.cli"], "--engine.max-sequences", "1") as sound,
        serving(directory, ["-c", DYING], "--engine.max-sequences", "2") as dying,
    ):
        yield sound, dying


def test_the_command_serves_and_ends_in_order(processes):
    process, client = processes[0]
    wait_for(client, process)
    assert client.post("/v1/chat/completions", json=chat_body()).status_code == 401
    client.headers["authorization"] = "Bearer secret"
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    body = chat_body("hi", stream=True, ignore_eos=True, max_tokens=40)
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        reader = response.iter_lines()
        next(reader)
        process.send_signal(signal.SIGTERM)
        lines = [line for line in reader if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert process.wait(20) == 0
    log = process.stderr.read()
    assert "listening on" in log and "SIGTERM" in log and "secret" not in log and "Traceback" not in log, log


def test_an_engine_that_dies_takes_the_process_with_it(processes):
    process, client = processes[1]
    wait_for(client, process)
    client.headers["authorization"] = "Bearer secret"
    body = chat_body("hi", ignore_eos=True, max_tokens=100)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(client.post, "/v1/chat/completions", json=body)
        streamed = pool.submit(client.post, "/v1/chat/completions", json={**body, "stream": True})
    assert whole.result().status_code == 500 and whole.result().json()["error"]["code"] == "engine_failed"
    if streamed.result().status_code == 200:  # it had begun
        last = [line for line in streamed.result().text.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert process.wait(20) == 70
    log = process.stderr.read()
    assert "the engine has failed: exiting with status 70" in log and log.count("Traceback") <= 2, log
    assert log.count("the device is lost") <= 3 and "never retrieved" not in log, log
