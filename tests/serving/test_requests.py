"""Requests as clients send them: what is taken, what is refused, and which field is named."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from stepjax.serving.errors import ApiError
from stepjax.serving.schemas import ChatRequest, CompletionRequest
from stepjax.serving.validation import has_more_values, parse_object, parse_request

URI = "data:image/png;base64,AAAA"
TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": URI}}
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"default": None}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def chat(**fields):
    return parse_request(ChatRequest, {"messages": [{"role": "user", "content": "hi"}], **fields})


def of_user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


def of_assistant(**fields):
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", **fields}]}


def refusal(kind, body):
    with pytest.raises(ApiError) as caught:
        parse_request(kind, body)
    error = caught.value
    assert error.status == 400 and error.param and error.param in error.message, error.message
    return error


@pytest.mark.parametrize(
    "fields, param, part",
    [
        # Content: text or a list of parts of two kinds.
        (of_user({**TEXT, "cache_controls": 1}), "messages[0].content[0].cache_controls", "not a known field"),
        (of_user(TEXT, {**IMAGE, "uuid": "x"}), "messages[0].content[1].uuid", "known fields: type, image_url"),
        (of_user({**IMAGE, "text": "x"}), "messages[0].content[0].text", "not a known field"),
        (of_user({**TEXT, "image_url": {}}), "messages[0].content[0].image_url", "not a known field"),
        (of_user({"type": "text"}), "messages[0].content[0].text", "is missing"),
        (of_user({"type": "text", "text": 5}), "messages[0].content[0].text", "=5: input should be a valid string"),
        (of_user({"type": "image_url", "image_url": {"url": URI, "size": 1}}),
         "messages[0].content[0].image_url.size", "not a known field"),
        (of_user({"type": "image_url", "image_url": {"url": URI, "detail": "huge"}}),
         "messages[0].content[0].image_url.detail", "'low'"),
        (of_user({"type": "image_url", "image_url": URI}), "messages[0].content[0].image_url", "give an object"),
        (of_user({"type": "video_url"}), "messages[0].content[0].type", "give 'text', 'image_url' or 'features'"),
        (of_user({"type": "<text>", "text": "x"}), "messages[0].content[0].type", "give 'text'"),
        (of_user({"text": "hi"}), "messages[0].content[0].type", "is missing"),
        (of_user({"type": 5}), "messages[0].content[0].type", "=5"),
        (of_user("hi"), "messages[0].content[0]", "='hi': give an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "=5: give a string or a list"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content", "give a string or a list"),
        ({"messages": [5]}, "messages[0]", "=5: give an object"),
        ({"messages": [None]}, "messages[0]", "=None: give an object"),
        (of_assistant(tool_calls=[{**CALL, "function": {"name": "f", "argument": "{}"}}]),
         "messages[1].tool_calls[0].function.argument", "did you mean 'arguments'?"),
        (of_assistant(audio={"id": "x"}), "messages[1].audio", "not supported"),
        (of_assistant(function_call={"name": "f"}), "messages[1].function_call", "not supported"),
        (of_assistant(refusal="no"), "messages[1].refusal", "not supported"),
        (of_assistant(contents="x"), "messages[1].contents", "did you mean 'content'?"),
        # Other fields that take one thing or another.
        ({"stop": 5}, "stop", "=5: give a string or a list"),
        ({"stop": {"a": 1}}, "stop", "give a string or a list"),
        ({"stop": ["a", 5]}, "stop[1]", "=5"),
        ({"stop": [None]}, "stop[0]", "=None"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
        ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice", "'none' or 'auto'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", 'give {"type": "text"}'),
        ({"pacore": {"schedule": 5}}, "pacore.schedule", "=5: give a string or a list"),
        ({"pacore": {"schedule": ["x"]}}, "pacore.schedule[0]", "'x'"),
        ({"tools": [{"type": "custom", "function": FUNCTION}]}, "tools[0].type", "'custom'"),
        ({"tools": [{**TOOL, "functions": 1}]}, "tools[0].functions", "did you mean 'function'?"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "or give false"),
        # What would change the answer, and cannot.
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"service_tier": "priority"}, "service_tier", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"min_tokens": 3}, "min_tokens", "not supported"),
        ({"presence_penalty": 0.1}, "presence_penalty", "not supported"),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_named_as_the_client_wrote_it(fields, param, part):
    error = refusal(ChatRequest, {"messages": [{"role": "user", "content": "hi"}], **fields})
    assert error.param == param and part in error.message, error.message


@pytest.mark.parametrize(
    "prompt, param",
    [(5, "prompt"), ({}, "prompt"), ([1, "x"], "prompt[1]"), (["x", 1], "prompt[1]"), ([[1], ["x"]], "prompt[1][0]")]
    + [([None], "prompt[0]"), ([1.5], "prompt[0]"), ([[1], 2], "prompt[1]"), ([10**30], "prompt[0]")],
)
def test_prompts_of_the_wrong_kind_are_refused(prompt, param):
    assert refusal(CompletionRequest, {"prompt": prompt}).param == param


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, 100.5, 1e39, 10**400, float("nan"), float("inf"), True, "1"]),
        ("top_p", [0, -1, 1.1, float("nan"), 10**400]),
        ("min_p", [-0.1, 1.1, float("inf")]),
        ("top_k", [-2, 2**31, 2**63, 10**400, 1.5]),
        ("n", [0, -1, 2**16 + 1, 10**400]),
        ("seed", [2**64, -(2**63) - 1, 10**400, 0.5]),
        ("max_tokens", [0, -1, 2**31, 10**400]),
        ("max_completion_tokens", [0, 2**31, 10**400]),
        ("top_logprobs", [-1, 21, 10**400]),
        ("stop", ["", ["x"] * 17, ["x" * 257], "x" * 257, ["a", ""]]),
        ("stop_token_ids", [[-1], [2**31], [10**400], [1] * 257]),
    ],
)
def test_every_number_is_bounded_where_it_enters(name, values):
    for value in values:
        error = refusal(ChatRequest, {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, name: value})
        assert error.param.partition("[")[0] == name, error.message
        assert len(error.message) < 500


@pytest.mark.parametrize(
    "fields",
    [
        # Null is as if left out, at every depth.
        {name: None for name in (*ChatRequest.model_fields, "logit_bias", "functions") if name != "messages"},
        of_user({"type": "image_url", "image_url": {"url": URI, "detail": None}, "text": None}),
        of_user({**TEXT, "image_url": None, "cache_control": None}),
        {"stream_options": {"include_usage": None}},
        {"tools": [{**TOOL, "function": {"name": "f", "description": None, "parameters": None, "strict": None}}]},
        {"messages": [{"role": "user", "content": "hi", "name": None, "tool_calls": None, "tool_call_id": None}]},
        {"pacore": {"schedule": None, "include": None}},
        {"chat_template_kwargs": {"enable_thinking": None}},
        # Values that change nothing.
        {"tools": [], "tool_choice": "auto"},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"logprobs": False, "top_logprobs": 0},
        {"top_logprobs": 0},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stop": [], "stop_token_ids": [], "n": 1, "logit_bias": {}, "response_format": {"type": "text"}},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "parallel_tool_calls": True},
        {"modalities": ["text"], "functions": [], "function_call": "none", "min_tokens": 0, "priority": 0},
        {"reasoning_effort": "medium", "verbosity": "medium", "service_tier": "auto", "store": False},
        # Fields that change no answer.
        {"prompt_cache_key": "x", "safety_identifier": "x", "user": "me", "metadata": {"a": "b"}},
        *(of_user({"type": "image_url", "image_url": {"url": URI, "detail": d}}) for d in ("auto", "low", "high")),
        {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}], "cache_control": {"type": "ephemeral"}},
        {"messages": [{"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]},
        # What servers stream and answer.
        of_assistant(tool_calls=[{"index": 0, **CALL}], content=None),
        of_assistant(tool_calls=[], refusal=None, audio=None, annotations=[], function_call=None),
        of_assistant(tool_calls=[{**CALL, "function": {"name": "f", "arguments": ""}}]),
        of_assistant(tool_calls=[{**CALL, "function": {"name": "f" * 1000}}]),
    ],
)  # fmt: skip
def test_nulls_neutral_values_and_echoes_are_taken(fields):
    request = chat(**fields)
    dumped = request.model_dump_json(exclude_none=True)
    assert not any(name in dumped for name in ("cache_control", "index", "annotations", "refusal"))
    # What is passed on to other servers is taken by this one again.
    parse_request(ChatRequest, from_json(dumped))


def test_nulls_of_schemas_stay():
    (tool,) = chat(tools=[TOOL]).tools
    assert tool.model_dump(exclude_none=True)["function"]["parameters"] == FUNCTION["parameters"]


def test_arguments_that_are_left_out_are_an_empty_object():
    calls = [{**CALL, "function": {"name": "f", **given}} for given in ({}, {"arguments": ""}, {"arguments": " "})]
    request = chat(**of_assistant(tool_calls=calls))
    assert [call.function.arguments for call in request.messages[1].tool_calls] == ["{}"] * 3


@pytest.mark.parametrize(
    "body, part",
    [
        ({"tools": [{"type": "function", "function": {"name": "f" * 65}}]}, "at most 64"),
        ({"tools": [TOOL] * 513}, "at most 512"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [float("inf")]}}}]}, "finite"),
        ({"messages": [{"role": "user", "content": ""}] * 8193}, "8193 messages, parts and tool calls"),
        (of_user(*[TEXT] * 8192), "8193 messages"),
        (of_assistant(tool_calls=[CALL] * 8191), "8193 messages"),
        ({"x" * 10**7: 1}, "not a known field"),
        ({"messages": [{"role": "user", "content": "hi", "x" * 10**7: 1}]}, "not a known field"),
    ],
)
def test_counts_are_bounded_first(body, part):
    error = refusal(ChatRequest, {"messages": [{"role": "user", "content": "hi"}], **body})
    assert part in error.message and len(error.message) < 1000


@pytest.mark.parametrize(
    "text, count",
    [
        (b'{"a": [1, 2, {"b": 3}]}', 6),
        (b'{"a": ",:{[,:{[,:{["}', 2),
        (b'{"a": "\\",\\",\\",\\\\", "b": 1}', 4),
    ],
)
def test_values_are_counted_outside_of_texts(text, count):
    """To within a factor of two."""
    assert not has_more_values(text, count) and has_more_values(text, count // 3)
    parse_object(text, count)
    with pytest.raises(ApiError, match="more than 0 values"):
        parse_object(text, 0)


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 10**6, b'{"a": "' + b"\\" * 10**6, b'"",' * 10**6, b'""' * 10**6])
def test_counting_takes_no_time_whatever_is_broken(body):
    has_more_values(body + b"," * 100, 50)


@pytest.mark.parametrize(
    "text",
    ['{"model": "\\ud800"}', '{"\\udfff": 1}', '{"tools": [{"a": "\\ud83dx"}]}', '{"a": 1} x', '{"a": 01}', "\ufeff{}"]
    + ["[1]", '{"a": ' + "9" * 5000 + "}", "[" * 500],
)
def test_bodies_that_are_no_json_are_refused(text):
    with pytest.raises(ApiError) as caught:
        parse_object(text.encode(), 1000)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"


def test_errors_are_valid_utf8():
    error = ApiError(400, "\ud800" * 10_000, param="\udfff")
    assert len(error.response().body) < 20_000 and json.loads(error.response().body)["error"]["param"] == "\\udfff"


# Fuzzing --------------------------------------------------------------------------------------------------------------

_VALID = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [TEXT, IMAGE]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
    ],
    "tools": [TOOL],
    "stop": ["a"],
    "logit_bias": {},
    "stream_options": {"include_usage": True},
    "pacore": {"schedule": [2], "quorum": 0.5, "include": "full"},
    **{"temperature": 1, "top_k": 5, "top_p": 0.5, "seed": 1, "n": 1, "logprobs": True, "top_logprobs": 2},
}
_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just([]), st.just({}), st.just(""),
    st.sampled_from([1e39, 10**40, -(2**63), 2**31, "x" * 1000, [[]], {"": 0}, {"type": "text"}, [None]]),
    st.recursive(st.text() | st.none(), lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=8),
)  # fmt: skip


@st.composite
def mutated(draw, value=_VALID):
    """A valid request of which a place or two hold something else."""

    def change(value, depth):
        if depth == 0 or not isinstance(value, (dict, list)) or not value:
            return draw(_ODD)
        if isinstance(value, list):
            i = draw(st.integers(0, len(value) - 1))
            return [*value[:i], change(value[i], depth - 1), *value[i + 1 :]]
        name = draw(st.sampled_from(sorted(value)) | st.text())
        return {**value, name: change(value.get(name), depth - 1)}

    for _ in range(draw(st.integers(1, 2))):
        value = change(value, draw(st.integers(1, 6)))
    return value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_whatever_is_sent_is_taken_or_refused(body):
    for kind in (ChatRequest, CompletionRequest):
        try:
            parse_request(kind, parse_object(json.dumps(body).encode(), 10_000))
        except ApiError as error:
            assert error.status == 400 and error.response().body
