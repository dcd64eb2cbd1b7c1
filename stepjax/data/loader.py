"""Host batches: the packed rows of this process's streams, made ahead by a thread or by worker processes.

Legend: B rows of this process, T tokens, G global-view slots, C crop slots, HWC pixels.
"""

import dataclasses
import hashlib
from collections.abc import Generator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain import experimental

from stepjax.config import BatchConfig, DataConfig, DType, ImageConfig
from stepjax.data.mixture import Skipped, mixture
from stepjax.data.packing import NEW_STREAM, PackedRow, PackingStream, RowBudget, StreamState, stack_rows
from stepjax.data.records import open_source
from stepjax.errors import CheckpointError, ConfigError
from stepjax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """The rows of one step that this process holds."""

    arrays: dict[str, np.ndarray]  # named with their shapes: tokens_BT, ..., global_views_BGHWC, crops_BCHWC
    states: tuple[StreamState, ...]  # where each stream stands after its row
    skipped: tuple[Skipped, ...]
    names: tuple[tuple[str, ...], ...]  # examples of each row
    used: np.ndarray  # tokens, global views, crops and attention pairs in use, over all rows (see PackedRow)


class _Rows(grain.IterDataset):
    """The rows of several streams in turn. Grain's workers take a stride of the streams each, so the order is kept."""

    def __init__(
        self, samples: grain.MapDataset, streams: list[int], states: list[StreamState], options: dict[str, Any]
    ):
        super().__init__(samples)
        self._samples, self._streams, self._states, self._options = samples, streams, states, options

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        assert not sequential_slice
        self._streams, self._states = self._streams[sl], self._states[sl]

    def __iter__(self) -> grain.DatasetIterator:
        return _RowsIterator(
            [
                PackingStream(self._samples, stream=stream, state=state, **self._options)
                for stream, state in zip(self._streams, self._states, strict=True)
            ]
        )


class _RowsIterator(grain.DatasetIterator):
    """Its Grain state is unused: every row carries the state of its stream (see data.packing)."""

    def __init__(self, streams: list[PackingStream]):
        super().__init__()
        self._streams, self._turn = streams, 0

    def __next__(self) -> PackedRow:
        row = next(self._streams[self._turn])
        self._turn = (self._turn + 1) % len(self._streams)
        return row

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        assert not state, state


class Loader:
    """Iterates over this process's share of the batches, from where a saved state left off.

    The global batch has `batch.rows` streams, one a row, whatever the number of processes and whichever of them makes
    it: what a stream yields depends on nothing else.
    """

    def __init__(
        self,
        data: DataConfig,
        batch: BatchConfig,
        images: ImageConfig,
        processor: Processor,
        *,
        seed: int,
        pixel_dtype: DType = "float32",
        rows: Sequence[int] | None = None,
        state: dict[str, Any] | None = None,
    ):
        """
        Args:
            pixel_dtype: of the views; the model's compute dtype halves what is moved to the devices and held there.
            rows: which rows of the global batch to make, in this order (see `sharding.rows_here`); None: all.
            state: what `state` gave when a checkpoint was saved.

        Raises:
            ConfigError: this process's rows do not divide over its workers; no sources.
            CheckpointError: `state` was saved by a run with other data.
            RecordError: a source cannot be opened.
        """
        if not data.sources:
            raise ConfigError("data.sources=(): name at least one source")
        streams = list(range(batch.rows) if rows is None else rows)
        if data.num_workers and len(streams) % data.num_workers:
            raise ConfigError(f"data.num_workers={data.num_workers}: must divide the {len(streams)} rows of a process")
        self._data, self._rows = data, len(streams)
        self._fingerprint = _fingerprint(data, batch, images, seed)
        opened = [open_source(source, seed) for source in data.sources]
        self._files = {source.name: records.files() for source, records in zip(data.sources, opened, strict=True)}
        states = [NEW_STREAM] * batch.rows if state is None else self._checked(state)
        samples = mixture(data.sources, opened, processor, seed=seed, bad_records=data.bad_records)
        options = dict(
            budget=RowBudget.of(batch, images, pixel_dtype),
            num_streams=batch.rows,
            open_rows=data.open_rows,
            skip_oversize=data.bad_records == "skip",
        )
        self._dataset: grain.IterDataset = _Rows(samples, streams, [states[s] for s in streams], options)

    def __iter__(self) -> Generator[HostBatch, None, None]:
        ahead = self._data.prefetch * self._rows
        if self._data.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags that only absl's own `app.run` parses
            per_worker = max(1, ahead // self._data.num_workers)
            options = grain.MultiprocessingOptions(
                num_workers=self._data.num_workers, per_worker_buffer_size=per_worker
            )
            dataset = self._dataset.mp_prefetch(options)
        else:
            dataset = experimental.ThreadPrefetchIterDataset(self._dataset, prefetch_buffer_size=ahead)
        rows = iter(dataset)
        try:
            while True:
                yield _stack([next(rows) for _ in range(self._rows)])
        finally:
            rows.close()  # ends the worker processes

    def state(self, states: Sequence[StreamState]) -> dict[str, Any]:
        """What to save: the states of all streams (gathered over processes), and fingerprints of their data."""
        return {"fingerprint": self._fingerprint, "files": self._files, "streams": list(states)}

    def _checked(self, state: dict[str, Any]) -> list[StreamState]:
        if state.get("fingerprint") != self._fingerprint:
            raise CheckpointError(
                "the saved data position belongs to other data: data.sources, data.open_rows, batch, images or seed "
                "have changed since; restore the old values, or start a new run under another name"
            )
        for name, files in state.get("files", {}).items():  # a checkpoint of an older version has none
            for saved, current in zip(files, self._files[name], strict=True):
                if saved != current and self._data.changed_files == "error":
                    raise CheckpointError(
                        f"source {name!r}: {current['path']} has changed since the checkpoint was saved, from "
                        f"{_shown(saved)} to {_shown(current)}. Restore it, give the new run another --name, or go on "
                        "with other examples than before by --data.changed-files accept"
                    )
        return state["streams"]


def _shown(file: dict[str, Any]) -> str:
    return f"{file['records']:,} records in {file['bytes']:,} bytes (digest {file['digest'][:8]})"


def _stack(rows: list[PackedRow]) -> HostBatch:
    return HostBatch(
        arrays=stack_rows([row.arrays for row in rows]),
        states=tuple(row.state for row in rows),
        skipped=tuple(skipped for row in rows for skipped in row.skipped),
        names=tuple(row.names for row in rows),
        used=np.sum([row.used for row in rows], axis=0),
    )


def _fingerprint(data: DataConfig, batch: BatchConfig, images: ImageConfig, seed: int) -> str:
    """Of all that decides which examples a stream sees and how it packs them."""
    decisive = (data.sources, data.open_rows, batch.rows, batch.tokens, batch.global_views, batch.crops, images, seed)
    if batch.example_tokens is not None:
        decisive += (batch.example_tokens,)
    return hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]
