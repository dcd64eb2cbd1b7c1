"""`stepjax pacore cache`: whole after an interruption, filtered, from an engine or a server; and training on it."""

import dataclasses
import json

import pytest
from test_sampling import MESH, changed, collected, of_file, question
from tiny_rl import config
from upstream import Upstream, honest, serving, text_of

from stepjax.config import DataConfig, InitConfig, SynthesisSource
from stepjax.data.records import open_source
from stepjax.errors import CheckpointError, ConfigError
from stepjax.post_training import cache as module
from stepjax.post_training.cache import PacoreCache, draw
from stepjax.post_training.report import iteration_row
from stepjax.rollouts.endpoint import EndpointConfig
from stepjax.rollouts.rollout import Rollout

TRUTH = r"It is \boxed{42}."


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr("stepjax.sharding.make_mesh", lambda config: MESH)


def command(run, path, **options):
    run = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, prompts=2, samples=3))
    return PacoreCache(recipe="r.py", config=run, cache=path, **options)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(tmp_path):
    """Six questions, of which the server knows the answer to every other one."""
    questions = [question(f"question {i}", id=str(i), answer=TRUTH if i % 2 else "7", task="text") for i in range(6)]
    return of_file(tmp_path / "asked.jsonl", questions)


def test_a_server_draws_the_cache_and_the_filter_keeps_what_it_says(asked, tmp_path):
    with serving(Upstream()) as upstream:
        endpoint = EndpointConfig(url=upstream.url, model="fake")
        found = draw(command(asked, tmp_path / "all.jsonl", problems=6, upstream=endpoint))
        solved = draw(command(asked, tmp_path / "some.jsonl", problems=6, upstream=endpoint, above=0.5))
        short = draw(command(asked, tmp_path / "none.jsonl", problems=6, upstream=endpoint, messages=4))
    lines = lines_of(tmp_path / "all.jsonl")
    assert found["answered"] == found["kept"] == len(lines) == 6 and found["answers"] == 18
    assert found["reward"] == 9 and solved["kept"] == 3
    assert short["kept"] == 0 and short["short of messages"] == 6 and found["short of messages"] == 0
    assert {line["id"] for line in lines_of(tmp_path / "some.jsonl")} == {"1", "3", "5"}
    for line in lines:
        responses = [Rollout.from_json({k: v for k, v in each.items() if k != "reward"}) for each in line["responses"]]
        assert [each.content.strip() for each in responses] == [TRUTH] * 3 and len(
            {each.seed for each in responses}
        ) == 3
        assert line["accuracy"] == float(int(line["id"]) % 2) and line["messages"][0]["role"] == "user"


def test_interrupted_and_started_again_it_is_the_same(asked, tmp_path, monkeypatch):
    def without_times(path):
        lines = lines_of(path)
        for line in lines:
            for each in line["responses"]:
                for name in ("start", "seconds"):
                    each.pop(name, None)
        return lines

    with serving(Upstream()) as upstream:
        endpoint = EndpointConfig(url=upstream.url, model="fake")
        whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
        draw(command(asked, whole, problems=6, upstream=endpoint))
        saved = 0

        def replace(source, target):
            nonlocal saved
            saved += 1
            if saved == 2:  # killed after the lines were written and before the state was
                raise KeyboardInterrupt
            rename(source, target)

        rename = module.os.replace
        monkeypatch.setattr(module.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            draw(command(asked, broken, problems=6, upstream=endpoint))
        assert len(lines_of(broken)) == 4
        draw(command(asked, broken, problems=6, upstream=endpoint))
        assert without_times(broken) == without_times(whole)
        assert draw(command(asked, broken, problems=6, upstream=endpoint))["answered"] == 6
        grown = tmp_path / "grown.jsonl"
        for problems in (1, 3, 6):  # fewer than a round, which has two
            draw(command(asked, grown, problems=problems, upstream=endpoint))
        assert without_times(grown) == without_times(whole)
        upstream.bodies.clear()
        draw(command(asked, broken, problems=6, upstream=endpoint))
        assert not upstream.bodies  # nothing was left to draw
        with pytest.raises(CheckpointError, match="drawn with another rollout"):
            draw(command(changed(asked, rollout=dict(max_tokens=5)), broken, problems=6, upstream=endpoint))
    (tmp_path / "broken.jsonl.state").unlink()
    with pytest.raises(CheckpointError, match=r"exists, but not .*\.state: name another --cache"):
        draw(command(asked, broken, problems=6, upstream=endpoint))
    for name, value in (("problems", 0), ("messages", -1)):
        with pytest.raises(ConfigError, match=f"--{name} {value}"):
            command(asked, broken, **{name: value}).run()


def test_a_problem_with_too_few_messages_is_left_out(asked, tmp_path):
    """Such as those of a model that seldom finishes its reasoning; training on the cache would refuse them."""

    def cut_off(body):
        if text_of(body["messages"]) == "question 0":
            return {"content": None, "reasoning": "so long a thought that", "finish_reason": "length"}
        return honest(body)

    path = tmp_path / "cache.jsonl"
    with serving(Upstream(cut_off)) as upstream:
        endpoint = EndpointConfig(url=upstream.url, model="fake")
        found = draw(command(asked, path, problems=6, upstream=endpoint))
        everything = draw(command(asked, tmp_path / "all.jsonl", problems=6, upstream=endpoint, messages=0))
    assert (found["kept"], found["short of messages"]) == (5, 1) and everything["kept"] == 6
    records = open_source(SynthesisSource(name="s", weight=1.0, path=str(path), references=(2, 3)), 0)
    assert len({records[i]["id"].split("#")[0] for i in range(5)}) == 5


def test_an_engine_draws_pictures_and_training_reads_them(tmp_path):
    run = dataclasses.replace(config, init_from=InitConfig())
    path = tmp_path / "cache.jsonl"
    found = draw(command(run, path, problems=4, messages=0))
    assert found["answered"] == found["kept"] == 4
    source = SynthesisSource(name="syntheses", weight=1.0, path=str(path), references=(1, 3), template="short")
    # The model is random: give each problem messages that can be read, one of them right.
    lines = lines_of(path)
    assert any("data:image/png" in json.dumps(line["messages"]) for line in lines)
    for line in lines:
        line["responses"] = [{"content": "8", "reward": 0.0}, {"content": "Ref 1 is right", "reward": 1.0}, "9"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    synthesis = changed(run, data=DataConfig(sources=(source,)), batch=dict(tokens=256))
    assert "\nRef 1 " in json.dumps(open_source(source, 0)[0]["messages"]).replace("\\n", "\n")
    _, made = collected(synthesis)
    assert all(episode.record["reference_rewards"] for episode in made.episodes)
    row = iteration_row(synthesis, made, {"episodes": made.episodes}, seconds=1.0)
    # A message without a reward is not known to be wrong.
    wrong = [len(each.answers) for each in made.episodes if set(each.record["reference_rewards"]) == {0.0}]
    assert row["synthesis/cites"] == 0.0
    assert row["synthesis/all_wrong"] == sum(wrong) / sum(len(each.answers) for each in made.episodes)
    # The second filter: how often the syntheses are right decides which problems stay, with the messages they had.
    kept = tmp_path / "kept.jsonl"
    found = draw(command(synthesis, kept, problems=2))
    assert found["kept"] == 2
    for line in lines_of(kept):
        assert line["responses"] == lines[0]["responses"] and 0 <= line["synthesis_accuracy"] <= 1
