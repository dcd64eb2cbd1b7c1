"""Batches are the same whoever makes them, and go on from any saved state as if nothing had happened."""

import dataclasses
import itertools
import json
import multiprocessing
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepjax.config import BatchConfig, DataConfig, DigitsSource, ImageConfig, JsonlSource, TokenizerConfig
from stepjax.data.loader import HostBatch, Loader
from stepjax.errors import CheckpointError, ConfigError, RecordError
from stepjax.processing.processor import Processor

IMAGES = ImageConfig(global_size=56, crop_size=28, patch_size=14, max_side=84)
processor = Processor.from_config(IMAGES, TokenizerConfig(path="demo", generation_starts_thinking=False))

DATA = DataConfig(
    sources=(
        DigitsSource(name="strips", weight=1, task="transcribe"),
        DigitsSource(name="sums", weight=1, task="arithmetic"),
    ),
    open_rows=2,
    prefetch=2,
)
BATCH = BatchConfig(rows=4, tokens=96, global_views=3, crops=20)
SEED = 5


def loader(data: DataConfig = DATA, batch: BatchConfig = BATCH, images: ImageConfig = IMAGES, **options: Any) -> Loader:
    return Loader(data, batch, images, processor, **{"seed": SEED, **options})


def batches(loader: Loader, count: int) -> list[HostBatch]:
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


@pytest.fixture(scope="module")
def expected() -> list[HostBatch]:
    """The first five batches, made by one process in its own thread."""
    return batches(loader(), 5)


def assert_same(batch: HostBatch, expected: HostBatch) -> None:
    assert (batch.names, batch.states, batch.skipped) == (expected.names, expected.states, expected.skipped)
    np.testing.assert_array_equal(batch.used, expected.used)
    assert batch.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert batch.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(batch.arrays[name], array, err_msg=name)


def test_batch_holds_the_shapes_that_its_names_say(expected):
    rows, tokens = BATCH.rows, BATCH.tokens
    for batch in expected:
        assert {name: array.shape for name, array in batch.arrays.items()} == {
            **{
                f"{name}_BT": (rows, tokens) for name in ("tokens", "segment_ids", "positions", "loss_weights", "group")
            },
            "feature_index_BT": (rows, tokens),
            "global_views_BGHWC": (rows, 3, 56, 56, 3),
            "crops_BCHWC": (rows, 20, 28, 28, 3),
        }
        assert len(batch.names) == len(batch.states) == rows
        assert batch.used[0] == np.sum(batch.arrays["segment_ids_BT"] > 0)
        assert batch.used[1] == np.sum(batch.arrays["global_views_BGHWC"].any(axis=(2, 3, 4)))
    names = [name for batch in expected for row in batch.names for name in row]
    assert {name.split("/")[1] for name in names} == {"transcribe", "arithmetic"}
    assert len(set(names)) == len(names)


def rounded(batch: HostBatch) -> HostBatch:
    """With its pixels in bfloat16."""
    pixels = {name: array.astype(ml_dtypes.bfloat16) for name, array in batch.arrays.items() if "HWC" in name}
    return dataclasses.replace(batch, arrays=batch.arrays | pixels)


def test_pixels_in_bfloat16_are_those_of_float32_rounded(expected):
    for batch, whole in zip(batches(loader(pixel_dtype="bfloat16"), 2), expected, strict=False):
        assert_same(batch, rounded(whole))


# The same batches ----------------------------------------------------------------------------------------------------


def shares(process_count):
    size = BATCH.rows // process_count
    return [range(i * size, (i + 1) * size) for i in range(process_count)]


def test_rows_come_in_the_order_asked_for(expected):
    for batch, whole in zip(batches(loader(rows=[3, 1]), 3), expected, strict=False):
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(batch.arrays[name], array[[3, 1]])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_hold_consecutive_parts_of_the_same_batches(expected, process_count):
    parts = [batches(loader(rows=rows), 3) for rows in shares(process_count)]
    for step in range(3):
        hosts = [part[step] for part in parts]
        whole = HostBatch(
            arrays={name: np.concatenate([h.arrays[name] for h in hosts]) for name in expected[0].arrays},
            states=tuple(state for h in hosts for state in h.states),
            skipped=tuple(skipped for h in hosts for skipped in h.skipped),
            names=tuple(names for h in hosts for names in h.names),
            used=np.sum([h.used for h in hosts], axis=0),
        )
        assert_same(whole, expected[step])


@pytest.mark.parametrize("num_workers, pixel_dtype", [(1, "float32"), (2, "bfloat16")])
def test_worker_processes_make_the_same_batches_and_end(expected, num_workers, pixel_dtype):
    others = set(multiprocessing.active_children())
    iterator = iter(loader(dataclasses.replace(DATA, num_workers=num_workers), pixel_dtype=pixel_dtype))
    made = [next(iterator) for _ in range(3)]
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == num_workers
    iterator.close()
    assert not any(worker.is_alive() for worker in workers)
    for batch, expectation in zip(made, expected, strict=False):
        assert_same(batch, expectation if pixel_dtype == "float32" else rounded(expectation))


@pytest.mark.parametrize("prefetch", [1, 8])
def test_prefetching_does_not_run_the_states_ahead(expected, prefetch):
    made = batches(loader(dataclasses.replace(DATA, prefetch=prefetch)), 3)
    for batch, expectation in zip(made, expected, strict=False):
        assert_same(batch, expectation)


