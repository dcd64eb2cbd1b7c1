"""Rows never overflow, lose, repeat or mix up examples, and a stream goes on from any state it has left behind."""

import dataclasses
import functools
import json
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepjax.config import BatchConfig, ImageConfig
from stepjax.data.mixture import Sample, Skipped
from stepjax.data.packing import MAX_SKIPPED, MAX_WAIT, NEW_STREAM, PackingStream, RowBudget, pack
from stepjax.errors import CheckpointError, RecordError
from stepjax.processing.tokens import Example

# 9 features a global view and 4 a crop, of few pixels.
IMAGES = ImageConfig(global_size=12, crop_size=6, patch_size=1)
Sizes = tuple[int, int, int]  # text tokens, global views, crops


def sample(name: str, sizes: Sizes, domain: int = 0, seed: int = 0) -> Sample:
    """An example whose every view is of one colour of its own, and whose features lie anywhere among its text."""
    text, views, crops = sizes
    rng = np.random.default_rng((seed, text, views, crops))
    features = crops * IMAGES.crop_tokens + views * IMAGES.global_tokens
    feature_index_T = rng.permutation(np.append(np.arange(features), np.full(text, -1))).astype(np.int32)
    length = text + features
    colours = rng.uniform(1, 2, size=views + crops).astype(np.float32)
    example = Example(
        name=name,
        tokens=rng.integers(1, 500, size=length).astype(np.int32),
        loss_weights=rng.uniform(size=length).astype(np.float32) * (np.arange(length) > 0),
        feature_index=feature_index_T,
        global_views=np.broadcast_to(colours[:views, None, None, None], (views, 12, 12, 3)),
        crops=np.broadcast_to(colours[views:, None, None, None], (crops, 6, 6, 3)),
    )
    return Sample(example, domain)


def num_tokens(sizes: Sizes) -> int:
    return sizes[0] + sizes[1] * IMAGES.global_tokens + sizes[2] * IMAGES.crop_tokens


def feature_table(crops_CHWC: np.ndarray, global_views_GHWC: np.ndarray) -> np.ndarray:
    """What an encoder would make of the views: feature i of a view of colour c is (c, i, is it a crop). Crops first."""
    features = []
    for views, count, is_crop in ((crops_CHWC, IMAGES.crop_tokens, 1), (global_views_GHWC, IMAGES.global_tokens, 0)):
        for view in views:
            colour = view.reshape(-1)[0]
            assert (view == colour).all()
            features += [(colour, i, is_crop) for i in range(count)]
    return np.array(features, np.float64).reshape(-1, 3)


def gathered(table: np.ndarray, feature_index_T: np.ndarray) -> np.ndarray:
    padded = np.concatenate([table, np.full((1, 3), np.nan)])  # -1 takes the last
    return padded[feature_index_T]


def budget(tokens: int, global_views: int, crops: int) -> RowBudget:
    return RowBudget(tokens, global_views, crops, IMAGES)


def cycle(sizes: list[Sizes]) -> Any:
    """An endless data set of examples of these sizes in turn, named by their indices."""
    return grain.MapDataset.range(10**9).map(functools.partial(_cycled, tuple(sizes)))


def _cycled(sizes: tuple[Sizes, ...], index: int) -> Sample:
    return sample(str(index), sizes[index % len(sizes)], domain=index % 3, seed=index)


def new_stream(samples: Any, row: RowBudget, **options: Any) -> PackingStream:
    return PackingStream(samples, row, **{"stream": 0, "num_streams": 1, "open_rows": 2, **options})


