"""Synthesis prompts: a random subset of a problem's messages, the same for an index, and what a cache must hold."""

import dataclasses
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest

from stepjax.config import SftConfig, SynthesisSource
from stepjax.config_file import load_recipe
from stepjax.data.records import open_source
from stepjax.errors import ConfigError, RecordError
from stepjax.post_training.config import RLConfig
from stepjax.rollouts.rollout import Rollout

IMAGE = {"type": "image", "image": "data:image/png;base64,AAAA"}
RESPONSES = [{"content": f"answer {i}", "reasoning": "hm", "reward": float(i == 3)} for i in range(5)]


def records(tmp_path, *lines, **fields):
    path = tmp_path / "cache.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"references": (2, 4), "template": "short"} | fields
    return open_source(SynthesisSource(name="own", weight=1.0, path=str(path), **settings), seed=3)


def problem(name="p", **fields):
    content = [{"type": "text", "text": "What?"}, IMAGE]
    return {"id": name, "messages": [{"role": "user", "content": content}], "answer": "answer 3"} | fields


def test_a_prompt_shows_some_of_the_messages_and_keeps_the_image(tmp_path):
    found = records(tmp_path, problem("p", responses=RESPONSES), problem("q", responses=["x", "y", "z"]))
    counts, shown = Counter(), set()
    for i in range(0, 100, 2):
        record = found[i]
        [message] = record["messages"]
        [image] = [item for item in message["content"] if item["type"] == "image"]
        [text] = [item["text"] for item in message["content"] if item["type"] == "text"]
        first, *lines = text.split("\n")
        assert first == "What?" and image == IMAGE and record["answer"] == "answer 3"
        assert record["id"] == f"p#{i // 2}" and record["cached"]["responses"] == RESPONSES
        texts = [line.removeprefix(f"Ref {number} ") for number, line in enumerate(lines, start=1)]
        assert len(set(texts)) == len(texts)
        assert record["reference_rewards"] == [float(text == "answer 3") for text in texts]
        counts[len(texts)] += 1
        shown |= set(texts)
    assert set(counts) == {2, 3, 4} and shown == {f"answer {i}" for i in range(5)}
    assert found[1]["reference_rewards"][0] is None
    assert len(found) == 2000


def test_record_i_is_the_same_every_time(tmp_path):
    found = records(tmp_path, problem(responses=RESPONSES))
    again = pickle.loads(pickle.dumps(found))
    assert [again[i] for i in reversed(range(8))] == [found[i] for i in range(8)][::-1]
    assert len({json.dumps(found[i]["messages"]) for i in range(8)}) > 4


def test_only_conclusions_are_shown(tmp_path):
    cut_off = Rollout(content="", reasoning="hm", finish_reason="length").to_json()
    assert "content" not in cut_off
    responses = ["<think>\n5\n</think>\n\nsix", cut_off, {"content": "", "reasoning": "hm"}, {"content": "seven"}]
    [message] = records(tmp_path, problem(responses=responses), references=(2, 2))[0]["messages"]
    [text] = [item["text"] for item in message["content"] if item["type"] == "text"]
    assert sorted(line[6:] for line in text.split("\n")[1:]) == ["seven", "six"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "has no responses: draw them"),
        ({"responses": ["one"]}, "has 1 usable responses, fewer than"),
        ({"responses": ["one", {"reasoning": "hm"}]}, r"responses\[1\] is .* give a text"),
        ({"responses": ["one", 2]}, r"responses\[1\] is 2; give a text"),
        ({"responses": [{"content": "a", "reward": "good"}, "b"]}, r"responses\[0\] is .* give a text"),
    ],
)
def test_caches_that_cannot_be_used(tmp_path, fields, message):
    with pytest.raises(RecordError, match=message):
        records(tmp_path, problem(**fields))[0]


@pytest.mark.parametrize("references", [(0, 3), (4, 2)])
def test_ranges_that_cannot_be(references):
    with pytest.raises(ConfigError, match=r"data.sources.own.references=.*give the fewest and the most"):
        SynthesisSource(name="own", weight=1.0, path="a", references=references)


def test_the_digits_recipes_train_on_prompts_of_one_form(tmp_path):
    """What fine-tuning shows a model of syntheses is what reinforcement learning and PaCoRe ask it."""
    recipes = Path(__file__).parents[2] / "configs" / "digits"
    [source] = load_recipe(recipes / "pacore_rl.py", RLConfig).data.sources
    digits = load_recipe(recipes / "sft.py", SftConfig).data.sources
    [synthesis] = (each for each in digits if each.name == "synthesis")
    [receipt] = (each for each in digits if each.name == "receipt")
    shown = open_source(synthesis, 0)[0]["messages"][0]["content"]

    asked = {"id": "a", "messages": open_source(receipt, 0)[0]["messages"][:-1], "responses": ["ok A1B2", "bad A1B3"]}
    for item in asked["messages"][0]["content"]:
        if item["type"] == "image":
            item["image"] = IMAGE["image"]
    path = tmp_path / "cache.jsonl"
    path.write_text(json.dumps(asked) + "\n")
    content = open_source(dataclasses.replace(source, path=str(path)), 0)[0]["messages"][0]["content"]
    assert [item["type"] for item in content] == [item["type"] for item in shown]
    form = r"Add up the receipt\.(\nRef \d (ok|bad) ([A-J]\d)+)+"
    assert all(re.fullmatch(form, item["text"]) for item in (*content, *shown) if item["type"] == "text")
