"""The sampler over HTTP against a real server, well-behaved and not."""

import asyncio
import base64
import contextlib
import gzip
import resource
import threading

import pytest
from starlette.responses import JSONResponse, Response, StreamingResponse
from upstream import FAULTS, Upstream, answering, serving

from stepjax.errors import ConfigError, ContextLengthError, ImageError, TokenError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import PacoreConfig, RoundLimits
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.records import AttemptFailed, Problem
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler, FileTokens
from stepjax.rollouts.sampler import Listener, SamplerError

QUESTION = ({"role": "user", "content": "What is 6 x 7?"},)
PARAMS = SamplingParams(seed=5, max_tokens=50, temperature=0.7)


def ask(upstream, *, params=PARAMS, messages=QUESTION, tools=(), pieces=None, **endpoint):
    async def main():
        async with EndpointSampler(EndpointConfig(url=upstream.url, **endpoint)) as sampler:
            async with sampler.prompt(messages, tools, answer_tokens=10) as prompt:
                return await sampler.sample(prompt, params, Listener(pieces.append if pieces is not None else None))

    return asyncio.run(main())


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(serving(Upstream(*args, **options)))


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_is_read_whole(start, streams):
    upstream, pieces = start(), []
    reply = ask(upstream, pieces=pieces, streams=streams, headers={"x-team": "a"}, body={"top_a": 0.1}, api_key="k")
    assert reply.content.strip() == r"It is \boxed{42}." and reply.reasoning.strip() == "hm, let me see"
    assert (reply.finish_reason, reply.num_prompt_tokens, reply.num_tokens) == ("stop", 7, 7)
    [body], [headers] = upstream.bodies, upstream.headers
    assert body["model"] == "fake" and body["seed"] == 5 and body["max_tokens"] == 50 and body["temperature"] == 0.7
    assert body["top_a"] == 0.1 and "top_k" not in body and body["messages"] == list(QUESTION)
    assert headers["authorization"] == "Bearer k" and headers["x-team"] == "a"
    assert "".join(piece.get("content", "") for piece in pieces) == reply.content


def test_half_a_character_does_not_reach_the_next_prompt(start):
    """JSON may escape surrogates that are alone, and may be cut between the two of a pair; requests hold neither."""
    reply = ask(start(lambda body: {"content": "a \ud83d b \ud83d\ude00", "reasoning": "\ude00"}))
    assert reply.content.strip() == "a \ufffd b \U0001f600" and reply.reasoning.strip() == "\ufffd"


@pytest.mark.parametrize("streams", [True, False])
def test_tool_calls(start, streams):
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    upstream = start(lambda body: {"content": None, "tool_calls": calls, "finish_reason": "tool_calls"})
    tools = ({"type": "function", "function": {"name": "f"}},)
    reply = ask(upstream, streams=streams, tools=tools)
    assert [dict(call["function"]) for call in reply.tool_calls] == [calls[0]["function"]]
    assert reply.content == "" and upstream.bodies[0]["tools"] == list(tools)


@pytest.mark.parametrize(
    "text, finish, opens, content, reasoning",
    [
        ("<think>\nhm\n</think>\n\n42", "stop", None, "42", "hm"),
        ("hm\n</think>\n\n42", "stop", None, "42", "hm"),
        ("hm", "length", None, "", "hm"),
        ("hm", "length", False, "hm", None),
        ("hm", "stop", None, "hm", None),
        ("<think>hm", "length", None, "", "hm"),
    ],
)
def test_thoughts_that_a_server_leaves_in_the_content(start, text, finish, opens, content, reasoning):
    upstream = start(lambda body: {"content": text, "finish_reason": finish})
    reply = ask(upstream, opens_thinking=opens, streams=False)
    assert (reply.content, reply.reasoning) == (content, reasoning)


