"""Packing: examples fill rows under three budgets at once: tokens, global views and crops.

Legend: T tokens of a row, G global-view slots, C crop slots, HWC pixels.

Row slot r is fed by stream r, which reads examples r, r + R, r + 2R, ... of the mixture (R rows per batch) and keeps a
few rows open. An example goes where it fits most tightly. If it fits nowhere, the stream emits the fullest row, or the
oldest once that has waited too long: where views run out before tokens, rows with spare tokens would stay open for
ever. A stream depends only on its own examples, so batches are the same for any number of hosts and worker processes.

A stream's position is small: the index of its next example and the indices of the examples in open rows. Every emitted
row carries it. The checkpointed position is that of the rows trained on, so prefetching cannot run ahead of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import ml_dtypes
import numpy as np

from stepjax.config import BatchConfig, DType, ImageConfig
from stepjax.data.mixture import Sample, Skipped
from stepjax.errors import CheckpointError, RecordError

Sizes = tuple[int, int, int]  # tokens, global views, crops
StreamState = dict[str, Any]  # {"next": int, "open": [[int, ...], ...]}
NEW_STREAM: StreamState = {"next": 0, "open": []}

MAX_WAIT = 16  # emit a row after this many examples per open row pass it by; costs no space in any size mix we tried
MAX_SKIPPED = 1000  # consecutive unusable records before this is an error


_PIXEL_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class PackedRow(NamedTuple):
    """The examples of a row, in order, and its stream's position after it."""

    samples: list[Sample]
    used: np.ndarray  # tokens, global views, crops and (query, key) pairs of causal attention
    state: StreamState
    skipped: tuple[Skipped, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sample.example.name for sample in self.samples)


@dataclasses.dataclass(frozen=True)
class RowBudget:
    """Capacity of a row, and features per view."""

    tokens: int
    global_views: int
    crops: int
    images: ImageConfig
    pixel_dtype: DType = "float32"  # of the views; the model casts to its compute dtype anyway
    example_tokens: int | None = None  # limit per example; None: the whole row

    @classmethod
    def of(cls, batch: BatchConfig, images: ImageConfig, pixel_dtype: DType = "float32") -> "RowBudget":
        return cls(batch.tokens, batch.global_views, batch.crops, images, pixel_dtype, batch.example_tokens)

    @property
    def sizes(self) -> Sizes:
        return self.tokens, self.global_views, self.crops


def _sizes(sample: Sample) -> Sizes:
    return len(sample.example.tokens), *sample.example.num_views


def _fits(sizes: Sizes, left: Sizes) -> bool:
    return sizes[0] <= left[0] and sizes[1] <= left[1] and sizes[2] <= left[2]


class _OpenRow:
    """A row that is being filled."""

    def __init__(self, budget: RowBudget):
        self.indices: list[int] = []
        self.samples: list[Sample] = []
        self.left = budget.sizes

    def add(self, index: int, sample: Sample) -> None:
        self.indices.append(index)
        self.samples.append(sample)
        tokens, views, crops = _sizes(sample)
        self.left = self.left[0] - tokens, self.left[1] - views, self.left[2] - crops

    def used(self, budget: RowBudget) -> np.ndarray:
        lengths = [len(sample.example.tokens) for sample in self.samples]
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return np.array([*(size - left for size, left in zip(budget.sizes, self.left, strict=True)), pairs])


