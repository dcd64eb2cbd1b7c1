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
from stepjax.processing.tokens import Example

# The mixture takes from its sources in a fixed rhythm. Packing streams read it with a stride, which could fall in step
# with the rhythm and give a stream one source only; shuffling within windows breaks it and keeps random access.
SHUFFLE_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Sample:
    """A processed example and where it came from."""

    example: Example
    domain: int  # index of its source


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that cannot be used, and why."""

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
    """Sample i of the endless training mixture depends on (sources, seed, i) alone; elements are Sample or Skipped.

    Args:
        opened: the records of each source.

    Raises:
        RecordError: on access, when a record is malformed and `bad_records` is "error".
    """
    datasets = []
    for domain, (source, records) in enumerate(zip(sources, opened, strict=True)):
        # Not `map` on the source: reading must fail inside `_process`, which knows what to do about it.
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
        return Sample(processor.process(record), domain)
    except RecordError as error:
        if bad_records == "error":
            raise RecordError(f"{error} (data.bad_records=skip passes over such records and counts them)") from error
        return Skipped(str((record or {}).get("id", f"{source}/{index}")), str(error))