def test_images_are_sent_as_data(start, tmp_path):
    from PIL import Image

    Image.new("RGB", (3, 2), "teal").save(tmp_path / "a.png")
    upstream = start()
    items = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}]
    ask(upstream, messages=({"role": "user", "content": items},))
    url = upstream.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == (tmp_path / "a.png").read_bytes()
    with pytest.raises(ImageError, match="nothing.png"):
        items[0]["image"] = str(tmp_path / "nothing.png")
        ask(upstream, messages=({"role": "user", "content": items},))


def test_failures_say_whether_to_try_again(start):
    def failing(fault):
        upstream = start()
        upstream.fault = lambda body: fault
        with pytest.raises(SamplerError) as caught:
            ask(upstream)
        return caught.value

    assert failing("status 500").is_temporary and "out of luck" in str(failing("status 500"))
    assert failing("status 429").retry_after == 0.01
    assert failing("broken stream").is_temporary and failing("not JSON").is_temporary

    class Nowhere:
        url = "http://127.0.0.1:9/v1"

    with pytest.raises(SamplerError, match="127.0.0.1|onnect"):
        ask(Nowhere)


def test_every_problem_is_answered_and_every_loss_accounted(start):
    """Three in ten calls fail, are late, are cut off, are empty or break off."""
    upstream = start(fault_share=0.3, stall_seconds=0.0)
    limits = RoundLimits(retries=6, backoff_seconds=0.01)
    config = PacoreConfig(schedule=(6, 3), limits=limits)
    failed = []

    def notify(event):
        if isinstance(event, AttemptFailed):
            failed.append(event)

    async def main():
        async with EndpointSampler(EndpointConfig(url=upstream.url, max_concurrent=64)) as sampler:
            coordinator = Coordinator(sampler, config)
            problems = [Problem(id=f"p{i}", messages=QUESTION) for i in range(12)]
            return await asyncio.gather(*(coordinator.solve(problem, notify=notify) for problem in problems))

    outcomes = asyncio.run(main())
    assert all(r"\boxed{42}" in outcome.content for outcome in outcomes)
    assert set(upstream.faults) == set(FAULTS), "every kind came up"
    # Each call that reached the endpoint is a trajectory or one of its tries, and each fault is told.
    calls = sum(outcome.totals.calls + outcome.totals.retries for outcome in outcomes)
    assert calls == len(upstream.bodies)
    lost = sum(sum(round_.losses.values()) for outcome in outcomes for round_ in outcome.rounds)
    assert lost + len(failed) == upstream.faults.total() - upstream.faults["stall"]
    assert sum(outcome.totals.retries for outcome in outcomes) == len(failed)
    lost_by_kind = {reason for outcome in outcomes for round_ in outcome.rounds for reason in round_.losses}
    assert lost_by_kind == {"truncated", "empty"}, "what is not a failure of the call is not tried again before the end"


def test_a_call_that_stalls_runs_out_of_time(start):
    upstream = start(fault_share=1.0)
    upstream.fault = lambda body: "stall"

    async def main():
        async with EndpointSampler(EndpointConfig(url=upstream.url)) as sampler:
            config = PacoreConfig(schedule=(), limits=RoundLimits(retries=0, call_seconds=0.3))
            await Coordinator(sampler, config).solve(Problem(id="p", messages=QUESTION))

    with pytest.raises(RoundFailedError, match="1 timeout"):
        asyncio.run(main())


def test_a_call_that_waits_for_its_turn_has_not_begun(start):
    """So that no time limit runs yet."""
    upstream, release = start(), threading.Event()
    upstream.answer = lambda body: release.wait(60) and {"content": "42"}

    async def main():
        async with EndpointSampler(EndpointConfig(url=upstream.url, max_concurrent=1, model="fake")) as sampler:
            async with sampler.prompt(QUESTION, (), answer_tokens=1) as prompt:
                listeners = [Listener(), Listener()]
                calls = [asyncio.create_task(sampler.sample(prompt, PARAMS, each)) for each in listeners]
                while not upstream.bodies:
                    await asyncio.sleep(0.01)
                began = [each.began is not None for each in listeners]
                release.set()
                await asyncio.gather(*calls)
                return began, [each.began is not None for each in listeners]

    assert asyncio.run(main()) == ([True, False], [True, True])


