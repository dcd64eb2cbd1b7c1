import json

import openai
import pytest
from fake_engine import FakeEngine, greeting
from running_server import chat_body, picture, running

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def ask(text="hi", *images):
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_a_whole_answer_has_openais_fields(client, server):
    answer = client.chat.completions.create(
        model="tiny", messages=ask("hi", picture()), n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for index, choice in enumerate(answer.choices):
        assert choice.message.content == f"Hello, world {index}!"
        assert choice.message.reasoning_content == "Let me see."
        assert choice.message.role == "assistant" and choice.message.tool_calls is None
        assert choice.finish_reason == "stop"
        assert len(choice.logprobs.content) == 9
        assert [top.logprob for top in choice.logprobs.content[0].top_logprobs] == [-0.5, -1.5]
    prompt, params = server.engine.served[-1]
    assert len(prompt.global_views) == 1 and params.n == 2 and params.logprobs == 2
    assert answer.usage.prompt_tokens == len(prompt.tokens)
    assert answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny" and answer.object == "chat.completion"


def test_a_streamed_answer_adds_up_to_the_whole_one(client):
    stream = client.chat.completions.create(
        model="tiny", messages=ask(), n=2, stream=True, logprobs=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    content, reasoning, tokens, ends = ["", ""], ["", ""], [0, 0], {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None and len(chunk.choices) == 1
        (choice,) = chunk.choices
        content[choice.index] += choice.delta.content or ""
        reasoning[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
        tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert content == ["Hello, world 0!", "Hello, world 1!"] and reasoning == ["Let me see."] * 2
    assert tokens == [9, 9] and ends == {0: "stop", 1: "stop"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 18
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    assert len({chunk.id for chunk in chunks}) == 1
    first_content = next(i for i, c in enumerate(chunks) if c.choices and c.choices[0].delta.content)
    first_reasoning = next(
        i for i, c in enumerate(chunks) if c.choices and getattr(c.choices[0].delta, "reasoning_content", None)
    )
    assert first_reasoning < first_content


def test_a_stream_is_server_sent_events(server):
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def tool_script(prompt, params, sample):
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
    text = f"hm</think>\n\nI look.\n<tool_calls>\n{call}\n{call}\n</tool_calls>"
    return [text[i : i + 7] for i in range(0, len(text), 7)]


def test_tool_calls_are_parsed_whole_and_streamed(processor):
    with (
        running(processor, FakeEngine(tool_script)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model="tiny", messages=ask(), tools=[TOOL]).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.content == "I look."
        assert [call.function.name for call in whole.message.tool_calls] == ["look", "look"]
        assert json.loads(whole.message.tool_calls[0].function.arguments) == {"at": "é"}
        # What comes back is a message to go on with.
        again = [*ask(), whole.message.model_dump(), {"role": "tool", "tool_call_id": "x", "content": "a cat"}]
        client.chat.completions.create(model="tiny", messages=again, tools=[TOOL])
        rendered = processor.decode(server.engine.served[-1][0].tokens, skip_special=False)
        assert "a cat" in rendered and '{"name": "look", "arguments": {"at": "é"}}' in rendered

        content, calls, ends = "", [], []
        for chunk in client.chat.completions.create(model="tiny", messages=ask(), tools=[TOOL], stream=True):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            calls += delta.tool_calls or []
            ends.append(chunk.choices[0].finish_reason)
        assert content == "I look." and ends[-1] == "tool_calls"
        assert [(call.index, call.function.name) for call in calls] == [(0, "look"), (1, "look")]
        assert len({call.id for call in calls}) == 2

        # Without tools, or with them switched off, markup is text.
        for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
            message = client.chat.completions.create(model="tiny", messages=ask(), **fields).choices[0].message
            assert message.tool_calls is None and "<tool_call>" in message.content
            assert "# Tools" not in processor.decode(server.engine.served[-1][0].tokens)


def test_thinking_can_be_switched_off(server, processor):
    server.engine.script = lambda *_: ["4"]
    try:
        off = server.chat(chat_template_kwargs={"enable_thinking": False}).json()["choices"][0]["message"]
        on = server.chat().json()["choices"][0]["message"]
    finally:
        server.engine.script = greeting
    assert off == {"role": "assistant", "content": "4"}
    assert on == {"role": "assistant", "content": "", "reasoning_content": "4"}
    prompt = processor.decode(server.engine.served[-2][0].tokens, skip_special=False)
    assert prompt.endswith("<think>\n\n</think>\n")


def test_sampling_fields_reach_the_engine(server):
    fields = dict(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=7, stop=["a", "b"], stop_token_ids=[5], ignore_eos=True,
        max_completion_tokens=4, frequency_penalty=0, response_format={"type": "text"}, logit_bias=None, user="me",
    )  # fmt: skip
    answer = server.chat(**fields)
    assert answer.json()["choices"][0]["finish_reason"] == "length", answer.text
    _, params = server.engine.served[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 0, 0.1, 7)
    assert (params.stop, params.stop_ids, params.ignore_eos, params.max_tokens) == (("a", "b"), (5,), True, 4)


@pytest.mark.parametrize(
    "fields, param, part",
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "look"}}}, "tool_choice", "tool_choice="),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty=0.5 is not supported"),
        ({"presence_penalty": False}, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"temperature": -1}, "temperature", "must be 0 or more"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 1000}, "n", "limit of 64"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"seed": 2**64}, "seed", "64 bits"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"top_logprobs": 3}, "top_logprobs", "set it to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "not a known field"),
        ({"chat_template_kwargs": {"think": True}}, "chat_template_kwargs.think", "not a known field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages[0].content[0].type", "audio"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/hostname"}]}]},
         "messages[0].content[0].type", "'image'"),
        ({"messages": [{"role": "user"}]}, None, "content"),
        ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, None, "only an assistant"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
        ({"max_tokens": 10**6}, None, "too long"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(server, fields, param, part):
    body = json.dumps({**chat_body(), **fields}).encode()
    response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error", error
    assert part in error["message"] and error["param"] == param, error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "url, status, part",
    [
        ("data:image/png;base64,aGVsbG8=", 400, "not an image"),
        ("data:image/png;base64,a", 400, "base64"),
        ("data:text/plain;base64,aGk=", 400, "not a data URI"),
        ("data:image/png,xx", 400, "base64"),
        ("https://example.com/a.png", 400, "not fetched"),
        ("/etc/hostname", 400, "not fetched"),
        ("file:///etc/hostname", 400, "not fetched"),
    ],
)
def test_invalid_images_are_refused(server, url, status, part):
    response = server.chat([{"type": "image_url", "image_url": {"url": url}}])
    assert response.status_code == status and part in response.json()["error"]["message"], response.text


