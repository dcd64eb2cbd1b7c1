"""PaCoRe in chat requests: what clients see, what is refused, what is left when they leave."""

import dataclasses
import itertools
import json
import signal
import socket

import openai
import pytest
from fake_engine import FakeEngine
from running_server import chat_body, picture, running

from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import RoundLimits
from stepjax.serving.settings import PACORE, Limits

QUICK = dataclasses.replace(PACORE, limits=RoundLimits(backoff_seconds=0.01))


def is_synthesis(processor, prompt):
    return "Reference 1:" in processor.decode(prompt.tokens, skip_special=False)


@pytest.fixture
def engine(processor):
    """Trajectories of round one say a number of their seed; others think about references, and follow one."""

    def script(prompt, params, sample):
        if is_synthesis(processor, prompt):
            return ["Reference 2 is ", "wrong", "</think>\n\n", "As in Reference 1: ", "42", "."]
        return ["hm", "</think>\n\n", "It is ", str((params.seed or 0) % 1000)]

    return FakeEngine(script)


@pytest.fixture
def server(start, engine):
    return start(engine, pacore=QUICK)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def ask(client, model="tiny", *, content="6 x 7?", pacore=None, **fields):
    extra = {"extra_body": {"pacore": pacore}} if pacore is not None else {}
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **extra, **fields)


def events_of(server, **fields):
    """The pacore events and the chunks of a stream; and the error that ended it, if one did."""
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body("6 x 7?", stream=True, **fields)) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    error = chunks.pop()["error"] if "error" in chunks[-1] else None
    assert (error is None) == (lines[-1] == "[DONE]")
    return [chunk["pacore"] for chunk in chunks if "pacore" in chunk], chunks, error


