"""Packed episodes: what the trainer computes of them is what it computes of each answer alone.

Legend: B rows, T tokens, L tokens of an answer.
"""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_rl import config

from stepjax.data.packing import RowBudget
from stepjax.models.step_vl import init_model
from stepjax.post_training.episodes import Answer, Episode, make_batch, pack_rows, read_back
from stepjax.post_training.step import scores
from stepjax.processing.processor import Processor
from stepjax.rewards.scorer import Scored
from stepjax.rollouts.rollout import Rollout

PROCESSOR = Processor.from_config(config.images, config.tokenizer)
BUDGET = RowBudget.of(config.batch, config.images)
MODEL = init_model(config.model, config.numerics, seed=3)
PAD = 0  # what unused places of a row hold


def picture(seed, size=(90, 60)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def episode(seed=0, lengths=(3, 5, 1), image=None, text="What is it?"):
    content = text if image is None else [{"type": "image", "image": image}, {"type": "text", "text": text}]
    prompt = PROCESSOR.process_prompt([{"role": "user", "content": content}], name=f"prompt {seed}")
    rng = np.random.default_rng(seed)
    answers = []
    for length in lengths:
        ids = [*rng.integers(0, 300, length - 1).tolist(), PAD]
        rollout = Rollout(
            prompt_ids=tuple(prompt.tokens.tolist()),
            token_ids=tuple(ids),
            sampling_logprobs=tuple(rng.normal(-2, 0.1, length).tolist()),
        )
        answers.append(Answer.of(rollout, Scored(1.0, {})))
    return Episode(seed, 0, {"id": f"prompt {seed}"}, prompt, answers)


run_scores = jax.jit(lambda batch: scores(MODEL, None, None, batch, temperature=1.0)["old_L"])


def log_probs(rows):
    """Fills `old_L` of all answers."""
    batch = {name: np.asarray(array) for name, array in make_batch(rows, BUDGET).items()}
    read_back(rows, "old_L", np.asarray(run_scores(batch)))


def test_packed_and_alone_every_answer_has_the_same_log_probabilities():
    """Complaint 6: with images, and several prompts in a row."""
    together = [episode(0, image=picture(0)), episode(1, (4, 4)), episode(2, (2, 6, 3), picture(1, (56, 56)))]
    rows = pack_rows(together, BUDGET)
    assert len(rows) < len(together)
    log_probs(rows)
    for each in together:
        for answer in each.answers:
            alone = dataclasses.replace(answer)
            log_probs(_alone(each, alone))
            np.testing.assert_allclose(answer.old_L, alone.old_L, atol=2e-5)
            assert len(set(np.round(answer.old_L, 3))) > 1 or len(answer.old_L) == 1


def _alone(each, answer):
    return pack_rows([dataclasses.replace(each, answers=[answer])], BUDGET)


def test_another_image_gives_other_log_probabilities():
    """Complaint 7: the trainer gets the pixels."""
    first, second = (episode(0, image=picture(seed)) for seed in (0, 1))
    for each in (first, second):
        log_probs(pack_rows([each], BUDGET))
    assert all(np.abs(a.old_L - b.old_L).max() > 1e-4 for a, b in zip(first.answers, second.answers, strict=True))


def test_trained_ids_are_the_sampled_ids():
    """Complaints 2 and 9: also where a sampled id is the one that pads, whose token is trained on like any other."""
    made = episode(0, (3, 5, 1), picture(0))
    [row] = rows = pack_rows([made], BUDGET)
    batch = make_batch(rows, BUDGET)
    mask_T, tokens_T = batch["mask_BT"][0] > 0, np.roll(batch["tokens_BT"][0], -1)
    sampled = [token for piece in row for answer in piece.answers for token in answer.rollout.token_ids]
    np.testing.assert_array_equal(tokens_T[mask_T], sampled)
    assert sampled.count(PAD) >= 3 and (batch["tokens_BT"][0] == PAD).sum() > 20


def test_prompt_is_computed_once_for_answers_that_share_a_row():
    made = episode(0, (5,) * 6, picture(0))
    [row] = pack_rows([made], BUDGET)
    batch = make_batch([row], BUDGET)
    used = (batch["segment_ids_BT"] > 0).sum()
    assert used == len(made.prompt.tokens) - 1 + 6 * (1 + 5)
    assert batch["global_views_BGHWC"].shape[1] == config.batch.global_views
    # Every answer goes on where the prompt ends.
    starts_T = (batch["prefix_ids_BT"][0] > 0) & (np.diff(batch["segment_ids_BT"][0], prepend=0) > 0)
    assert (batch["positions_BT"][0][starts_T] == len(made.prompt.tokens) - 1).all() and starts_T.sum() == 6


def test_answers_that_do_not_fit_a_row_take_the_prompt_along():
    made = episode(0, (30,) * 12)
    rows = pack_rows([made], BUDGET)
    assert len(rows) > 1
    assert sorted(id(a) for row in rows for piece in row for a in piece.answers) == sorted(map(id, made.answers))
    for row in rows:
        used = sum(len(p.episode.prompt.tokens) - 1 + sum(1 + len(a.mask_L) for a in p.answers) for p in row)
        assert used <= BUDGET.tokens
    log_probs(rows)
    first = dataclasses.replace(made.answers[7])
    log_probs(_alone(made, first))
    np.testing.assert_allclose(made.answers[7].old_L, first.old_L, atol=2e-5)


def test_empty_rows_are_nothing_to_train_on():
    batch = make_batch([[], []], BUDGET)
    assert not batch["mask_BT"].any() and not batch["segment_ids_BT"].any()
    assert np.isfinite(np.asarray(run_scores(batch))).all()


@pytest.mark.parametrize("length", [1, 2])
def test_prompt_of_one_token_has_nothing_to_share(length):
    made = episode(0, (2, 3))
    fields = ("tokens", "feature_index", "loss_weights")
    made.prompt = dataclasses.replace(made.prompt, **{name: getattr(made.prompt, name)[-length:] for name in fields})
    batch = make_batch(pack_rows([made], BUDGET), BUDGET)
    assert (batch["prefix_ids_BT"].max() > 0) == (length > 1)
    assert batch["segment_ids_BT"].max() == 2 + (length > 1)