def test_another_model_is_not_found(server):
    response = server.chat(model="gpt-4")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_models_are_listed_with_their_pacore_names(client):
    suffixes = ["", ":pacore-low", ":pacore-medium", ":pacore-high"]
    assert [model.id for model in client.models.list()] == [f"tiny{suffix}" for suffix in suffixes]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def merged(deltas):
    """A message, as clients put it together of a stream: texts appended, calls by their index, and all else kept."""
    message = {}
    for delta in deltas:
        for name, value in delta.items():
            if name == "tool_calls":
                message.setdefault(name, []).extend(value)
            else:
                message[name] = message.get(name, "") + value if name != "role" else value
    return message


def test_what_the_server_answers_can_be_sent_back(processor):
    with (
        running(processor, FakeEngine(tool_script)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        answer = server.chat(tools=[TOOL]).json()["choices"][0]["message"]
        text = server.chat(tools=[TOOL], stream=True).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        streamed = merged(event["choices"][0]["delta"] for event in events)
        assert [call["index"] for call in streamed["tool_calls"]] == [0, 1]
        typed = client.chat.completions.create(model="tiny", messages=ask(), tools=[TOOL]).choices[0].message
        with client.chat.completions.stream(model="tiny", messages=ask(), tools=[TOOL]) as stream:
            final = stream.get_final_completion().choices[0].message
        prompts = []
        for message in (answer, streamed, typed.model_dump(), final.model_dump()):
            results = [{"role": "tool", "tool_call_id": call["id"], "content": "4"} for call in message["tool_calls"]]
            assert len(results) == 2
            body = {"messages": [*ask(), message, *results], "tools": [TOOL]}
            response = server.http.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            prompts.append(server.engine.served[-1][0].tokens.tolist())
        assert all(prompt == prompts[0] for prompt in prompts)


def test_fields_that_change_no_answer_change_no_prompt(server):
    def prompt(function=(), image=(), **fields):
        tool = {"type": "function", "function": {"name": "look", **dict(function)}}
        parts = [{"type": "image_url", "image_url": {"url": picture(), **dict(image)}}]
        assert server.chat(parts, tools=[tool], **fields).status_code == 200
        return server.engine.served[-1][0].tokens.tolist()

    plain = prompt()
    assert prompt({"strict": True, "description": None}, {"detail": "low"}, prompt_cache_key="x", metadata={}) == plain


@pytest.mark.parametrize(
    "text",
    [
        '{"\\ud800": 1}',
        '{"messages": [{"role": "user", "content": "x", "\\udc00": 1}]}',
        '{"messages": [{"role": "user", "content": "x"}], "model": "\\ud800"}',
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": '
        '{"name": "f", "parameters": {"\\ud800": "\\udfff"}}}]}',
        '{"messages": [{"role": "user", "content": "x"}], "temperature": 1e39}',
        '{"messages": [{"role": "user", "content": "x"}], "top_k": 2147483648}',
        '{"messages": [{"role": "user", "content": "x"}], "top_k": 1' + "0" * 400 + "}",
        '{"messages": [{"role": "user", "content": "x"}], "seed": Infinity}',
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": '
        '[{"function": {"name": "f", "arguments": "' + "[" * 100_000 + '"}}]}]}',
    ],
)
def test_what_no_number_or_text_can_be_is_the_clients_mistake(server, text):
    response = server.http.post(
        "/v1/chat/completions", content=text.encode(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400 and len(response.json()["error"]["message"]) < 2500, response.text
    assert server.chat().status_code == 200