def test_every_iterator_starts_from_the_saved_state(expected):
    same = loader()
    for _ in range(2):
        assert_same(batches(same, 1)[0], expected[0])


def test_seed_decides_the_data(expected):
    other = batches(loader(seed=SEED + 1), 1)[0]
    assert not set(itertools.chain(*other.names)) & set(itertools.chain(*expected[0].names))


# Going on ------------------------------------------------------------------------------------------------------------


def saved_after(batch: HostBatch, **options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(loader(**options).state(batch.states)))


@pytest.mark.parametrize("process_count", [1, 2])
def test_saved_state_continues_on_any_number_of_processes(expected, process_count):
    state = saved_after(expected[1])
    parts = [batches(loader(rows=rows, state=state), 3) for rows in shares(process_count)]
    for step in range(3):
        for name, array in expected[2 + step].arrays.items():
            np.testing.assert_array_equal(np.concatenate([part[step].arrays[name] for part in parts]), array)


def test_state_may_be_saved_after_any_batch(expected):
    for step in range(4):
        assert_same(batches(loader(state=saved_after(expected[step])), 1)[0], expected[step + 1])


def test_workers_prefetching_and_bad_records_may_change(expected):
    state = saved_after(expected[1])
    data = dataclasses.replace(DATA, prefetch=5, bad_records="skip")
    assert_same(batches(loader(data, state=state), 1)[0], expected[2])


@pytest.mark.parametrize(
    "changed",
    [
        {"data": dataclasses.replace(DATA, sources=DATA.sources[:1])},
        {"data": dataclasses.replace(DATA, sources=(dataclasses.replace(DATA.sources[0], weight=2), DATA.sources[1]))},
        {"data": dataclasses.replace(DATA, open_rows=3)},
        {"batch": dataclasses.replace(BATCH, rows=8)},
        {"batch": dataclasses.replace(BATCH, tokens=128)},
        {"batch": dataclasses.replace(BATCH, global_views=4)},
        {"batch": dataclasses.replace(BATCH, crops=21)},
        {"images": dataclasses.replace(IMAGES, max_side=112)},
        {"seed": SEED + 1},
    ],
)
def test_state_of_other_data_is_refused(expected, changed):
    with pytest.raises(CheckpointError, match="belongs to other data.*data.sources.*open_rows.*batch.*images.*seed"):
        loader(state=saved_after(expected[0]), **changed)


@pytest.mark.parametrize("change", ["appended", "replaced", "edited"])
def test_a_data_file_that_has_changed_is_named_or_accepted(tmp_path, change):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(f'{{"text": "number {i:03} of these"}}\n' for i in range(300)))
    data = DataConfig(sources=(JsonlSource(name="docs", weight=1, path=str(path)),))
    state = json.loads(json.dumps(loader(data).state(batches(loader(data), 1)[0].states)))
    batches(loader(data, state=state), 1)
    text = path.read_text()
    path.write_text(
        {
            "appended": text + text[:60],
            "replaced": text[: len(text) // 2],
            "edited": text.replace("number 150", "number 051"),
        }[change]
    )
    with pytest.raises(
        CheckpointError, match=f"'docs': {path} has changed since .*from 300 records in .*--name.*accept"
    ):
        loader(data, state=state)
    batches(loader(dataclasses.replace(data, changed_files="accept"), state=state), 1)


# Errors --------------------------------------------------------------------------------------------------------------


def test_no_sources_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sources"):
        loader(DataConfig())


def test_rows_must_divide_over_workers():
    with pytest.raises(ConfigError, match="data.num_workers=3.* 4 rows"):
        loader(dataclasses.replace(DATA, num_workers=3))
    with pytest.raises(ConfigError, match="data.num_workers=4.* 2 rows"):
        loader(dataclasses.replace(DATA, num_workers=4), rows=[0, 1])


def test_file_that_is_missing_is_an_error_before_any_batch(tmp_path):
    source = JsonlSource(name="docs", weight=1, path=str(tmp_path / "none.jsonl"))
    with pytest.raises(RecordError, match="'docs'.*cannot be read"):
        loader(dataclasses.replace(DATA, sources=(source,)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_record_comes_out_of_threads_and_workers_as_what_it_is(tmp_path, num_workers):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(['{"text": "fine"}'] * 1000 + ['{"text": "torn'] * 1000))
    data = DataConfig(sources=(JsonlSource(name="docs", weight=1, path=str(path)),), num_workers=num_workers)
    with pytest.raises(RecordError, match=r"line 1\d\d\d of .*docs.jsonl.*data.bad_records=skip"):
        batches(loader(data), 50)


def test_skipped_records_are_handed_on_by_name(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(['{"text": "fine and long enough"}'] * 900 + ['{"text": "torn'] * 100))
    source = JsonlSource(name="docs", weight=1, path=str(path))
    made = batches(loader(DataConfig(sources=(source,), bad_records="skip")), 10)
    skipped = [record for batch in made for record in batch.skipped]
    assert skipped and all(900 <= int(record.name.removeprefix("docs/")) < 1000 for record in skipped)
    assert all("not valid JSON" in record.reason for record in skipped)
