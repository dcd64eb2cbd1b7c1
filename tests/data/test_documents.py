"""Pages: addressed by (seed, source, index), disjoint splits, and answers that are true of what is drawn."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepjax.config import DocumentsSource, SftConfig
from stepjax.config_file import load_recipe
from stepjax.data.digits_render import load_scans
from stepjax.data.documents import (
    CHARACTERS,
    DIGITS,
    HELD_OUT_FIELDS,
    LABELS,
    MARK_SLOTS,
    MOST_MARKS,
    PLURALS,
    SLOT,
    DocumentsRecords,
)
from stepjax.data.documents_render import CELL, CELLS, SHAPES, SIDE, Mark, Page, draw_page
from stepjax.data.records import open_source
from stepjax.errors import ConfigError
from stepjax.evaluation.scoring import documents_chance_level
from stepjax.processing.processor import Processor
from stepjax.rewards.verify import is_right

TASKS = ("read", "count", "point")
RECIPES = Path(__file__).parents[2] / "configs" / "documents"


def _records(task: Any = "all", split: Any = "train", seed: int = 0, **fields: Any) -> DocumentsRecords:
    source = DocumentsSource(**{"name": "a", "weight": 1.0, "task": task, "split": split} | fields)
    return DocumentsRecords(source, seed)


@pytest.fixture(scope="module")
def pages():
    """Thirty records of each split, with every question."""
    return {split: [_records(split=split)[i] for i in range(30)] for split in ("train", "held_out")}


def _image(record):
    return record["messages"][0]["content"][0]["image"]


def _turns(record) -> list[tuple[str, str]]:
    """Questions and answers."""
    contents = [message["content"] for message in record["messages"]]
    contents[0] = contents[0][1]["text"]
    return list(zip(contents[::2], contents[1::2], strict=True))


def test_a_record_depends_on_seed_source_and_index_alone(pages):
    fresh = pickle.loads(pickle.dumps(_records()))
    for i in (3, 0):
        same = fresh[np.int64(i)]
        assert _turns(same) == _turns(pages["train"][i]) and same["page"] == pages["train"][i]["page"]
        assert _image(same).tobytes() == _image(pages["train"][i]).tobytes()
    others = [_records(seed=1), _records(name="b"), _records("read"), _records(split="held_out")]
    assert len({str(records[0]["page"]) for records in [fresh, *others]}) == 5


def test_the_splits_share_no_scan(pages):
    seen = {
        split: {scan for each in records for field in each["page"].fields for scan in field.scan_ids}
        for split, records in pages.items()
    }
    by_class = load_scans().by_class
    for split, scans in seen.items():
        assert len(scans) > 50 and scans <= {scan for ids in by_class[split] for scan in ids}
    assert not seen["train"] & seen["held_out"]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_true_of_the_page(pages, split):
    labels = load_scans().labels
    for record in pages[split]:
        page, turns = record["page"], dict(_turns(record))
        shapes = Counter(mark.shape for mark in page.marks)
        expected = {
            f"What is the {each.label}?": "".join(str(labels[s]) for s in each.scan_ids) for each in page.fields
        }
        expected |= {f"How many {PLURALS[shape]}?": str(count) for shape, count in shapes.items()}
        assert turns.pop("List the fields.").count(", ") == len(page.fields) - 1
        single = page.marks[0]
        del expected[f"How many {PLURALS[single.shape]}?"]
        x, y = map(int, turns.pop(f"Point at the {single.shape}.").strip("()").split(", "))
        assert turns == expected
        assert shapes[single.shape] == 1 and len(shapes) == len(SHAPES) and max(shapes.values()) <= MOST_MARKS
        for place, hundredth in zip(single.cell, (x, y), strict=True):
            assert abs((hundredth + 0.5) / 100 * SIDE - (place + 0.5) * CELL) < 11  # jitter and turning
        fewest, most, shortest = (1, len(LABELS), 1) if split == "train" else (HELD_OUT_FIELDS, HELD_OUT_FIELDS, DIGITS)
        assert fewest <= len(page.fields) <= most
        assert all(shortest <= len(field.scan_ids) <= DIGITS for field in page.fields)


def test_nothing_shares_a_cell_and_held_out_pages_are_full(pages):
    for split, records in pages.items():
        for page in (record["page"] for record in records):
            written = [(field.cell[0] + x, field.cell[1]) for field in page.fields for x in range(SLOT)]
            taken = [*written, *page.texts, *(mark.cell for mark in page.marks)]
            assert len(set(taken)) == len(taken)
            assert all(0 <= place < CELLS for cell in taken for place in cell)
            if split == "held_out":
                assert len(taken) + MARK_SLOTS * SLOT - len(page.marks) == CELLS**2


@pytest.mark.parametrize("task", TASKS)
def test_a_task_asks_one_question_and_its_answer_is_right(task):
    records = _records(task, "held_out")
    for i in range(5):
        record = records[i]
        [(_, answer)] = _turns(record)
        assert record["id"] == f"documents/{task}/held_out/{i}" and record["task"] == task
        assert record["answer"]["text"] == answer and is_right(record, answer)
        assert not is_right(record, answer + "0") and not is_right(record, "")
    chance = documents_chance_level(records.source)
    assert chance is not None and 0 < chance <= 1 / 4
    assert documents_chance_level(_records("all").source) is None


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_transcripts_and_lists_say_what_is_where(split):
    labels = load_scans().labels
    for i in range(5):
        record = _records("transcribe", split)[i]
        page, [(prompt, text)] = record["page"], _turns(record)
        assert prompt == "Transcribe the page." and len(text) == CELLS**2 and is_right(record, text)

        def at(cell, text=text):
            return text[cell[1] * CELLS + cell[0]]

        assert [at(mark.cell) for mark in page.marks] == [CHARACTERS[mark.shape] for mark in page.marks]
        assert {at(cell) for cell in page.texts} <= {"~"}
        for field in page.fields:
            column, row = field.cell
            written = field.label[0] + "".join(str(labels[scan]) for scan in field.scan_ids)
            assert text[row * CELLS + column :].startswith(written)
        assert text.count(".") == CELLS**2 - len(page.marks) - len(page.texts) - sum(
            1 + len(field.scan_ids) for field in page.fields
        )

        record = _records("list", split)[i]
        [(prompt, text)] = _turns(record)
        fields = sorted(record["page"].fields, key=lambda field: (field.cell[1], field.cell[0]))
        expected = [f"{field.label} {''.join(str(labels[scan]) for scan in field.scan_ids)}" for field in fields]
        assert prompt == "List the fields." and text.split(", ") == expected and is_right(record, text)


@pytest.mark.parametrize("cell", [(0, 0), (7, 0), (3, 4), (0, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_holds_the_mark(shape, cell):
    """On plain paper: what is drawn lies in the box, and reaches its edges."""
    for seed in range(3):
        image, [box] = draw_page(np.random.default_rng(seed), Page((), (Mark(shape, cell),), ()), wear=0.0)
        pixels_HWC = np.asarray(image, np.int32)
        drawn_HW = np.abs(pixels_HWC - np.median(pixels_HWC, axis=(0, 1))).sum(-1) > 60
        rows, columns = np.nonzero(drawn_HW)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(found, box, atol=3.5)


def test_pages_are_square_and_worn(pages):
    for record in pages["train"]:
        assert _image(record).size == (SIDE, SIDE) and _image(record).mode == "RGB"
    rough, plain = (np.asarray(_image(_records(wear=wear)[0]), np.float32) for wear in (1.0, 0.0))
    steps = [np.abs(np.diff(pixels_HWC, axis=0)).mean() for pixels_HWC in (rough, plain)]
    assert steps[0] > 3 * steps[1]


@pytest.mark.parametrize("name", ["sft_transcripts", "sft", "tofc"])
def test_every_page_fits_the_recipes_row(name):
    config = load_recipe(RECIPES / f"{name}.py", SftConfig)
    images = config.images.merged_for(config.model)
    processor = Processor.from_config(images, config.tokenizer)
    longest = [
        max((records[i] for i in range(30)), key=lambda record: len(str(_turns(record))))
        for records in (_records(source.task) for source in config.data.sources)
    ]
    assert any(len(record["page"].fields) == len(LABELS) for record in longest)
    for example in map(processor.process, longest):
        assert len(example.tokens) <= config.batch.tokens
        assert len(example.global_views) == len(example.crops) == 1


def test_bounds_and_errors():
    source = DocumentsSource(name="pages", weight=1.0, task="read")
    records = open_source(source, 3)
    assert isinstance(records, DocumentsRecords) and records.files() == []
    assert records[len(records) - 1]["id"] == "documents/read/train/9999999"
    for index in (-1, len(records)):
        with pytest.raises(IndexError, match=f"record {index} of pages: there are 10000000"):
            records[index]
    with pytest.raises(ConfigError, match=r"data.sources.pages.wear=1.5: must be from 0 to 1"):
        DocumentsSource(name="pages", weight=1.0, task="read", wear=1.5)