def test_a_prompt_beyond_the_context_is_refused_by_its_tokens(start, tokenizer_file):
    upstream = start()
    with pytest.raises(ContextLengthError) as caught:
        ask(upstream, messages=({"role": "user", "content": "word " * 50},), max_context=40, tokenizer=tokenizer_file)
    assert caught.value.excess > 0 and not upstream.bodies


def test_a_tokenizer_counts_and_cuts(tokenizer_file):
    tokens = FileTokens(tokenizer_file)
    text = "The answer is 42, surely."
    whole = tokens.count(text)
    assert 0 < whole <= len(text)
    for count in range(whole + 2):
        tail = tokens.tail(text, count)
        assert text.endswith(tail) and tokens.count(tail) <= max(count, 0)
    assert tokens.tail(text, 0) == "" and tokens.tail(text, whole) == text
    with pytest.raises(TokenError, match="nothing.json"):
        FileTokens("nothing.json")


@pytest.mark.parametrize(
    "fields", [{"url": "localhost:8000"}, {"max_concurrent": 0}, {"max_context": 100}, {"silence_seconds": 0.0}]
)
def test_endpoints_that_cannot_work(fields):
    with pytest.raises(ConfigError):
        EndpointConfig(**{"url": "http://x", **fields})


@pytest.fixture(scope="module")
def odd():
    """An endpoint that answers as each test says."""
    with serving(Upstream()) as upstream:
        yield upstream


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "usage", ["many", [7], {"prompt_tokens": "7", "completion_tokens": -1, "prompt_tokens_details": "x"}]
    + [dict.fromkeys(("prompt_tokens", "completion_tokens"), value) for value in (7.5, 1e300, 10**400, True, None, {})],
)  # fmt: skip
def test_counts_that_are_none_are_not_said(odd, usage, streams):
    odd.responds = lambda body: answering(body, usage=usage)
    reply = ask(odd, streams=streams)
    assert (reply.num_prompt_tokens, reply.num_cached_tokens, reply.num_tokens) == (0, 0, 1) and reply.content == "42"


