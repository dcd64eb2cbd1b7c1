"""A judge in the trainer's own process: it is loaded from a run and asked; what it fails to judge is missing."""

import dataclasses

import jax
from test_sampling import MESH, PROCESSOR, changed
from tiny_rl import config

from stepjax.config_file import to_json
from stepjax.models.step_vl import init_model
from stepjax.post_training.loop import Trainer
from stepjax.post_training.sampling import Collector
from stepjax.post_training.step import Programs, make_optimizers, new_state
from stepjax.rewards.config import JudgeConfig, RewardConfig, RewardTerm
from stepjax.training.checkpoint import Checkpointer

ASKED = "Better: {first} or {second}?"


def test_judge_of_a_run_is_asked_and_fails_without_harm(tmp_path):
    optimizers = make_optimizers(config)
    state = new_state(init_model(config.model, config.numerics, seed=7), config=config, optimizers=optimizers)
    with Checkpointer(tmp_path / "judge" / "checkpoints", keep=1, config=to_json(config)) as checkpointer:
        checkpointer.save(1, state, {}, wait=True)
    judge = JudgeConfig(run=str(tmp_path / "judge"), preference=ASKED, max_tokens=4, opponents=2, retries=0)
    run = changed(
        reward=RewardConfig(terms=(RewardTerm("preference"),), judge=judge, max_missing=1.0),
        rollout=dict(prompts=2),
    )
    collector = Collector(run, PROCESSOR, MESH)
    model = init_model(run.model, run.numerics, seed=1)
    collector.engines.take(model)
    made = collector.collect(0)
    assert collector._scorer.counts["judge/calls"] > 0
    collector.close()
    answers = [answer for episode in made.episodes for answer in episode.answers]
    failed = [answer for answer in answers if answer.scored.value is None]
    assert len(answers) == 8 and failed and all("the judge gave no verdict" in each.scored.notes[0] for each in failed)
    # An iteration without any reward leaves the parameters as they are.
    for answer in answers:
        answer.scored = dataclasses.replace(answer.scored, value=None)
    trainer = Trainer(run, MESH, Programs(run, optimizers), None)
    with jax.set_mesh(MESH):
        before = new_state(model, config=run, optimizers=optimizers)
        after, metrics = trainer.train(before, made, 0)
    assert after.model is before.model and after.step == 1 and metrics["episodes"] == []
