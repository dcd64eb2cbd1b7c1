"""The endless weighted mixture of all sources, as a random-access Grain dataset of processed examples."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import grain
from grain import experimental

from stepjax.config import BadRecords, Source
from stepjax.data.records import Record, Records
from stepjax.errors import RecordError
from stepjax.processing.processor import Processor
from stepjax.processing.tokens import Draft, Example

# The mixture interleaves its sources periodically. Packing streams read it with a stride, which could align with the
# period and give a stream only one source. Shuffling within windows prevents this and keeps random access.
SHUFFLE_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Sample:
    """A processed example and its source."""

    example: Draft | Example
    domain: int  # index of its source


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An unusable record and the reason."""

    name: str
    reason: str


def mixture(
    sources: Sequence[Source],
    opened: Sequence[Records],
    processor: Processor,
    *,
    seed: int,
    bad_records: BadRecords,
) -> grain.MapDataset:
    """The endless training mixture of Sample or Skipped elements; element i depends only on (sources, seed, i).

    Args:
        opened: the records of each source.

    Raises:
        RecordError: on access, when a record is malformed and `bad_records` is "error".
    """
    datasets = []
    for domain, (source, records) in enumerate(zip(sources, opened, strict=True)):
        # Not `map` on the source: read errors must occur inside `_process`, which handles them.
        dataset = grain.MapDataset.range(len(records))
        dataset = dataset.seed(seed + domain).shuffle().repeat()
        datasets.append(dataset.map(partial(_process, records, source.name, domain, processor, bad_records)))
    mixed = grain.MapDataset.mix(datasets, [source.weight for source in sources])
    return experimental.WindowShuffleMapDataset(mixed, window_size=SHUFFLE_WINDOW, seed=seed)


def _process(
    records: Records, source: str, domain: int, processor: Processor, bad_records: BadRecords, index: int
) -> Sample | Skipped:
    record: Record | None = None
    try:
        record = records[index]
        return Sample(processor.draft(record), domain)
    except RecordError as error:
        if bad_records == "error":
            raise RecordError(f"{error} (data.bad_records=skip skips and counts such records)") from error
        return Skipped(str((record or {}).get("id", f"{source}/{index}")), str(error))
