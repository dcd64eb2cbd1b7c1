"""Host batches: packed rows of this process's streams, prefetched by a thread or by worker processes.

Legend: B rows of this process, T tokens, G global-view slots, C crop slots, HWC pixels.
"""

import dataclasses
import hashlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain import experimental

from stepjax.config import BatchConfig, DataConfig, DType, ImageConfig
from stepjax.data.mixture import Skipped, mixture
from stepjax.data.packing import NEW_STREAM, PackingStream, RowBudget, StreamState, pack_batch
from stepjax.data.records import open_source
from stepjax.errors import CheckpointError, ConfigError
from stepjax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """This process's rows of one step."""

    arrays: dict[str, np.ndarray]  # names carry shapes: tokens_BT, ..., global_views_BGHWC, crops_BCHWC
    states: tuple[StreamState, ...]  # position of each stream after its row
    skipped: tuple[Skipped, ...]
    names: tuple[tuple[str, ...], ...]  # examples of each row
    used: np.ndarray  # tokens, global views, crops and attention pairs used, over all rows (see PackedRow)


class _Part(NamedTuple):
    """The fields of a `HostBatch`. A tuple, because Grain passes its arrays in shared memory."""

    arrays: dict[str, np.ndarray]
    states: tuple[StreamState, ...]
    skipped: tuple[Skipped, ...]
    names: tuple[tuple[str, ...], ...]
    used: np.ndarray


class _Parts(grain.IterDataset):
    """Batches of a row of each stream. Each Grain worker takes a stride of the streams, so it makes part of a batch."""

    def __init__(
        self, samples: grain.MapDataset, streams: list[int], states: list[StreamState], options: dict[str, Any]
    ):
        super().__init__(samples)
        self._samples, self._streams, self._states, self._options = samples, streams, states, options

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        assert not sequential_slice
        self._streams, self._states = self._streams[sl], self._states[sl]

    def __iter__(self) -> grain.DatasetIterator:
        streams = [
            PackingStream(self._samples, stream=stream, state=state, **self._options)
            for stream, state in zip(self._streams, self._states, strict=True)
        ]
        return _PartsIterator(streams, self._options["budget"])


class _PartsIterator(grain.DatasetIterator):
    """Grain's state is unused: every row carries the state of its stream (see data.packing)."""

    def __init__(self, streams: list[PackingStream], budget: RowBudget):
        super().__init__()
        self._streams, self._budget = streams, budget

    def __next__(self) -> _Part:
        rows = [next(stream) for stream in self._streams]
        return _Part(
            arrays=pack_batch([row.samples for row in rows], self._budget),
            states=tuple(row.state for row in rows),
            skipped=tuple(skipped for row in rows for skipped in row.skipped),
            names=tuple(row.names for row in rows),
            used=np.sum([row.used for row in rows], axis=0),
        )

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        assert not state, state


class Loader:
    """Iterates over this process's share of the batches, resuming from a saved state.

    The global batch has `batch.rows` streams, one per row. A stream's output does not depend on the number of processes
    or on which process runs it.
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
            pixel_dtype: dtype of the views; a 16-bit compute dtype halves transfers and device memory.
            rows: rows of the global batch to make, in this order (see `sharding.rows_here`); None: all.
            state: return value of `state`, from a checkpoint.

        Raises:
            ConfigError: there are no sources, or the number of workers does not divide this process's rows.
            CheckpointError: `state` was saved by a run with different data.
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
        self._dataset: grain.IterDataset = _Parts(samples, streams, [states[s] for s in streams], options)

    def __iter__(self) -> Generator[HostBatch, None, None]:
        dataset, workers, ahead = self._dataset, self._data.num_workers, self._data.prefetch
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only `app.run` parses
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
            dataset, ahead = dataset.mp_prefetch(options).batch(workers, batch_fn=_merged), 1
        parts = iter(experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ahead))
        try:
            while True:
                yield HostBatch(*next(parts))
        finally:
            parts.close()  # ends the worker processes

    def state(self, states: Sequence[StreamState]) -> dict[str, Any]:
        """State to checkpoint: the states of all streams (gathered over processes) and fingerprints of their data."""
        return {"fingerprint": self._fingerprint, "files": self._files, "streams": list(states)}

    def _checked(self, state: dict[str, Any]) -> list[StreamState]:
        if state.get("fingerprint") != self._fingerprint:
            raise CheckpointError(
                "the saved data position belongs to other data: data.sources, data.open_rows, batch, images or seed "
                "have changed; restore the old values, or start a new run under another name"
            )
        for name, files in state.get("files", {}).items():  # older checkpoints have none
            for saved, current in zip(files, self._files[name], strict=True):
                if saved != current and self._data.changed_files == "error":
                    raise CheckpointError(
                        f"source {name!r}: {current['path']} has changed since the checkpoint was saved, from "
                        f"{_shown(saved)} to {_shown(current)}. Restore it, give the new run another --name, or pass "
                        "--data.changed-files accept to resume with different examples"
                    )
        return state["streams"]


def _shown(file: dict[str, Any]) -> str:
    return f"{file['records']:,} records in {file['bytes']:,} bytes (digest {file['digest'][:8]})"


def _merged(parts: Sequence[_Part]) -> _Part:
    """The whole batch from the parts of all workers: rows take turns."""

    def in_turn(field: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        return tuple(each for row in zip(*field, strict=True) for each in row)

    arrays = {}
    for name, first in parts[0].arrays.items():
        arrays[name] = np.empty((len(parts) * len(first), *first.shape[1:]), first.dtype)
        for index, part in enumerate(parts):
            arrays[name][index :: len(parts)] = part.arrays[name]
    return _Part(
        arrays=arrays,
        states=in_turn([part.states for part in parts]),
        skipped=tuple(skipped for part in parts for skipped in part.skipped),
        names=in_turn([part.names for part in parts]),
        used=np.sum([part.used for part in parts], axis=0),
    )


def _fingerprint(data: DataConfig, batch: BatchConfig, images: ImageConfig, seed: int) -> str:
    """Fingerprint of everything that decides which examples a stream sees and how it packs them."""
    decisive = (data.sources, data.open_rows, batch.rows, batch.tokens, batch.global_views, batch.crops, images, seed)
    if batch.example_tokens is not None:
        decisive += (batch.example_tokens,)
    return hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]