def check_row(arrays: dict[str, np.ndarray], samples: list[Sample], row: RowBudget) -> None:
    """Everything a row says about its examples, from its arrays alone."""
    lengths = [len(s.example.tokens) for s in samples]
    ends = np.cumsum(lengths)
    assert ends[-1] <= row.tokens
    assert sum(len(s.example.global_views) for s in samples) <= row.global_views
    assert sum(len(s.example.crops) for s in samples) <= row.crops
    assert {key: value.shape for key, value in arrays.items()} == {
        **{f"{name}_T": (row.tokens,) for name in ("tokens", "segment_ids", "positions", "loss_weights", "group")},
        "feature_index_T": (row.tokens,),
        "global_views_GHWC": (row.global_views, 12, 12, 3),
        "crops_CHWC": (row.crops, 6, 6, 3),
    }
    table = feature_table(arrays["crops_CHWC"], arrays["global_views_GHWC"])
    for segment, (s, end, length) in enumerate(zip(samples, ends, lengths, strict=True), start=1):
        example, span = s.example, slice(end - length, end)
        np.testing.assert_array_equal(arrays["tokens_T"][span], example.tokens)
        np.testing.assert_array_equal(arrays["loss_weights_T"][span], example.loss_weights)
        np.testing.assert_array_equal(arrays["segment_ids_T"][span], segment)
        np.testing.assert_array_equal(arrays["positions_T"][span], np.arange(length))
        np.testing.assert_array_equal(arrays["group_T"][span], 2 * s.domain + (len(example.global_views) > 0))
        own = gathered(feature_table(example.crops, example.global_views), example.feature_index)
        np.testing.assert_array_equal(gathered(table, arrays["feature_index_T"][span]), own)
    padding = slice(ends[-1], None)
    for name, empty in (("segment_ids_T", 0), ("loss_weights_T", 0), ("feature_index_T", -1), ("positions_T", 0)):
        np.testing.assert_array_equal(arrays[name][padding], empty)


# One row -------------------------------------------------------------------------------------------------------------


def test_row_by_hand():
    row = budget(tokens=40, global_views=3, crops=4)
    first, text, last = sample("a", (2, 1, 1), domain=1), sample("b", (3, 0, 0)), sample("c", (1, 1, 1), domain=2)
    arrays = pack([first, text, last], row)
    assert arrays["segment_ids_T"].tolist() == [1] * 15 + [2] * 3 + [3] * 14 + [0] * 8
    assert arrays["positions_T"].tolist() == [*range(15), *range(3), *range(14)] + [0] * 8
    assert arrays["group_T"].tolist() == [3] * 15 + [0] * 3 + [5] * 14 + [0] * 8
    # Crop features of all four slots come first, 4 each; the global views' follow from 16, 9 each.
    features = arrays["feature_index_T"]
    assert sorted(features[:15]) == [-1] * 2 + [*range(4)] + [*range(16, 25)]
    assert features[15:18].tolist() == [-1] * 3
    assert sorted(features[18:32]) == [-1] + [*range(4, 8)] + [*range(25, 34)]
    check_row(arrays, [first, text, last], row)


def test_row_without_images_and_without_image_slots():
    samples = [sample("a", (5, 0, 0)), sample("b", (7, 0, 0))]
    for row in (budget(20, 2, 3), budget(20, 0, 0), budget(12, 0, 3)):
        check_row(pack(samples, row), samples, row)


def test_crops_may_be_missing_where_there_are_views():
    samples = [sample("a", (2, 1, 0)), sample("b", (2, 2, 0)), sample("c", (2, 1, 3))]
    for row in (budget(60, 4, 3), budget(60, 5, 9)):
        check_row(pack(samples, row), samples, row)


def test_budget_of_a_configuration():
    assert RowBudget.of(BatchConfig(rows=8, tokens=64, global_views=3, crops=5), IMAGES) == budget(64, 3, 5)


def test_used_counts_what_is_not_padding():
    row = next(new_stream(cycle([(3, 1, 2), (5, 0, 0)]), budget(32, 3, 5), open_rows=1))
    lengths = np.array([num_tokens((3, 1, 2)), 5])
    assert row.names == ("0", "1")
    pairs = sum(np.tril(np.ones((n, n))).sum() for n in lengths)
    assert row.used.tolist() == [lengths.sum(), 1, 2, pairs]


