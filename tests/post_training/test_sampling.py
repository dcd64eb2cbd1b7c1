"""Prompts, engines and rewards of an iteration."""

import asyncio
import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_rl import config

from stepjax.config import DataConfig, JsonlSource, MeshConfig
from stepjax.errors import CheckpointError, ConfigError, RecordError
from stepjax.models.step_vl import init_model
from stepjax.post_training.config import RLConfig, RolloutConfig
from stepjax.post_training.episodes import Episode
from stepjax.post_training.loop import Trainer
from stepjax.post_training.report import iteration_row
from stepjax.post_training.sampling import Collector, Engines, Prompts
from stepjax.post_training.step import Programs, make_optimizers, new_state
from stepjax.processing.processor import Processor
from stepjax.rewards.config import RewardConfig, RewardTerm
from stepjax.rewards.scorer import MissingRewardsError, Scored
from stepjax.sharding import make_mesh

PROCESSOR = Processor.from_config(config.images, config.tokenizer)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def changed(base: RLConfig = config, **sections) -> RLConfig:
    """The configuration with fields of its sections replaced: changed(rollout=dict(samples=2))."""
    made = {
        name: dataclasses.replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(base, **made)


def of_file(path, records, **sections):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return changed(data=DataConfig(sources=(JsonlSource(name="own", weight=1.0, path=str(path)),)), **sections)


def question(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def prompt(prompts: Prompts, index: int) -> Episode:
    made = prompts[index]
    assert isinstance(made, Episode), made
    return made


def rewards_of(episode: Episode) -> list[float]:
    return [answer.scored.value for answer in episode.answers if answer.scored.value is not None]


def collected(config, model=None):
    collector = Collector(config, PROCESSOR, MESH)
    collector.engines.take(init_model(config.model, config.numerics, seed=1) if model is None else model)
    try:
        return collector, collector.collect(0)
    finally:
        collector.close()


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [{"top_p": 0.8}, {"top_k": 50}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_sampling_that_the_trainer_cannot_score_is_refused(wish):
    """Complaint 3: with top-p 0.8 the sampled tokens have other probabilities than the model's."""
    with pytest.raises(ConfigError, match=f"rollout.{next(iter(wish))}="):
        RolloutConfig(**wish)


def test_group_estimator_needs_a_group():
    with pytest.raises(ConfigError, match="rollout.samples=1"):
        changed(advantages=dict(estimator="grpo"), rollout=dict(samples=1))


def test_answers_must_fit_a_row():
    with pytest.raises(ConfigError, match="rollout.max_tokens=192"):
        changed(rollout=dict(max_tokens=192))


# Prompts -------------------------------------------------------------------------------------------------------------


def test_prompt_that_is_too_long_is_left_out_with_a_reason_and_never_cut():
    """Complaint 8: with an image, whose tokens must not be cut apart."""
    whole = Prompts(config, PROCESSOR)
    lengths = [len(prompt(whole, i).prompt.tokens) for i in range(20)]
    most = sorted(lengths)[10]
    limited = Prompts(changed(rollout=dict(max_prompt_tokens=most)), PROCESSOR)
    for i, length in enumerate(lengths):
        if length <= most:
            np.testing.assert_array_equal(prompt(limited, i).prompt.tokens, prompt(whole, i).prompt.tokens)
        else:
            assert f"its prompt has {length} tokens; at most {most}" in str(limited[i])


def test_skipped_prompts_are_counted_and_others_take_their_place():
    whole = Prompts(config, PROCESSOR)
    most = sorted(len(prompt(whole, i).prompt.tokens) for i in range(20))[10]
    limited = changed(rollout=dict(max_prompt_tokens=most))
    _, made = collected(limited)
    assert len(made.episodes) == config.rollout.prompts and made.cursor == len(made.episodes) + len(made.skipped)
    assert all(len(each.prompt.tokens) <= most for each in made.episodes)


def test_gold_answer_is_no_part_of_the_prompt():
    made = prompt(Prompts(config, PROCESSOR), 0)
    assert made.record["messages"][-1]["role"] == "assistant"
    assert PROCESSOR.decode(made.prompt.tokens.tolist()).rstrip().endswith("assistant")


def test_malformed_record_stops_the_run_or_is_skipped(tmp_path):
    records = [{"text": "a document"}]
    with pytest.raises(RecordError, match="a prompt for sampling is a conversation"):
        Prompts(of_file(tmp_path / "a.jsonl", records), PROCESSOR)[0]
    lenient = of_file(tmp_path / "a.jsonl", records)
    lenient = changed(lenient, data=dict(bad_records="skip"))
    assert "a prompt for sampling is a conversation" in str(Prompts(lenient, PROCESSOR)[0])


def test_prompts_are_the_same_every_time_and_come_back_in_another_order(tmp_path):
    own = of_file(tmp_path / "a.jsonl", [question(f"number {n}", answer=str(n)) for n in range(8)])
    first, second = (Prompts(own, PROCESSOR) for _ in range(2))
    ids = [prompt(first, i).record["id"] for i in range(16)]
    assert ids == [prompt(second, i).record["id"] for i in range(16)]
    assert sorted(ids[:8]) == sorted(ids[8:]) == sorted(set(ids)) and ids[:8] != ids[8:]


# Engines -------------------------------------------------------------------------------------------------------------


def test_after_an_update_the_engine_answers_like_a_fresh_one():
    """Complaint 15: no stale weights, and no keys, values or image features of the old ones."""
    old, new = (init_model(config.model, config.numerics, seed=seed) for seed in (1, 2))
    prompts = [prompt(Prompts(config, PROCESSOR), i) for i in range(3)]

    def answers(engines):
        found = {}
        asyncio.run(engines.sample(prompts, lambda episode, rollouts: found.update({episode.index: rollouts})))
        return [(r.token_ids, r.logprobs) for index in sorted(found) for r in found[index]]

    updated, fresh = Engines(config, PROCESSOR, MESH), Engines(config, PROCESSOR, MESH)
    updated.take(old)
    before = answers(updated)
    updated.take(new)
    fresh.take(new)
    after, wanted = answers(updated), answers(fresh)
    assert [ids for ids, _ in after] == [ids for ids, _ in wanted] != [ids for ids, _ in before]
    for (_, found), (_, expected) in zip(after, wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_engines_keep_their_weights_while_the_trainer_donates_its_own():
    model = init_model(config.model, config.numerics, seed=1)
    engines = Engines(config, PROCESSOR, MESH)
    engines.take(model)
    jax.tree.map(lambda leaf: leaf.delete(), model)
    done = []
    asyncio.run(engines.sample([prompt(Prompts(config, PROCESSOR), 0)], lambda *answered: done.append(answered)))
    assert len(done[0][1]) == config.rollout.samples


def test_answers_do_not_depend_on_the_number_and_size_of_engines():
    wide = dataclasses.replace(config.model.decoder, num_heads=4, num_kv_heads=2)
    wide = changed(model=dataclasses.replace(config.model, decoder=wide))
    model = init_model(wide.model, wide.numerics, seed=1)
    prompts = [prompt(Prompts(wide, PROCESSOR), i) for i in range(5)]

    def answers(devices, tensor):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        engines = Engines(changed(wide, rollout=dict(tensor=tensor)), PROCESSOR, mesh)
        assert len(engines) == devices // tensor
        engines.take(model)
        found = {}
        asyncio.run(engines.sample(prompts, lambda episode, rollouts: found.update({episode.index: rollouts})))
        return [rollout.token_ids for index in sorted(found) for rollout in found[index]]

    assert answers(1, 1) == answers(2, 1) == answers(2, 2)


def test_engines_must_divide_the_devices():
    with pytest.raises(ConfigError, match="rollout.tensor=3: must divide the 1 devices"):
        Engines(changed(rollout=dict(tensor=3)), PROCESSOR, MESH)


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_trainer_gives_the_answers_the_probabilities_that_they_were_sampled_with(temperature):
    """Complaint 4: at any temperature the first ratio is 1, with images and shared prompts."""
    warm = changed(rollout=dict(temperature=temperature))
    model = init_model(warm.model, warm.numerics, seed=1)
    _, made = collected(warm, model)
    trainer = Trainer(warm, MESH, Programs(warm, make_optimizers(warm)), None)
    with jax.set_mesh(MESH):
        state = new_state(model, config=warm, optimizers=make_optimizers(warm))
        trainer._score(state, made.episodes)
    answers = [answer for episode in made.episodes for answer in episode.answers]
    assert len(answers) == 16 and any(len(episode.prompt.crops) for episode in made.episodes)
    for answer in answers:
        np.testing.assert_allclose(answer.old_L, answer.sampler_L, atol=3e-5)
        plain = np.array(answer.rollout.logprobs)
        assert (temperature == 1.0) == np.allclose(plain, answer.sampler_L, atol=1e-4)


def test_answer_that_was_cut_off_gains_no_end_and_is_flagged():
    """Complaint 19; and one that ended keeps the token that ended it."""
    stop = set(PROCESSOR.stop_ids)
    _, made = collected(changed(rollout=dict(max_tokens=60, samples=8)))
    answers = [answer for episode in made.episodes for answer in episode.answers]
    cut = [answer for answer in answers if answer.is_truncated]
    ended = [answer for answer in answers if not answer.is_truncated]
    assert cut and ended
    assert all(len(answer.rollout.token_ids) == 60 and not stop & set(answer.rollout.token_ids) for answer in cut)
    assert all(answer.rollout.token_ids[-1] in stop for answer in ended)
    assert all(answer.rollout.num_tokens == len(answer.rollout.token_ids) - 1 for answer in ended)
    row = iteration_row(config, made, {"episodes": made.episodes}, seconds=1.0)
    assert row["truncated"] == len(cut) / len(answers)


def test_missing_reward_is_left_out_and_counted(tmp_path):
    """Complaint 14: it is not a reward of 0."""
    gold = {"verifier": "count", "answer": "many"}  # no number, so no verdict
    records = [question("a", answer="7"), question("b", **gold)]
    own = of_file(tmp_path / "a.jsonl", records, reward=RewardConfig(max_missing=1.0))
    _, made = collected(own)
    values = {e.record["messages"][0]["content"]: [a.scored.value for a in e.answers] for e in made.episodes}
    assert set(values["b"]) == {None} and None not in values["a"]
    trained = Trainer(own, MESH, Programs(own, make_optimizers(own)), None)._trained(made.episodes)
    assert {e.record["messages"][0]["content"] for e in trained} == {"a"}
    row = iteration_row(own, made, {"episodes": trained}, seconds=1.0)
    assert row["missing"] == 0.5 and row["reward"] == np.mean([value or 0 for value in values["a"]])
    with pytest.raises(MissingRewardsError, match="rewards are missing"):
        collected(changed(own, reward=RewardConfig(max_missing=0.2, missing_window=8)))


def test_filter_that_never_fills_the_batch_ends_and_says_so(tmp_path):
    """Complaint 17: no answer is ever right, so no group is mixed."""
    own = of_file(tmp_path / "a.jsonl", [question("a", answer="never this")], rollout=dict(keep_mixed=True))
    _, made = collected(own)
    assert made.rounds == own.rollout.max_rounds and not made.episodes
    assert made.dropped == made.rounds * own.rollout.prompts == made.cursor


def test_filter_keeps_mixed_groups_and_samples_others_in_place_of_the_rest(tmp_path):
    # A random model answers with any of these letters now and then.
    letters = [chr(code) for code in range(32, 127)]
    records = [question("a", answer=letters), question("b", answer="never this")]
    own = of_file(tmp_path / "a.jsonl", records, rollout=dict(keep_mixed=True, max_tokens=1, samples=8, max_rounds=20))
    _, made = collected(own)
    assert {e.record["messages"][0]["content"] for e in made.episodes} == {"a"} and made.dropped > 0
    assert len(made.episodes) == own.rollout.prompts
    for episode in made.episodes:
        assert 0 < sum(rewards_of(episode)) < len(episode.answers)


def test_waiting_answers_survive_json_and_notice_changed_prompts(tmp_path):
    records = [question(f"number {n}", answer=str(n)) for n in range(6)]
    own = of_file(tmp_path / "a.jsonl", records)
    collector, made = collected(own)
    saved = json.loads(json.dumps(collector.to_json(made)))
    again = Collector(own, PROCESSOR, MESH).from_json(saved)
    assert [e.index for e in again.episodes] == [e.index for e in made.episodes] and again.cursor == made.cursor
    for old, new in zip(made.episodes, again.episodes, strict=True):
        np.testing.assert_array_equal(old.prompt.tokens, new.prompt.tokens)
        for a, b in zip(old.answers, new.answers, strict=True):
            assert a.rollout == b.rollout and a.scored == b.scored
            np.testing.assert_array_equal(a.sampler_L, b.sampler_L)
    other = of_file(tmp_path / "a.jsonl", [question(f"changed {n}", answer=str(n)) for n in range(6)])
    with pytest.raises(CheckpointError, match="has changed since its answers were saved"):
        Collector(other, PROCESSOR, MESH).from_json(saved)


def test_mismatch_is_reported_by_its_tail(monkeypatch):
    """Complaint 5: one bad token among many does not hide in a mean."""
    _, made = collected(config)
    answers = [answer for episode in made.episodes for answer in episode.answers]
    for answer in answers:
        answer.old_L = answer.sampler_L.copy()
    answers[0].old_L[0] += 5.0
    row = iteration_row(config, made, {"episodes": made.episodes}, seconds=1.0)
    tokens = sum(len(answer.mask_L) for answer in answers)
    assert row["sampler/max"] == pytest.approx(5.0, abs=1e-5) and row["sampler/difference"] == pytest.approx(5 / tokens)
    assert row["sampler/outside"] == 1 / tokens and row["sampler/p95"] == 0


def test_terms_of_a_reward_are_reported_apart():
    _, made = collected(config)
    answers = [answer for episode in made.episodes for answer in episode.answers]
    for place, answer in enumerate(answers):
        answer.scored = Scored(0.0, {"verifier": float(place == 0), "language_mixing": None if place else -1.0}, ())
    row = iteration_row(config, made, {"episodes": made.episodes}, seconds=1.0)
    assert not any(name.startswith("term/") for name in row)
    terms = RewardTerm("verifier"), RewardTerm("language_mixing", 0.5)
    row = iteration_row(changed(reward=RewardConfig(terms=terms)), made, {"episodes": made.episodes}, seconds=1.0)
    assert row["term/verifier"] == 1 / len(answers) and row["term/language_mixing"] == -1.0
