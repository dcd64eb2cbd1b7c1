"""The contact sheet is written at its stated size, whatever the answers say, and shows rights and wrongs."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepjax.config import DigitsSource
from stepjax.data.digits import DigitsRecords
from stepjax.evaluation.contact_sheet import CARD, GAP, HEADER, Item, contact_sheet, pick_items, sheet_size
from stepjax.rewards.verify import is_right

PAPER = (255, 255, 210)  # no colour of the sheet itself
RIGHT, WRONG = (26, 138, 74), (205, 48, 52)


def _item(task: Any, index: int, text: str | None = None) -> Item:
    """A held-out question, answered with `text` or rightly."""
    record = DigitsRecords(DigitsSource(name=task, weight=1.0, task=task, split="held_out"), seed=0)[index]
    content = record["messages"][0]["content"]
    image = None if isinstance(content, str) else content[0]["image"]
    answer: str = record["answer"]["text"] if text is None else text
    return Item(record, image, answer, is_right(record, answer))


def _results(num_right: int, num_wrong: int, task: str) -> list[Item]:
    right = [_item(task, i) for i in range(num_right)]
    return right + [_item(task, num_right + i, "?") for i in range(num_wrong)]


def _card(sheet: Image.Image, index: int, columns: int) -> np.ndarray:
    row, column = divmod(index, columns)
    left, top = GAP + column * (CARD[0] + GAP), HEADER + row * (CARD[1] + GAP)
    return np.asarray(sheet.crop((left, top, left + CARD[0], top + CARD[1])))


def _has(card: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((card == colour).all(axis=-1).any())


def test_the_sheet_has_its_stated_size_and_a_card_each(tmp_path):
    items = [_item(task, 0) for task in ("transcribe", "count", "add", "arithmetic")] + [_item("count", 1, "99")]
    contact_sheet(items, tmp_path / "sheet.png", title="Held out", columns=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == sheet_size(5, 3) == (3 * CARD[0] + 4 * GAP, HEADER + 2 * (CARD[1] + GAP))
        cards = [_card(sheet.convert("RGB"), i, 3) for i in range(6)]
    for card in cards[:4]:
        assert _has(card, RIGHT) and not _has(card, WRONG)
    assert _has(cards[4], WRONG) and not _has(cards[4], RIGHT)
    assert len(np.unique(cards[5].reshape(-1, 3), axis=0)) == 1, "there is no sixth card"


@pytest.mark.parametrize("task, answer", [("box", [0, 0, 50, 50]), ("point", [20, 30]), ("number", 5)])
def test_answers_that_are_no_texts(task, answer, tmp_path):
    record = {"id": "a", "messages": [{"role": "user", "content": "q"}], "task": task, "answer": answer}
    item = Item(record, Image.new("RGB", (10, 10)), "?", is_right(record, "?"))
    contact_sheet([item], tmp_path / "sheet.png", title="t", columns=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert _has(_card(sheet.convert("RGB"), 0, 1), WRONG)


def test_the_image_is_shown_enlarged_pixel_by_pixel(tmp_path):
    item = _item("transcribe", 0)
    assert item.image is not None
    contact_sheet([item], tmp_path / "sheet.png", title="one", columns=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        page = np.asarray(sheet.convert("RGB"))
    scale = min(6, (CARD[0] - 24) // item.image.width)
    assert scale > 1
    image = np.asarray(item.image).repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = image.shape[:2]
    left = GAP + (CARD[0] - width) // 2
    tops = [y for y in range(page.shape[0] - height) if (page[y : y + height, left : left + width] == image).all()]
    assert len(tops) == 1


def test_the_point_is_drawn_where_the_model_points(tmp_path):
    """A wrong point is a red cross at its place, and the right place gets a green frame."""
    record = {
        "id": "a",
        "task": "point",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Point at the digit 7."}]}],
        "answer": {"text": "(80, 50)", "box": [70.0, 20.0, 90.0, 80.0]},
    }
    image = Image.new("RGB", (50, 30), PAPER)
    contact_sheet([Item(record, image, "(20, 60)", False)], tmp_path / "sheet.png", title="one", columns=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        card = _card(sheet.convert("RGB"), 0, 1)
    picture = (card == PAPER).all(axis=-1)
    ys, xs = np.nonzero(picture)
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    assert (right - left, bottom - top) == (300, 180)
    view = card[top:bottom, left:right]
    red_y, red_x = np.nonzero((view == WRONG).all(axis=-1))
    assert abs(red_x.mean() - 0.205 * 300) < 2 and abs(red_y.mean() - 0.605 * 180) < 2
    green_y, green_x = np.nonzero((view == RIGHT).all(axis=-1))
    np.testing.assert_allclose((green_x.min(), green_x.max()), (210, 270), atol=2)
    np.testing.assert_allclose((green_y.min(), green_y.max()), (36, 144), atol=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 5000,
        "many words " * 500,
        "line\n\n\tbreaks\r\n",
        "\x00\x07",
        "\u4e16\u754c \U0001f600 \u202e",
        "(50, 50)",
    ],
)
def test_any_answer_can_be_drawn(tmp_path, text):
    items = [_item(task, 0, text) for task in ("transcribe", "point", "arithmetic")]
    contact_sheet(items, tmp_path / "sheet.png", title=text)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == sheet_size(3, 5)


def test_a_long_answer_stays_inside_its_card(tmp_path):
    contact_sheet([_item("count", 0, "W" * 300)], tmp_path / "sheet.png", title="W" * 300, columns=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        page = np.asarray(sheet.convert("RGB"))
        card = _card(sheet.convert("RGB"), 0, 1)
    assert (card[:, -8:] == card[:, -1:]).all(), "nothing is drawn at the right edge of the card"
    assert (page[:, -GAP:] == page[0, -1]).all(), "nothing is drawn beyond the last column"


def test_large_images_are_shrunk_and_no_items_make_an_empty_sheet(tmp_path):
    record = {"id": "a", "messages": [{"role": "user", "content": "Describe it. " * 40}], "answer": {"text": "a cat"}}
    large = Image.new("L", (3000, 40), 128)
    contact_sheet([Item(record, large, "a dog", False)], tmp_path / "large.png", title="")
    contact_sheet([], tmp_path / "empty.png", title="nothing yet")
    with Image.open(tmp_path / "empty.png") as sheet:
        assert sheet.size == sheet_size(0, 5) == (5 * CARD[0] + 6 * GAP, HEADER)


def test_the_pick_mixes_tasks_and_shows_right_and_wrong():
    results = _results(20, 4, "count") + _results(3, 30, "add") + _results(10, 0, "arithmetic")
    picked = pick_items(results, 12)
    tasks = [item.record["task"] for item in picked]
    assert tasks == ["count"] * 4 + ["add"] * 4 + ["arithmetic"] * 4
    for task in ("count", "add"):
        assert {item.correct for item in picked if item.record["task"] == task} == {True, False}
    assert len({item.record["id"] for item in picked}) == 12


def test_the_pick_fills_up_from_the_tasks_that_have_more():
    results = _results(1, 0, "count") + _results(10, 0, "add")
    assert [item.record["task"] for item in pick_items(results, 6)] == ["count"] + ["add"] * 5
    assert len(pick_items(results, 100)) == 11
    assert pick_items([], 5) == [] and pick_items(results, 0) == []


def test_a_wrong_answer_is_never_left_out():
    results = _results(30, 0, "count") + _results(29, 1, "add")
    for count in (1, 2, 3, 10):
        picked = pick_items(results, count)
        assert len(picked) == count and sum(not item.correct for item in picked) == 1