def test_a_whole_answer_is_a_chat_completion_and_tells_of_its_rounds(client, server):
    answer = ask(client, pacore={"schedule": [3, 2]}, seed=7, temperature=0.5, max_tokens=50)
    message = answer.choices[0].message
    assert message.content == "As in Reference 1: 42." and message.reasoning_content == "Reference 2 is wrong"
    assert answer.choices[0].finish_reason == "stop" and message.tool_calls is None
    told = answer.pacore
    assert told["schedule"] == [3, 2] and told["seed"] == 7 and told["answered_by"] == "synthesis"
    assert [(each["width"], each["is_final"]) for each in told["rounds"]] == [(3, False), (2, False), (1, True)]
    calls = [call for each in told["rounds"] for call in each["trajectories"]]
    assert answer.usage.completion_tokens == sum(call["output_tokens"] for call in calls) == 3 * 4 + 3 * 6
    assert answer.usage.prompt_tokens == sum(call["prompt_tokens"] for call in calls)
    assert answer.usage.prompt_tokens == sum(len(prompt.tokens) for prompt, _ in server.engine.served)
    assert answer.usage.prompt_tokens_details.cached_tokens == 6 * 3
    assert {(params.temperature, params.max_tokens, params.n) for _, params in server.engine.served} == {(0.5, 50, 1)}
    assert [call["seed"] for call in calls] == [params.seed for _, params in server.engine.served]
    assert calls[0]["message"] == f"It is {calls[0]['seed'] % 1000}" and "message" not in calls[-1]
    assert calls[-1]["cites"] == {"1": 1, "2": 1} and told["totals"]["calls"] == 6
    order = [reference["index"] for reference in told["rounds"][1]["references"]]
    assert sorted(order) == [0, 1, 2]

    again = ask(client, pacore={"schedule": "3,2"}, seed=7, temperature=0.5, max_tokens=50)
    assert [each["references"] for each in again.pacore["rounds"]] == [each["references"] for each in told["rounds"]]
    drawn = [ask(client, pacore={"schedule": [1]}).pacore["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1] and max(drawn) < 2**53


def test_an_unmodified_client_reads_a_stream_blindly(client):
    text, models = "", set()
    for chunk in ask(client, "tiny:pacore-low", stream=True):
        text += chunk.choices[0].delta.content or ""
        models.add(chunk.model)
    assert text == "As in Reference 1: 42." and models == {"tiny:pacore-low"}
    with client.chat.completions.stream(
        model="tiny:pacore-low", messages=[{"role": "user", "content": "?"}], stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "As in Reference 1: 42." and final.choices[0].finish_reason == "stop"
    assert final.usage.completion_tokens == 4 * 4 + 6


def test_a_stream_tells_of_its_rounds(server, monkeypatch):
    monkeypatch.setattr("stepjax.serving.pacore.PROGRESS_SECONDS", 0.02)
    server.engine.step_seconds = 0.03
    options = {"schedule": [2], "include": "full"}
    events, chunks, error = events_of(server, pacore=options, seed=3, stream_options={"include_usage": True})
    assert error is None
    kinds = [event["type"] for event in events if event["type"] != "progress"]
    ended = ["trajectory_ended", "trajectory_ended", "round_ended"]
    assert kinds == ["round_started", *ended, "round_started", "trajectory_ended", "round_ended", "done"]
    assert all(chunk["choices"][0]["index"] == 0 for chunk in chunks[:-1]) and chunks[-1]["choices"] == []
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    rounds = [chunk for chunk in chunks[1:-1] if "pacore" in chunk]
    assert all(chunk["choices"][0]["delta"] == {} for chunk in rounds)
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]] == ["stop"]
    progress = [event for event in events if event["type"] == "progress"]
    assert any(event["round"] == 0 and event["tokens"] == {"0": 2, "1": 2} for event in progress)
    first = next(event for event in events if event["type"] == "trajectory_ended")
    assert first["reasoning_content"] == "hm" and first["content"] == first["message"]
    done = events[-1]
    assert done["seed"] == 3 and done["answered_by"] == "synthesis"
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == done["totals"]["output_tokens"] == 2 * 4 + 6
    assert usage["prompt_tokens"] == done["totals"]["prompt_tokens"]
    summary, _, _ = events_of(server, pacore={"schedule": [2], "include": "summary"})
    assert not any("message" in event or "content" in event for event in summary)


@pytest.mark.parametrize("name, calls", [("low", 5), ("medium", 17), ("high", 37)])
def test_names_with_a_suffix_ask_for_a_preset(client, name, calls):
    assert ask(client, f"tiny:pacore-{name}").pacore["totals"]["calls"] == calls
    assert client.models.retrieve(f"tiny:pacore-{name}").pacore["schedule"]
    if calls == 5:
        assert ask(client, pacore={}).pacore["schedule"] == ask(client, pacore={"schedule": "low"}).pacore["schedule"]
    assert not hasattr(ask(client), "pacore"), "a plain request stays one"


def test_one_call_without_rounds_is_passed_on(client, server):
    for schedule in ([], "none"):
        answer = ask(client, pacore={"schedule": schedule})
        assert answer.choices[0].message.content.startswith("It is ") and len(answer.pacore["rounds"]) == 1
    server.engine.served.clear()
    cut = ask(client, pacore={"schedule": []}, max_tokens=1)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.content == ""
    assert cut.choices[0].message.reasoning_content == "hm" and len(server.engine.served) == 1
    chunks = list(ask(client, pacore={"schedule": []}, max_tokens=1, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "fields, param, part",
    [
        ({"pacore": {"schedule": [64]}}, "pacore.schedule", "65 calls, more than the limit of 64"),
        ({"pacore": {"schedule": [1] * 100_000}}, "pacore.schedule", "100001 calls"),
        ({"pacore": {"schedule": [0]}}, "pacore.schedule", "at least one"),
        ({"pacore": {"schedule": "hgih"}}, "pacore.schedule", "low, medium, high"),
        ({"pacore": {"schedule": [4.5]}}, "pacore.schedule[0]", "integer"),
        ({"pacore": {"schedul": [4]}}, "pacore.schedul", "not a known field"),
        ({"pacore": {"order": "random"}}, "pacore.order", "'random'"),
        ({"pacore": {"quorum": 2}}, "pacore.quorum", "at most 1"),
        ({"pacore": {"agreement": 0}}, "pacore.agreement", "above 0"),
        ({"pacore": {"round_seconds": float("nan")}}, "pacore.round_seconds", "finite"),
        ({"pacore": {"retries": 17}}, "pacore.retries", "less than or equal to 16"),
        ({"pacore": "low"}, "pacore", "pacore='low'"),
        ({"pacore": {}, "n": 2}, "n", "PaCoRe gives one answer"),
        ({"pacore": {}, "logprobs": True}, "logprobs", "leave them out"),
        ({"pacore": {"schedule": [2]}, "model": "tiny:pacore-low"}, "pacore.schedule", "differ"),
        ({"pacore": {}, "messages": [{"role": "assistant", "content": "x"}]}, None, "a user's or a tool's message"),
        ({"pacore": {}, "temperature": -1}, "temperature", "0 or more"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, fields, param, part):
    body = json.dumps({**chat_body(), **fields}).encode()
    response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and part in error["message"] and error["param"] == param, error
    assert len(error["message"]) < 1000 and not server.engine.served


def test_other_names_and_routes_are_refused(server):
    response = server.chat(model="tiny:pacore-max")
    assert response.status_code == 404 and "tiny:pacore-low" in response.json()["error"]["message"]
    plain = server.http.post("/v1/completions", json={"prompt": "x", "model": "tiny:pacore-low"})
    assert plain.status_code == 400 and "/v1/chat/completions" in plain.json()["error"]["message"]


def test_the_number_of_calls_is_a_setting(start, engine):
    server = start(engine, limits=Limits(pacore_calls=4))
    assert server.chat(pacore={"schedule": [3]}).status_code == 200
    assert "limit of 4" in server.chat(pacore={"schedule": [4]}).json()["error"]["message"]


def test_the_servers_sampling_holds_where_a_request_leaves_it_open(start, engine):
    sampling = SamplingParams(temperature=0.5, top_k=5, seed=7)
    server = start(engine, pacore=dataclasses.replace(QUICK, sampling=sampling))
    told = server.chat(pacore={"schedule": [2]}, temperature=0.25).json()["pacore"]
    assert told["seed"] == 7
    assert {(params.temperature, params.top_k) for _, params in engine.served} == {(0.25, 5)}


def test_images_reach_every_call_and_their_memory_is_given_back(server):
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": picture()}}]
    for place in ("before", "after"):
        server.engine.served.clear()
        assert server.chat(content, pacore={"schedule": [2], "images": place}).status_code == 200
        assert [len(prompt.global_views) for prompt, _ in server.engine.served] == [1, 1, 1]
    budget = server.context.prompts.view_budget
    assert budget.free == budget.total
    content[1]["image_url"]["url"] = "data:image/png;base64,aGVsbG8="
    assert server.chat(content, pacore={}).json()["error"]["code"] == "invalid_image"


def test_tools_are_proposed_in_every_round(start, processor):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = '</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
    server = start(FakeEngine(lambda *_: [call]), pacore=QUICK)
    whole = server.chat(pacore={"schedule": [2]}, tools=[tool]).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    assert [each["function"]["name"] for each in whole["message"]["tool_calls"]] == ["look"]
    synthesis = processor.decode(server.engine.served[-1][0].tokens, skip_special=False)
    assert "<function=look>" in synthesis and "none of them has been run" in synthesis
    events, chunks, _ = events_of(server, pacore={"schedule": [2]}, tools=[tool])
    calls = [c["choices"][0]["delta"]["tool_calls"] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert len(calls) == 1 and calls[0][0]["index"] == 0


def test_references_that_do_not_fit_are_shortened(start, processor):
    """By the limit on prompts, which the server alone knows."""

    def script(prompt, params, sample):
        text = "long " * 30 + "so it is 42" if not is_synthesis(processor, prompt) else "42"
        return ["</think>\n\n", text]

    server = start(FakeEngine(script), pacore=QUICK, limits=Limits(prompt_tokens=450))
    told = server.chat(pacore={"schedule": [4]}).json()["pacore"]["rounds"][1]
    assert told["cut_references"] == 4 and told["losses"] == {}
    assert len(server.engine.served[-1][0].tokens) <= 450
    for options in ({"schedule": [4], "overflow": "fail"}, {"schedule": [4], "overflow": "drop"}):
        answer = server.chat(pacore=options)
        if options["overflow"] == "drop":
            assert answer.json()["pacore"]["rounds"][1]["losses"] == {"did_not_fit": 3}, answer.text
        else:
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    too_long = server.chat("word " * 1000, pacore={})
    assert too_long.status_code == 400 and too_long.json()["error"]["code"] == "context_length_exceeded"
    assert server.chat("word " * 1000, pacore={}, stream=True).status_code == 400, "before the stream has begun"
    text = start(FakeEngine(script), pacore=QUICK, limits=Limits(text_bytes=700))
    assert text.chat(pacore={"schedule": [4]}).json()["pacore"]["rounds"][1]["cut_references"] == 4


def test_a_round_without_messages_is_an_error(start):
    server = start(FakeEngine(lambda *_: ["only a thought"]), pacore=QUICK)
    answer = server.chat(pacore={"schedule": [3]})
    error = answer.json()["error"]
    assert answer.status_code == 502 and error["code"] == "pacore_failed" and error["type"] == "server_error"
    assert "round 1 of 3 left no message (3 empty)" in error["message"]
    events, _, error = events_of(server, pacore={"schedule": [3]})
    assert events[-1]["type"] == "round_ended" and events[-1]["losses"] == {"empty": 3}
    assert error["code"] == "pacore_failed" and "3 empty" in error["message"]


def test_the_plurality_stands_in_for_a_final_call_that_fails(start, processor):
    def script(prompt, params, sample):
        return ["hm"] if is_synthesis(processor, prompt) else ["</think>\n\n", r"It is \boxed{42}."]

    server = start(FakeEngine(script), pacore=QUICK)
    options = {"schedule": [3], "retries": 1}
    whole = server.chat(pacore=options).json()
    assert whole["pacore"]["answered_by"] == "fallback"
    assert whole["choices"][0]["message"]["content"] == r"It is \boxed{42}."
    assert whole["usage"]["completion_tokens"] == 3 * 2 + 2, "the try that led to nothing was drawn, too"
    events, chunks, error = events_of(server, pacore=options)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert error is None and text == r"It is \boxed{42}." and events[-1]["answered_by"] == "fallback"
    failed = [event for event in events if event["type"] == "attempt_failed"]
    assert failed and failed[0]["status"] == "empty" and failed[0]["is_final"]


def test_agreement_ends_it_and_is_streamed_whole(start):
    server = start(FakeEngine(lambda *_: ["why not</think>\n\n", r"\boxed{42}"]), pacore=QUICK)
    events, chunks, _ = events_of(server, pacore={"schedule": [4, 4], "agreement": 0.5})
    assert events[-1]["answered_by"] == "agreement" and events[-1]["totals"]["calls"] == 4
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert {"content": r"\boxed{42}"} in deltas and {"reasoning_content": "why not"} in deltas


def test_a_busy_engine_is_asked_again(start, engine):
    engine.max_requests = 3
    server = start(engine, pacore=QUICK)
    answer = server.chat(pacore={"schedule": [6], "retries": 10}).json()["pacore"]
    assert answer["totals"]["retries"] > 0 and answer["rounds"][0]["losses"] == {}
    engine.max_requests = 0
    refused = server.chat(pacore={"schedule": [2], "retries": 1})
    assert refused.status_code == 429 and refused.headers["retry-after"]


def test_internal_errors_are_not_told(start):
    server = start(FakeEngine(lambda *_: ["</think>"] + ["x"] * 10_000), pacore=QUICK)
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, pacore={})) as response:
        lines = response.iter_lines()
        next(lines)
        server.wait_until(lambda: len(server.engine.requests) == 4)
        server.engine.fail(RuntimeError("a secret of the inside"))
        rest = "".join(lines)
    assert '"pacore_failed"' in rest and "see the server's log" in rest and "secret" not in rest


def test_one_bad_trajectory_is_no_error(start, processor):
    numbers = itertools.count()

    def script(prompt, params, sample):
        if not is_synthesis(processor, prompt) and next(numbers) == 1:
            return ["a thought without end"]
        return ["</think>\n\n", "fine"]

    server = start(FakeEngine(script), pacore=QUICK)
    told = server.chat(pacore={"schedule": [3]}).json()["pacore"]["rounds"]
    assert told[0]["losses"] == {"empty": 1} and [each["loss"] for each in told[0]["trajectories"]].count("empty") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_it_all(start, stream):
    server = start(FakeEngine(lambda *_: ["</think>", *["on "] * 20_000], step_seconds=0.005))
    data = json.dumps(chat_body(stream=stream, pacore={"schedule": [8]})).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
    server.wait_until(lambda: len(server.engine.requests) == 8)
    assert server.context.admission.count == 1, "calls are not requests"
    connection.close()
    server.wait_until(lambda: not server.engine.requests, seconds=2)
    server.wait_until(lambda: server.context.admission.count == 0)
    assert 'stepjax_pacore_requests_total{answered_by="cancelled"} 1.0' in server.http.get("/metrics").text


def test_shutdown_is_told(processor):
    engine = FakeEngine(lambda *_: ["</think>", *["on "] * 20_000], step_seconds=0.005)
    with running(processor, engine, drain_seconds=0.2) as server:
        with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, pacore={})) as response:
            reader = response.iter_lines()
            next(reader)
            server.wait_until(lambda: len(engine.requests) == 4)
            server.server.handle_exit(signal.SIGTERM, None)
            lines = [line for line in reader if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        server.wait_until(lambda: not engine.requests)


def test_metrics_count_rounds_and_calls(server):
    server.chat(pacore={"schedule": [3]})
    server.engine.script = lambda *_: ["nothing"]
    server.chat(pacore={"schedule": [2]})
    text = server.http.get("/metrics").text
    for line in (
        'stepjax_pacore_requests_total{answered_by="synthesis"} 1.0',
        'stepjax_pacore_requests_total{answered_by="failed"} 1.0',
        "stepjax_pacore_rounds_total 3.0",
        'stepjax_pacore_calls_total{status="ok"} 6.0',
        'stepjax_pacore_losses_total{reason="empty"} 2.0',
        "stepjax_pacore_output_tokens_total 20.0",
    ):
        assert line in text, text