# Streams -------------------------------------------------------------------------------------------------------------

sizes_strategy = st.tuples(st.integers(3, 30), st.integers(0, 3), st.integers(0, 5))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(sizes_strategy, min_size=1, max_size=12),
    row=st.builds(budget, st.integers(10, 90), st.integers(0, 4), st.integers(0, 6)),
    open_rows=st.integers(1, 4),
    num_streams=st.integers(1, 3),
    data=st.data(),
)
def test_every_example_is_packed_waits_or_is_skipped_and_states_continue(sizes, row, open_rows, num_streams, data):
    stream = data.draw(st.integers(0, num_streams - 1), label="stream")
    sizes = [*sizes, (5, 0, 0)]
    if stream_sees_nothing_that_fits(sizes, row, stream, num_streams):
        return
    samples = cycle(sizes)
    options = dict(stream=stream, num_streams=num_streams, open_rows=open_rows, skip_oversize=True)
    packing = new_stream(samples, row, **options)
    rows = [next(packing) for _ in range(6)]
    for packed in rows:
        check_row(pack(packed.samples, row), [samples[int(name)] for name in packed.names], row)

    for end, packed in enumerate(rows, start=1):
        emitted = [int(name) for earlier in rows[:end] for name in earlier.names]
        skipped = [int(record.name) for earlier in rows[:end] for record in earlier.skipped]
        waiting = [index for indices in packed.state["open"] for index in indices]
        read = [stream + i * num_streams for i in range(packed.state["next"])]
        assert sorted([*emitted, *skipped, *waiting]) == read
        assert len(packed.state["open"]) <= open_rows

    start = data.draw(st.integers(0, 5), label="start")
    state = NEW_STREAM if start == 0 else json.loads(json.dumps(rows[start - 1].state))
    resumed = new_stream(samples, row, state=state, **options)
    for expected in rows[start:]:
        packed = next(resumed)
        assert (packed.names, packed.state, packed.skipped) == (expected.names, expected.state, expected.skipped)
        np.testing.assert_array_equal(packed.used, expected.used)
        arrays = pack(packed.samples, row)
        for key, value in pack(expected.samples, row).items():
            np.testing.assert_array_equal(arrays[key], value)


def stream_sees_nothing_that_fits(sizes: list[Sizes], row: RowBudget, stream: int, num_streams: int) -> bool:
    seen = [sizes[(stream + i * num_streams) % len(sizes)] for i in range(len(sizes))]
    return not any(np.all(np.array([num_tokens(s), *s[1:]]) <= row.sizes) for s in seen)


def test_streams_do_not_touch_each_others_examples():
    samples = cycle([(3, 1, 0), (9, 0, 0), (5, 1, 2), (4, 0, 0), (8, 2, 1)])
    for stream in range(3):
        packing = new_stream(samples, budget(50, 3, 4), stream=stream, num_streams=3)
        names = [int(name) for _ in range(10) for name in next(packing).names]
        assert {name % 3 for name in names} == {stream}
        assert len(set(names)) == len(names)


def test_example_goes_where_it_fits_most_tightly():
    # 0 and 1 open a row each, of 6 and 4 free tokens; 2 fits both and fills the second, 3 fills the first; 4 opens a
    # third, for which the first full row goes.
    row = budget(20, 0, 0)
    packing = new_stream(cycle([(14, 0, 0), (16, 0, 0), (4, 0, 0), (6, 0, 0), (20, 0, 0)]), row)
    assert [next(packing).names for _ in range(2)] == [("0", "3"), ("1", "2")]


def test_open_rows_save_padding():
    sizes = [(13, 0, 0), (12, 0, 0), (7, 0, 0), (8, 0, 0)]

    def mean_use(open_rows: int) -> float:
        packing = new_stream(cycle(sizes), budget(20, 0, 0), open_rows=open_rows)
        return float(np.mean([next(packing).used[0] for _ in range(40)]))

    assert mean_use(1) < 15 and mean_use(4) == 20


