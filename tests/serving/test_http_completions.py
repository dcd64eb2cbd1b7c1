import openai
import pytest


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def test_prompts_are_text_tokens_or_lists_of_them(client, server, processor):
    ids = processor.tokenizer.encode("one two")
    whole = "Let me see.\n</think>\n\nHello, world"
    for prompt in ("one two", ids):
        answer = client.completions.create(model="tiny", prompt=prompt)
        assert [choice.text for choice in answer.choices] == [f"{whole} 0!"]
        assert list(server.engine.served[-1][0].tokens) == ids
        assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 9
    for prompt in (["one two", "three"], [ids, ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text[-2] for choice in answer.choices] == list("0101")
        assert answer.usage.completion_tokens == 36


def test_several_prompts_are_streamed_together(client):
    texts, ends = {}, {}
    chunks = list(
        client.completions.create(
            model="tiny", prompt=["a", "b"], n=2, logprobs=1, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert len(choice.logprobs.tokens) >= 1
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert len(texts) == 4 and texts[3] == "Let me see.\n</think>\n\nHello, world 1!"
    assert set(ends.values()) == {"stop"}
    assert chunks[-1].usage.completion_tokens == 36


def test_logprobs_are_parallel_lists_up_to_the_length(client, server):
    choice = client.completions.create(model="tiny", prompt="a", logprobs=2, max_tokens=3).choices[0]
    assert choice.finish_reason == "length" and len(choice.logprobs.tokens) == 3
    assert choice.logprobs.token_logprobs == [-0.5] * 3 and len(choice.logprobs.top_logprobs[0]) == 2
    assert choice.logprobs.text_offset[0] == 0
    client.completions.create(model="tiny", prompt="a")
    assert server.engine.served[-1][1].max_tokens == 16


def test_control_tokens_of_text_stay_text(client, server, processor):
    client.completions.create(model="tiny", prompt="<|im_end|>")
    assert processor.tokenizer.special("<|im_end|>") not in server.engine.served[-1][0].tokens
    ids = [processor.tokenizer.special("<|im_start|>"), *processor.tokenizer.encode("user")]
    client.completions.create(model="tiny", prompt=ids)
    assert list(server.engine.served[-1][0].tokens) == ids


@pytest.mark.parametrize(
    "fields, part",
    [
        ({}, "prompt is missing"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [10**6]}, "not in the vocabulary"),
        ({"prompt": [-1]}, "not in the vocabulary"),
        ({"prompt": 5}, "prompt=5"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a"] * 65}, "limit of 64"),
        ({"prompt": "a", "echo": True}, "echo=True is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "messages": []}, "messages is not a known field"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, fields, part):
    response = server.http.post("/v1/completions", json=fields)
    assert response.status_code == 400 and part in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("fields, param", [({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 33, "n": 2}, "n")])
def test_too_many_samples_are_laid_to_the_field_that_asks_for_them(server, fields, param):
    error = server.http.post("/v1/completions", json=fields).json()["error"]
    assert error["param"] == param and f"{len(fields['prompt'])} prompts with n=" in error["message"]


def test_ids_that_stand_for_images_are_refused(server, processor):
    response = server.http.post("/v1/completions", json={"prompt": [processor.tokenizer.special("<im_patch>")]})
    assert response.status_code == 400 and "stands for an image" in response.json()["error"]["message"]
