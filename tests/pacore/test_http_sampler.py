"""The sampler over HTTP against a real server, well-behaved and not."""

import asyncio
import base64

import pytest
from upstream import FAULTS, Upstream, serving

from stepjax.errors import ConfigError, ImageError, TokenError
from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import Limits, PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.events import AttemptFailed
from stepjax.pacore.http_sampler import Endpoint, FileTokens, HttpSampler
from stepjax.pacore.records import Problem
from stepjax.pacore.sampler import Listener, PromptTooLongError, SamplerError

QUESTION = ({"role": "user", "content": "What is 6 x 7?"},)
PARAMS = SamplingParams(seed=5, max_tokens=50, temperature=0.7)


def ask(upstream, *, params=PARAMS, messages=QUESTION, tools=(), pieces=None, **endpoint):
    async def main():
        async with HttpSampler(Endpoint(url=upstream.url, **endpoint)) as sampler:
            async with sampler.prompt(messages, tools, answer_tokens=10) as prompt:
                return await sampler.sample(prompt, params, Listener(pieces.append if pieces is not None else None))

    return asyncio.run(main())


@pytest.fixture
def start():
    with __import__("contextlib").ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(serving(Upstream(*args, **options)))


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_is_read_whole(start, streams):
    upstream, pieces = start(), []
    reply = ask(upstream, pieces=pieces, streams=streams, headers={"x-team": "a"}, body={"top_a": 0.1}, api_key="k")
    assert reply.content.strip() == r"It is \boxed{42}." and reply.reasoning.strip() == "hm, let me see"
    assert (reply.finish_reason, reply.prompt_tokens, reply.output_tokens) == ("stop", 7, 7)
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
    reply = ask(upstream, opens_thought=opens, streams=False)
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
    """Three in ten calls fail, stall, are cut off, are empty or break off."""
    upstream = start(fault_share=0.3)
    limits = Limits(retries=6, backoff_seconds=0.01, call_seconds=4.0)
    config = PacoreConfig(schedule=(6, 3), limits=limits)
    failed = []

    def notify(event):
        if isinstance(event, AttemptFailed):
            failed.append(event)

    async def main():
        async with HttpSampler(Endpoint(url=upstream.url, max_concurrent=64)) as sampler:
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
    assert lost + len(failed) == upstream.faults.total()
    assert sum(outcome.totals.retries for outcome in outcomes) == len(failed)
    lost_by_kind = {reason for outcome in outcomes for round_ in outcome.rounds for reason in round_.losses}
    assert lost_by_kind == {"truncated", "empty"}, "what is not a failure of the call is not tried again before the end"


def test_calls_that_wait_for_their_turn_do_not_run_out_of_time(start):
    upstream = start(fault_share=1.0, stall_seconds=0.4)
    upstream.fault = lambda body: "stall"
    limits = Limits(retries=0, call_seconds=1.5)

    async def main():
        async with HttpSampler(Endpoint(url=upstream.url, max_concurrent=1)) as sampler:
            config = PacoreConfig(schedule=(5,), limits=limits)
            return await Coordinator(sampler, config).solve(Problem(id="p", messages=QUESTION))

    outcome = asyncio.run(main())
    assert all(not round_.losses for round_ in outcome.rounds)
    starts = [each.start for each in outcome.rounds[0].trajectories]
    assert max(starts) - min(starts) > 1.5, "one after the other"
    assert all(0.3 < each.seconds < 1.5 for each in outcome.rounds[0].trajectories)


def test_a_prompt_beyond_the_context_is_refused_by_its_tokens(start, tokenizer_file):
    upstream = start()
    with pytest.raises(PromptTooLongError) as caught:
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
        Endpoint(**{"url": "http://x", **fields})
