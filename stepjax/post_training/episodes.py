"""Episodes: the answers to a prompt with their rewards, and their places in packed rows.

A prompt is computed once for all its answers in a row (shared-prefix packing). Its last token begins every answer,
because there the answers part; all of them see the rest of the prompt and none sees another:

    tokens    p0 p1 p2 | p3 a0 a1 a2 | p3 b0 b1 | ...       prompt p0 to p3, answers a and b
    segment    1  1  1 |  2  2  2  2 |  3  3  3 |
    prefix     0  0  0 |  1  1  1  1 |  1  1  1 |
    position   0  1  2 |  3  4  5  6 |  3  4  5 |
    choice             | a0 a1 a2    | b0 b1    |           where advantages, log-probabilities and values stand

Legend: B rows, T tokens, L tokens of an answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepjax.config import BatchConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack_batch
from stepjax.errors import ConfigError
from stepjax.processing.tokens import Example
from stepjax.rewards.scorer import Scored
from stepjax.rollouts.rollout import Rollout
from stepjax.sharding import spec


@dataclasses.dataclass(eq=False)
class Answer:
    """A rollout with what training needs of it. The arrays have an entry for each token, `rollout.token_ids`.

    Attributes:
        mask_L: true for sampled tokens.
        old_L: log-probabilities under the policy before the updates, recomputed by the trainer.
    """

    rollout: Rollout
    scored: Scored
    mask_L: np.ndarray
    sampler_L: np.ndarray
    old_L: np.ndarray
    reference_L: np.ndarray
    values_L: np.ndarray
    advantages_L: np.ndarray
    returns_L: np.ndarray
    weights_L: np.ndarray

    @classmethod
    def of(cls, rollout: Rollout, scored: Scored) -> "Answer":
        length = len(rollout.token_ids)
        empty = [np.zeros(length, np.float32) for _ in range(6)]
        return cls(rollout, scored, np.ones(length, bool), np.array(rollout.sampling_logprobs, np.float32), *empty)

    @property
    def tokens_L(self) -> np.ndarray:
        return np.array(self.rollout.token_ids, np.int32)

    @property
    def is_truncated(self) -> bool:
        return self.rollout.finish_reason == "length"


@dataclasses.dataclass(eq=False)
class Episode:
    """A prompt and its answers."""

    index: int  # of the prompt in the stream
    source: int  # of `data.sources`
    record: dict[str, Any]
    prompt: Example
    answers: list[Answer]


class Piece(NamedTuple):
    """Some answers to a prompt, in one row."""

    episode: Episode
    answers: list[Answer]


Row = list[Piece]


def rows_of_process(batch: BatchConfig, mesh: Mesh, process: int) -> int:
    """How many rows of a call are of this process's answers.

    Raises:
        ConfigError: devices of several processes share a row, but each process packs its own answers.
    """
    layout = NamedSharding(mesh, spec("batch"))
    owners: dict[int, set[int]] = {}
    for device, [rows] in layout.devices_indices_map((batch.rows,)).items():
        for row in range(*rows.indices(batch.rows)):
            owners.setdefault(row, set()).add(device.process_index)
    shared = next((sorted(own) for own in owners.values() if len(own) > 1), None)
    if shared is not None:
        raise ConfigError(
            f"mesh={dict(mesh.shape)}: devices of processes {shared} would share a row, but each process trains on its "
            "own answers; lower mesh.context and mesh.tensor"
        )
    return sum(process in own for own in owners.values())


def pack_rows(episodes: Sequence[Episode], budget: RowBudget) -> list[Row]:
    """Divides the answers over rows: the longest prompts first, each where most room is left.

    A prompt whose answers need several rows is repeated in each.
    """
    rows: list[Row] = []
    left: list[np.ndarray] = []
    whole = np.array(budget.sizes)
    for episode in sorted(episodes, key=lambda each: -len(each.prompt.tokens)):
        waiting = sorted(episode.answers, key=lambda answer: -len(answer.mask_L))
        views = episode.prompt.num_views
        while waiting:
            lengths = [1 + len(answer.mask_L) for answer in waiting]
            needs = np.array([len(episode.prompt.tokens) - 1 + lengths[-1], *views])
            fitting = [place for place, room in enumerate(left) if (needs <= room).all()]
            if fitting:
                place = max(fitting, key=lambda each: left[each][0])
            else:
                assert (needs <= whole).all(), (needs, whole)
                place = len(rows)
                rows.append([])
                left.append(whole.copy())
            left[place] -= np.array([len(episode.prompt.tokens) - 1, *views])
            taken, kept = [], []
            for answer, length in zip(waiting, lengths, strict=True):
                if length <= left[place][0]:
                    left[place][0] -= length
                    taken.append(answer)
                else:
                    kept.append(answer)
            rows[place].append(Piece(episode, taken))
            waiting = kept
    return rows


# Arrays of a batch, by the answers' arrays; at the places of the choices.
OF_ANSWERS = {
    "mask_BT": "mask_L",
    "sampler_BT": "sampler_L",
    "old_BT": "old_L",
    "reference_BT": "reference_L",
    "old_values_BT": "values_L",
    "advantages_BT": "advantages_L",
    "returns_BT": "returns_L",
    "weights_BT": "weights_L",
}


def make_batch(rows: Sequence[Row], budget: RowBudget) -> dict[str, np.ndarray]:
    """The arrays of `data.packing.pack_batch`, and those of OF_ANSWERS, float32 [B, T]."""
    samples = [[Sample(example, 0) for piece in row for example in _examples(piece)] for row in rows]
    batch = pack_batch(samples, budget)
    batch["prefix_ids_BT"] = np.zeros_like(batch["segment_ids_BT"])
    batch |= {name: np.zeros(batch["segment_ids_BT"].shape, np.float32) for name in OF_ANSWERS}
    for place, row in enumerate(rows):
        start = segment = 0
        for piece in row:
            shared = len(piece.episode.prompt.tokens) - 1
            start += shared
            prefix = segment + 1 if shared else 0
            segment += bool(shared)
            for answer in piece.answers:
                segment += 1
                span = slice(start, start + 1 + len(answer.mask_L))
                batch["prefix_ids_BT"][place, span] = prefix
                batch["positions_BT"][place, span] += shared
                choices = slice(span.start, span.stop - 1)
                for name, field in OF_ANSWERS.items():
                    batch[name][place, choices] = getattr(answer, field)
                start = span.stop
    for name in ("loss_weights_BT", "group_BT"):
        del batch[name]  # pretraining's
    return batch


def _examples(piece: Piece) -> Iterator[Example]:
    """The shared part of the prompt, then its last token with each answer."""
    prompt = piece.episode.prompt
    if len(prompt.tokens) > 1:
        fields = ("tokens", "loss_weights", "feature_index")
        yield dataclasses.replace(prompt, **{name: getattr(prompt, name)[:-1] for name in fields})
    nothing = np.zeros((0, 0, 0, 3), np.float32)
    for answer in piece.answers:
        tokens = np.concatenate([prompt.tokens[-1:], answer.tokens_L])
        zeros = np.zeros(len(tokens), np.float32)
        yield Example(prompt.name, tokens, zeros, np.full(len(tokens), -1, np.int32), nothing, nothing)


def read_back(rows: Sequence[Row], field: str, values_BT: np.ndarray) -> None:
    """Stores a computed array [B, T] in `field` of the answers."""
    for place, row in enumerate(rows):
        start = 0
        for piece in row:
            start += len(piece.episode.prompt.tokens) - 1
            for answer in piece.answers:
                length = len(answer.mask_L)
                setattr(answer, field, np.array(values_BT[place, start : start + length], np.float32))
                start += 1 + length