def test_whole_floats_and_objects_are_what_they_mean(odd):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
    usage = {"prompt_tokens": 7.0, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4.0}}
    odd.responds = lambda body: answering(body, usage=usage, tool_calls=[call])
    for streams in (True, False):
        reply = ask(odd, streams=streams)
        counts = (reply.num_prompt_tokens, reply.num_cached_tokens, reply.num_tokens)
        assert counts == (7, 4, 9) and all(type(count) is int for count in counts)
        assert reply.tool_calls[0]["function"] == {"name": "f", "arguments": '{"x": [1]}'}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "fields, named",
    [
        ({"finish_reason": 1}, "finish_reason is 1"),
        ({"finish_reason": ["stop"]}, "finish_reason is"),
        ({"finish_reason": "\x1b[2J"}, "finish_reason is '\\\\x1b"),
        ({"finish_reason": "x" * 65}, "finish_reason is"),
        ({"content": ["42"]}, "content is"),
        ({"content": {"text": "42"}}, "content is"),
        ({"content": 42}, "content is 42"),
        ({"reasoning_content": [1]}, "reasoning_content is"),
        ({"tool_calls": "f()"}, "cannot be read"),
        ({"tool_calls": [3]}, "tool_calls is 3"),
        ({"tool_calls": [{"index": 0, "id": 5, "function": {"name": "f", "arguments": "{}"}}]}, "id is 5"),
        ({"tool_calls": [{"index": 0, "id": "a", "function": {"name": ["f"], "arguments": "{}"}}]}, "name is"),
        ({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": 7}}]}, "arguments is 7"),
        ({"tool_calls": [{"index": 10**9, "id": "a", "function": {"name": "f"}}]}, "tool_calls is"),
        ({"tool_calls": [{"index": "0", "id": "a", "function": None}]}, "tool_calls is"),
        ({"logprobs": {"content": [{"token": "a", "logprob": "-1"}]}}, "logprob is '-1'"),
        ({"logprobs": {"content": [{"token": "a", "logprob": float("-inf")}]}}, "logprob is -inf"),
        ({"logprobs": [1, 2]}, "cannot be read"),
    ],
)
def test_fields_of_other_types_are_a_failure_that_may_pass(odd, fields, named, streams):
    odd.responds = lambda body: answering(body, **fields)
    with pytest.raises(SamplerError, match=named) as caught:
        ask(odd, streams=streams, params=SamplingParams(seed=5, logprobs=0))
    assert caught.value.is_temporary


def _without_end(part, media_type="text/event-stream", pause=0.0, sent=None, **more):
    async def parts():
        while True:
            yield part
            if sent is not None:
                sent.append(len(part))
            await asyncio.sleep(pause)

    return StreamingResponse(parts(), media_type=media_type, **more)


_EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "on "}, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    "respond, named",
    [
        (lambda: _without_end(_EVENT), "the answer is longer than 100000 bytes"),
        (lambda: _without_end(b": still here\n\n"), "the answer is longer than 100000 bytes"),
        (lambda: _without_end(b"x" * 999), "a line of the answer is longer than 50000 bytes"),
        (lambda: _without_end(b"x" * 999, "application/json"), "the answer is longer than 100000 bytes"),
        (lambda: _without_end(b"x" * 999, "text/plain", status_code=400), "the answer is longer than 20000 bytes"),
        (lambda: _without_end(_EVENT, pause=0.05), "did not end within 0.4 s"),
        (lambda: _without_end(b" ", "application/json", pause=0.05), "did not end within 0.4 s"),
        (
            lambda: Response(
                gzip.compress(b"0" * 10**6), media_type="application/json", headers={"content-encoding": "gzip"}
            ),
            "compresses its answer ('gzip')",
        ),
        (lambda: Response(b"[" * 90_000, media_type="application/json"), ""),
        (lambda: Response(b"data: " + b"[" * 40_000 + b"\n\n", media_type="text/event-stream"), ""),
        (lambda: Response(b"data: [1]\n\n", media_type="text/event-stream"), ""),
        (lambda: JSONResponse(None), ""),
    ],
)  # fmt: skip
def test_answers_are_bounded_in_bytes_and_time(odd, monkeypatch, respond, named):
    monkeypatch.setattr("stepjax.rollouts.endpoint._MOST_LINE", 50_000)
    monkeypatch.setattr("stepjax.rollouts.endpoint._MOST_ERROR", 20_000)
    odd.responds = lambda body: respond()
    for streams in (True, False):
        with pytest.raises(SamplerError) as caught:
            ask(odd, streams=streams, max_response_bytes=100_000, answer_seconds=0.4 if "0.4" in named else 30)
        assert named in str(caught.value)


def test_the_text_of_an_answer_is_bounded(odd, monkeypatch):
    monkeypatch.setattr("stepjax.rollouts.endpoint_answer._MOST_TEXT", 1000)
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "x" * 990}}
    for fields in ({"content": "x" * 1001}, {"reasoning_content": "x" * 999}, {"tool_calls": [call] * 2}):
        odd.responds = lambda body, fields=fields: answering(body, **fields)
        with pytest.raises(SamplerError, match="longer than 1000 characters"):
            ask(odd)


def test_an_answer_without_end_does_not_fill_the_memory(odd):
    """With the limits that nobody has set."""
    sent, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    odd.responds = lambda body: _without_end(b"x" * (1 << 20), "application/json", sent=sent)
    with pytest.raises(SamplerError, match="longer than 134217728 bytes"):
        ask(odd, streams=False)
    assert sum(sent) < 256 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # kilobytes