@pytest.mark.parametrize("open_rows", [2, 4])
def test_row_that_nothing_fits_does_not_stay_open_for_ever(open_rows):
    """The first example leaves one view free and many tokens; all others need two views and fill more tokens."""
    sizes = [(3, 2, 0)] + 10_000 * [(30, 2, 0)]
    packing = new_stream(cycle(sizes), budget(80, 3, 0), open_rows=open_rows)
    for _ in range((MAX_WAIT + 1) * open_rows + 1):
        if "0" in next(packing).names:
            break
    else:
        pytest.fail("example 0 is still waiting")


# Examples that cannot be packed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "large, complaint",
    [
        ((30, 0, 0), "30 tokens of 25"),
        ((1, 3, 0), "28 tokens of 25, 3 global views of 1"),
        ((1, 0, 4), "4 crops of 2"),
        ((3, 2, 4), "37 tokens of 25, 2 global views of 1, 4 crops of 2"),
    ],
)
def test_example_larger_than_a_row_names_itself_its_sizes_and_the_limits(large, complaint):
    samples, row = cycle([(5, 0, 0), large, (6, 0, 0)]), budget(25, 1, 2)
    packing = new_stream(samples, row)
    with pytest.raises(RecordError) as error:
        next(packing)
    message = str(error.value)
    assert f"record 1 does not fit a row: {complaint}; raise" in message
    assert "batch.tokens" in message and "data.bad_records=skip" in message

    packed = next(new_stream(samples, row, skip_oversize=True))
    assert packed.skipped[0].name == "1" and complaint in packed.skipped[0].reason
    assert "1" not in packed.names


def test_examples_may_be_limited_to_less_than_a_row():
    samples = cycle([(5, 0, 0), (12, 0, 0), (10, 0, 0)])
    row = dataclasses.replace(budget(25, 1, 2), example_tokens=10)
    with pytest.raises(RecordError, match="record 1 does not fit a row: 12 tokens of 10; raise batch.example_tokens"):
        next(new_stream(samples, row))
    names = [name for _ in range(3) for name in next(new_stream(samples, row, skip_oversize=True)).names]
    assert "0" in names and "2" in names and "1" not in names


def test_example_that_fills_a_row_fits():
    full = (3, 1, 2)
    row = budget(num_tokens(full), 1, 2)
    packed = next(new_stream(cycle([full]), row))
    assert packed.names == ("0",)
    assert packed.used[:3].tolist() == list(row.sizes)


def test_skipped_records_travel_with_the_next_row():
    records = [sample("a", (5, 0, 0)), Skipped("b", "torn"), sample("c", (5, 0, 0)), sample("d", (5, 0, 0))]
    packing = new_stream(grain.MapDataset.source(records).repeat(), budget(10, 0, 0), open_rows=1)
    rows = [next(packing) for _ in range(3)]
    assert [[s.name for s in row.skipped] for row in rows] == [["b"], ["b"], []]
    assert [row.names for row in rows] == [("a", "c"), ("d", "a"), ("c", "d")]


def test_nothing_but_unusable_records_is_an_error_and_not_an_endless_wait():
    samples = cycle([(30, 0, 0)])
    with pytest.raises(RecordError, match=f"{MAX_SKIPPED} consecutive records.*30 tokens of 25"):
        next(new_stream(samples, budget(25, 1, 2), skip_oversize=True))


def test_state_whose_records_have_gone_bad_is_refused():
    row = budget(10, 0, 0)
    state = next(new_stream(cycle([(6, 0, 0)]), row)).state
    assert state["open"]
    gone = grain.MapDataset.range(10**9).map(lambda index: Skipped(str(index), f"record {index} is torn"))
    with pytest.raises(CheckpointError, match="record 1 is torn.*data files have changed"):
        new_stream(gone, row, state=state)