class PackingStream:
    """An endless iterator of packed rows over one stride of the mixture."""

    def __init__(
        self,
        samples: grain.MapDataset,
        budget: RowBudget,
        *,
        stream: int,
        num_streams: int,
        open_rows: int,
        state: StreamState = NEW_STREAM,
        skip_oversize: bool = False,
    ):
        self._samples, self._budget, self._open_rows = samples, budget, open_rows
        self._stream, self._num_streams, self._skip_oversize = stream, num_streams, skip_oversize
        self._next = state["next"]
        self._rows = [self._reopened(indices) for indices in state["open"]]  # ordered by first example

    def __iter__(self) -> "PackingStream":
        return self

    def __next__(self) -> PackedRow:
        """
        Raises:
            RecordError: a record is malformed or larger than a row, or too many consecutive records were skipped.
        """
        skipped: list[Skipped] = []
        in_succession = 0
        while True:
            index = self._stream + self._next * self._num_streams
            sample = self._samples[index]
            self._next += 1
            if isinstance(sample, Sample):
                sample = self._refuse_oversize(sample)
            if isinstance(sample, Skipped):
                skipped.append(sample)
                in_succession += 1
                if in_succession == MAX_SKIPPED:
                    raise RecordError(
                        f"{MAX_SKIPPED} consecutive records cannot be used; the last: {sample.reason}. Fix the "
                        "data, or set data.bad_records=error to stop at the first"
                    )
                continue
            in_succession = 0
            row = self._tightest_row(_sizes(sample))
            emitted = None
            if row is None:
                if len(self._rows) == self._open_rows:
                    emitted = self._fullest_row(index)
                    self._rows.remove(emitted)
                row = _OpenRow(self._budget)
                self._rows.append(row)
            row.add(index, sample)
            if emitted is not None:
                return PackedRow(emitted.samples, emitted.used(self._budget), self.state(), tuple(skipped))

    def state(self) -> StreamState:
        """The position after the last emitted row."""
        return {"next": self._next, "open": [list(row.indices) for row in self._rows]}

    def _reopened(self, indices: list[int]) -> _OpenRow:
        row = _OpenRow(self._budget)
        for index in indices:
            sample = self._samples[index]
            if isinstance(sample, Skipped):
                raise CheckpointError(
                    f"a record at the saved data position can no longer be used: {sample.reason}. The data files "
                    "have changed; restore them, or start a new run under another name"
                )
            assert isinstance(sample, Sample), sample
            row.add(index, sample)
        return row

    def _tightest_row(self, sizes: Sizes) -> _OpenRow | None:
        fitting = [row for row in self._rows if _fits(sizes, row.left)]
        return min(fitting, key=lambda row: row.left[0], default=None)

    def _fullest_row(self, index: int) -> _OpenRow:
        oldest = self._rows[0]
        waited = (index - oldest.indices[0]) // self._num_streams
        if waited > MAX_WAIT * self._open_rows:
            return oldest
        return min(self._rows, key=lambda row: row.left[0])

    def _refuse_oversize(self, sample: Sample) -> Sample | Skipped:
        sizes, budget = _sizes(sample), self._budget.sizes
        if self._budget.example_tokens is not None:
            budget = self._budget.example_tokens, *budget[1:]
        if _fits(sizes, budget):
            return sample
        what = ", ".join(
            f"{size} {name} of {limit}"
            for name, size, limit in zip(("tokens", "global views", "crops"), sizes, budget, strict=True)
            if size > limit
        )
        name = sample.example.name
        limit = "batch.tokens" if self._budget.example_tokens is None else "batch.example_tokens"
        reason = f"record {name} does not fit a row: {what}; raise {limit}, batch.global_views or batch.crops"
        if not self._skip_oversize:
            raise RecordError(f"{reason}, or skip such records with data.bad_records=skip")
        return Skipped(name, reason)


def pack(samples: Sequence[Sample], budget: RowBudget) -> dict[str, np.ndarray]:
    """Concatenates examples into the arrays of a row.

    `segment_ids_T` counts examples from 1 (0 is padding); `positions_T` counts from 0 within each. `feature_index_T`
    indexes the row's feature table: the crops of all slots, then the global views (models.step_vl). `group_T` is twice
    the domain, plus one for examples with images.
    """
    return {name: array[0] for name, array in _packed([samples], budget).items()}


def pack_batch(rows: Sequence[Sequence[Sample]], budget: RowBudget) -> dict[str, np.ndarray]:
    """Packs the rows of a batch: tokens_T of `pack` becomes tokens_BT, and so on."""
    return {"{}_B{}".format(*name.rsplit("_", 1)): array for name, array in _packed(rows, budget).items()}


def _packed(rows: Sequence[Sequence[Sample]], budget: RowBudget) -> dict[str, np.ndarray]:
    side_g, side_c = budget.images.global_size, budget.images.crop_size
    pixel_dtype, count = _PIXEL_DTYPES[budget.pixel_dtype], len(rows)
    arrays = {
        "tokens_T": np.zeros((count, budget.tokens), np.int32),
        "segment_ids_T": np.zeros((count, budget.tokens), np.int32),
        "positions_T": np.zeros((count, budget.tokens), np.int32),
        "loss_weights_T": np.zeros((count, budget.tokens), np.float32),
        "feature_index_T": np.full((count, budget.tokens), -1, np.int32),
        "group_T": np.zeros((count, budget.tokens), np.int32),
        "global_views_GHWC": np.zeros((count, budget.global_views, side_g, side_g, 3), pixel_dtype),
        "crops_CHWC": np.zeros((count, budget.crops, side_c, side_c, 3), pixel_dtype),
    }
    for index, samples in enumerate(rows):
        _fill({name: array[index] for name, array in arrays.items()}, samples, budget)
    return arrays


def _fill(row: dict[str, np.ndarray], samples: Sequence[Sample], budget: RowBudget) -> None:
    images = budget.images
    token = view = crop = 0
    for segment, sample in enumerate(samples, start=1):
        example = sample.example
        length, views, crops = _sizes(sample)
        span = slice(token, token + length)
        row["tokens_T"][span] = example.tokens
        row["segment_ids_T"][span] = segment
        row["positions_T"][span] = np.arange(length)
        row["loss_weights_T"][span] = example.loss_weights
        row["group_T"][span] = 2 * sample.domain + (views > 0)
        if views or crops:
            # The example's own table also has crops first; shift both parts to their place in the row's table.
            index, own_crops = example.feature_index, crops * images.crop_tokens
            to_crops = index + crop * images.crop_tokens
            to_views = index - own_crops + budget.crops * images.crop_tokens + view * images.global_tokens
            row["feature_index_T"][span] = np.where(index < 0, -1, np.where(index < own_crops, to_crops, to_views))
            example.write_views(row["global_views_GHWC"][view : view + views], row["crops_CHWC"][crop : crop + crops])
        token, view, crop = token + length, view + views, crop + crops
