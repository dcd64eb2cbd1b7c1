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
    transcript,
)
from stepjax.data.documents_render import CELLS, SHAPES, SIDE, Mark, Page, draw_page
from stepjax.data.records import open_source
from stepjax.errors import ConfigError
from stepjax.evaluation.scoring import documents_chance_level
from stepjax.processing.processor import Processor
from stepjax.rewards.verify import is_right

TASKS = ("read", "count", "point")
RECIPES = Path(__file__).parents[2] / "configs" / "documents"


def _records(task: Any = "read", split: Any = "train", seed: int = 0, **fields: Any) -> DocumentsRecords:
    source = DocumentsSource(**{"name": "a", "weight": 1.0, "task": task, "split": split} | fields)
    return DocumentsRecords(source, seed)


@pytest.fixture(scope="module")
def records():
    """Ten records of each task and split."""
    return [_records(task, split)[i] for split in ("train", "held_out") for task in TASKS for i in range(10)]


def _prompt_and_image(record) -> tuple[str, Any]:
    question, picture = record["messages"][0]["content"]
    return question["text"], picture["image"]


def test_a_record_depends_on_seed_source_and_index_alone(records):
    fresh = pickle.loads(pickle.dumps(_records()))
    for i in (3, 0):
        (prompt, image), (same_prompt, same_image) = map(_prompt_and_image, (records[i], fresh[np.int64(i)]))
        assert prompt == same_prompt and image.tobytes() == same_image.tobytes()
        assert records[i]["page"] == fresh[i]["page"] and records[i]["answer"] == fresh[i]["answer"]
    others = [_records(seed=1), _records(name="b"), _records("count"), _records(split="held_out")]
    assert len({str(records[0]["page"]) for records in [fresh, *others]}) == 5


def test_the_splits_share_no_scan(records):
    seen: dict[str, set[int]] = {"train": set(), "held_out": set()}
    for record in records:
        seen[record["id"].split("/")[2]].update(scan for field in record["page"].fields for scan in field.scan_ids)
    by_class = load_scans().by_class
    for split, scans in seen.items():
        assert len(scans) > 50 and scans <= {scan for ids in by_class[split] for scan in ids}
    assert not seen["train"] & seen["held_out"]


def test_answers_are_true_of_the_page(records):
    labels = load_scans().labels
    for record in records:
        page, (prompt, _), text = record["page"], _prompt_and_image(record), record["answer"]["text"]
        shapes = Counter(mark.shape for mark in page.marks)
        match record["task"]:
            case "read":
                [field] = [each for each in page.fields if prompt == f"What is the {each.label}?"]
                assert text == "".join(str(labels[scan]) for scan in field.scan_ids)
            case "count":
                [shape] = [each for each in SHAPES if prompt == f"How many {PLURALS[each]}?"]
                assert text == str(shapes[shape]) and shape != page.marks[0].shape
            case "point":
                assert prompt == f"Point at the {page.marks[0].shape}."
                x, y = map(int, text.strip("()").split(", "))
                assert page.marks[0].cell == (x * CELLS // 100, y * CELLS // 100)
        messages = record["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] and messages[1]["content"] == text
        assert is_right(record, text) and not is_right(record, text + "0") and not is_right(record, "")
        assert shapes[page.marks[0].shape] == 1 and len(shapes) == len(SHAPES) and max(shapes.values()) <= MOST_MARKS
        is_train = "train" in record["id"]
        fewest, most, shortest = (1, len(LABELS), 1) if is_train else (HELD_OUT_FIELDS, HELD_OUT_FIELDS, DIGITS)
        assert fewest <= len(page.fields) <= most
        assert all(shortest <= len(field.scan_ids) <= DIGITS for field in page.fields)


def test_nothing_shares_a_cell_and_held_out_pages_are_full(records):
    for record in records:
        page = record["page"]
        written = [(field.cell[0] + x, field.cell[1]) for field in page.fields for x in range(SLOT)]
        taken = [*written, *page.texts, *(mark.cell for mark in page.marks)]
        assert len(set(taken)) == len(taken)
        assert all(0 <= place < CELLS for cell in taken for place in cell)
        if "held_out" in record["id"]:
            assert len(taken) + MARK_SLOTS * SLOT - len(page.marks) == CELLS**2


def test_the_reasoning_is_what_is_in_each_cell(records):
    labels = load_scans().labels
    for record in records:
        page, text = record["page"], record["messages"][1]["reasoning_content"]
        assert text == transcript(page) and len(text) == CELLS**2

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


@pytest.mark.parametrize("task", TASKS)
def test_as_text_the_transcript_is_in_the_place_of_the_image(task):
    for i in range(5):
        text, scan = _records(task, as_text=True)[i], _records(task)[i]
        prompt, image = _prompt_and_image(scan)
        assert text["messages"][0]["content"] == f"{prompt}\n{transcript(text['page'])}" and image.size == (SIDE, SIDE)
        assert text["messages"][1] == scan["messages"][1] and text["page"] == scan["page"]
        assert is_right(text, text["answer"]["text"]) and not is_right(text, "(1, 99)")
    assert 0 < documents_chance_level(_records(task, "held_out").source) <= 1 / 4


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


def test_pages_are_square_and_worn(records):
    for record in records:
        assert _prompt_and_image(record)[1].size == (SIDE, SIDE) and _prompt_and_image(record)[1].mode == "RGB"
    rough, plain = (np.asarray(_prompt_and_image(_records(wear=wear)[0])[1], np.float32) for wear in (1.0, 0.0))
    steps = [np.abs(np.diff(pixels_HWC, axis=0)).mean() for pixels_HWC in (rough, plain)]
    assert steps[0] > 3 * steps[1]


@pytest.mark.parametrize("name", ["sft_text", "sft", "sft_control", "tofc"])
def test_the_pages_of_a_step_fill_the_recipes_rows(name):
    """The longest of them fit, as many as there are crops; shorter ones waste little."""
    config = load_recipe(RECIPES / f"{name}.py", SftConfig)
    images = config.images.merged_for(config.model)
    processor = Processor.from_config(images, config.tokenizer)
    examples = [
        processor.process(records[i])
        for source in config.data.sources
        for records in [open_source(source, 0)]
        for i in range(30)
    ]
    assert all(len(example.global_views) == len(example.crops) == (name != "sft_text") for example in examples)
    longest, pages = max(len(example.tokens) for example in examples), config.batch.crops or 2
    assert config.batch.tokens * 0.9 < pages * longest <= config.batch.tokens


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
