"""The mixture keeps its weights, is random-access and deterministic, and hides no source and no bad record."""

import collections
import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest

from stepjax.config import BadRecords, DigitsSource, ImageConfig, JsonlSource, Source, TokenizerConfig
from stepjax.data import mixture as mixture_module
from stepjax.data.mixture import SHUFFLE_WINDOW, Sample, Skipped, mixture
from stepjax.data.records import open_source
from stepjax.errors import RecordError
from stepjax.processing.processor import Processor

IMAGES = ImageConfig(global_size=56, crop_size=28, patch_size=14, max_side=112)
processor = Processor.from_config(IMAGES, TokenizerConfig(path="demo", generation_starts_thinking=False))


def jsonl(tmp_path, name: str, records: int | list, weight: float = 1.0) -> JsonlSource:
    """A source of short documents (their number) or of given lines."""
    if isinstance(records, int):
        records = [{"text": f"{i}"} for i in range(records)]
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return JsonlSource(name=name, weight=weight, path=str(path))


def mixed(*sources: Source, seed: int = 0, bad_records: BadRecords = "error") -> Any:
    opened = [open_source(source, seed) for source in sources]
    return mixture(sources, opened, processor, seed=seed, bad_records=bad_records)


def names(samples, indices) -> list[str]:
    return [samples[i].example.name for i in indices]


# Order ---------------------------------------------------------------------------------------------------------------


def test_weights_hold_in_every_window(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_module, "SHUFFLE_WINDOW", 500)
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    samples = mixed(*(jsonl(tmp_path, name, 1000, weight) for name, weight in weights.items()))
    for window in (0, 3_000_000):
        indices = range(window * 500, (window + 1) * 500)
        counts = collections.Counter(samples[i].domain for i in indices)
        shares = [counts[domain] / 500 for domain in range(3)]
        np.testing.assert_allclose(shares, list(weights.values()), atol=0.005)


def test_weights_need_not_add_up_to_one(tmp_path):
    sources = [jsonl(tmp_path, "a", 1000), jsonl(tmp_path, "b", 1000)]
    small, large = (
        mixed(*(dataclasses.replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)))
        for weights in ((0.75, 0.25), (30, 10))
    )
    assert names(small, range(50)) == names(large, range(50))


@pytest.mark.parametrize("num_streams", [2, 16])
def test_no_stride_falls_in_step_with_the_mixing_rhythm(tmp_path, num_streams):
    """Without the shuffle, sources of weights 1:1 alternate, and a stream of an even stride sees one of them only."""
    samples = mixed(jsonl(tmp_path, "a", 1000), jsonl(tmp_path, "b", 1000))
    for stream in range(num_streams):
        domains = [samples[stream + i * num_streams].domain for i in range(40)]
        assert 0.2 < np.mean(domains) < 0.8, (stream, np.mean(domains))


def test_streams_wider_than_the_window_see_all_sources(tmp_path):
    samples = mixed(jsonl(tmp_path, "a", 1000), jsonl(tmp_path, "b", 1000))
    for stream in (0, 1, 5000):
        domains = [samples[stream + i * 2 * SHUFFLE_WINDOW].domain for i in range(100)]
        assert 0.25 < np.mean(domains) < 0.75, (stream, np.mean(domains))


def test_samples_depend_on_seed_and_index_alone(tmp_path):
    sources = [DigitsSource(name="strip", weight=1, task="transcribe"), jsonl(tmp_path, "docs", 1000)]
    one, other = mixed(*sources), mixed(*sources)
    indices = [5, 0, 90_000_000, 11, 3]
    expected = [one[i] for i in sorted(indices)]
    for sample, index in zip(expected, sorted(indices), strict=True):
        again = other[index]
        assert again.domain == sample.domain and again.example.name == sample.example.name
        np.testing.assert_array_equal(again.example.tokens, sample.example.tokens)
        views, other_views = (draft.example(IMAGES).global_views for draft in (sample.example, again.example))
        np.testing.assert_array_equal(other_views, views)


def test_seeds_give_other_orders(tmp_path):
    sources = [jsonl(tmp_path, "a", 100), jsonl(tmp_path, "b", 100)]
    orders = [names(mixed(*sources, seed=seed), range(50)) for seed in (0, 1, 2)]
    assert orders[0] != orders[1] and orders[1] != orders[2]


def test_sources_of_the_same_size_are_shuffled_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_module, "SHUFFLE_WINDOW", 1)
    samples = mixed(jsonl(tmp_path, "a", 50), jsonl(tmp_path, "b", 50))
    order = names(samples, range(100))
    a, b = ([name.split("/")[1] for name in order if name.startswith(source)] for source in "ab")
    assert sorted(a) == sorted(b) and a != b


def test_every_epoch_sees_every_record_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_module, "SHUFFLE_WINDOW", 1)  # epochs as they come, not spread over windows
    samples = mixed(jsonl(tmp_path, "docs", 50))
    epochs = [names(samples, range(50 * epoch, 50 * (epoch + 1))) for epoch in range(3)]
    everything = sorted(f"docs/{i}" for i in range(50))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert everything != epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_windows_only_reorder(tmp_path, monkeypatch):
    """Each window holds what the plain mixture has there: nothing is repeated or left out."""
    monkeypatch.setattr(mixture_module, "SHUFFLE_WINDOW", 500)
    samples = mixed(jsonl(tmp_path, "docs", 500))
    assert len(set(names(samples, range(500)))) == 500


# Bad records ---------------------------------------------------------------------------------------------------------

BAD = [
    ('{"id": "half"', "docs/1", "not valid JSON"),
    ({"id": "empty-handed"}, "empty-handed", "give exactly one"),
    ({"id": "lost", "content": [{"type": "image", "image": "no/such.png"}]}, "lost", "no/such.png"),
    ({"id": "mute", "messages": [{"role": "user", "content": "hello"}]}, "mute", "nothing to train on"),
]


def find(samples, wanted: type) -> int:
    for index in range(200):
        if isinstance(samples[index], wanted):
            return index
    raise AssertionError(f"no {wanted}")


@pytest.mark.parametrize("record, name, reason", BAD)
def test_bad_record_is_skipped_by_name_when_asked(tmp_path, record, name, reason):
    samples = mixed(jsonl(tmp_path, "docs", [{"text": "fine"}, record]), bad_records="skip")
    skipped = samples[find(samples, Skipped)]
    assert skipped.name == name
    assert reason in skipped.reason and name in skipped.reason
    assert samples[find(samples, Sample)].example.name == "docs/0"


@pytest.mark.parametrize("record, name, reason", BAD)
def test_bad_record_stops_the_run_and_names_the_way_out(tmp_path, record, name, reason):
    sources = [jsonl(tmp_path, "docs", [{"text": "fine"}, record])]
    index = find(mixed(*sources, bad_records="skip"), Skipped)
    with pytest.raises(RecordError) as error:
        mixed(*sources)[index]
    message = str(error.value)
    assert name in message and reason in message and "data.bad_records=skip" in message


def test_source_that_cannot_be_opened_is_an_error_at_once(tmp_path):
    with pytest.raises(RecordError, match="'docs'.*cannot be read"):
        mixed(JsonlSource(name="docs", weight=1, path=str(tmp_path / "none.jsonl")), bad_records="skip")


def test_mixture_pickles_for_data_workers(tmp_path):
    import cloudpickle

    samples = mixed(DigitsSource(name="sums", weight=1, task="arithmetic"), jsonl(tmp_path, "docs", 1000))
    copy = pickle.loads(cloudpickle.dumps(samples))
    assert names(copy, range(10)) == names(samples, range(10))
