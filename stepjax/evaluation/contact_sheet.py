"""A picture of a model's answers: one card per question with the answer and, if wrong, the expected one."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from stepjax.tasks import extraction, gold

# Pixels.
CARD = (348, 316)
GAP = 14
HEADER = 64
PADDING = 12
_PICTURE = (CARD[0] - 2 * PADDING, 200)
_MAX_ENLARGEMENT = 6
_STRIPE = 5  # the coloured edge of a card

_PAGE, _WHITE, _MAT = (236, 238, 241), (255, 255, 255), (214, 218, 224)
_TEXT, _FAINT = (28, 32, 38), (104, 112, 122)
_RIGHT, _WRONG = (26, 138, 74), (205, 48, 52)
_ELLIPSIS = "..."

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Item(NamedTuple):
    """One question and its result. `image` is None for questions without an image."""

    record: dict[str, Any]
    image: Image.Image | None
    text: str  # the model's answer
    correct: bool


def pick_items(results: Sequence[Item], count: int) -> list[Item]:
    """A mix for a sheet: tasks take turns, each starting with a right and a wrong answer if it has both.

    The share of right answers on the sheet is therefore not the accuracy. The items are grouped by task. At least one
    is wrong if any result is.
    """
    tasks: dict[str, list[Item]] = {}
    for item in results:
        tasks.setdefault(item.record.get("task", ""), []).append(item)
    queues = []
    for items in tasks.values():
        right = next((item for item in items if item.correct), None)
        wrong = next((item for item in items if not item.correct), None)
        rest = [item for item in items if item is not right and item is not wrong]
        queues.append([item for item in (right, wrong) if item is not None] + rest)

    num_taken = [0] * len(queues)
    while sum(num_taken) < min(count, len(results)):
        for i, queue in enumerate(queues):
            if num_taken[i] < len(queue) and sum(num_taken) < count:
                num_taken[i] += 1
    picked = [item for queue, taken in zip(queues, num_taken, strict=True) for item in queue[:taken]]
    first_wrong = next((item for item in results if not item.correct), None)
    if picked and first_wrong is not None and all(item.correct for item in picked):
        picked[-1] = first_wrong
    return picked


def sheet_size(num_items: int, columns: int) -> tuple[int, int]:
    """Width and height of a contact sheet, in pixels."""
    rows = math.ceil(num_items / columns)
    return GAP + columns * (CARD[0] + GAP), HEADER + rows * (CARD[1] + GAP)


def contact_sheet(items: Sequence[Item], path: str | Path, *, title: str, columns: int = 5) -> None:
    """Writes a PNG with a card for every item: image, prompt, answer, and the expected answer if it is wrong.

    Images are enlarged without smoothing, so they show the model's input. A cross marks the point that the model names;
    if it is wrong, a frame marks the right place.
    """
    size = sheet_size(len(items), columns)
    sheet = Image.new("RGB", size, _PAGE)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(26)
    draw.text((GAP, HEADER / 2), _lines(title, font, size[0] - 2 * GAP, 1)[0], _TEXT, font, anchor="lm")
    for i, item in enumerate(items):
        row, column = divmod(i, columns)
        sheet.paste(_card(item), (GAP + column * (CARD[0] + GAP), HEADER + row * (CARD[1] + GAP)))
    sheet.save(path, format="PNG", optimize=True)


def _card(item: Item) -> Image.Image:
    card = Image.new("RGB", CARD, _WHITE)
    draw = ImageDraw.Draw(card)
    colour = _RIGHT if item.correct else _WRONG
    draw.rectangle((0, 0, CARD[0], _STRIPE - 1), colour)
    top = _STRIPE + PADDING
    draw.rectangle((PADDING, top, PADDING + _PICTURE[0] - 1, top + _PICTURE[1] - 1), _MAT)
    width = _PICTURE[0]
    prompt = _prompt(item.record)
    if item.image is None:
        font = ImageFont.load_default(26)
        question = "\n".join(_lines(prompt, font, width - 2 * PADDING, 4))
        middle = (PADDING + width / 2, top + _PICTURE[1] / 2)
        draw.multiline_text(middle, question, _TEXT, font, anchor="mm", align="center")
        prompt = "no image"
    else:
        picture = _picture(item, item.image)
        card.paste(picture, (PADDING + (width - picture.width) // 2, top + (_PICTURE[1] - picture.height) // 2))

    font = ImageFont.load_default(15)
    y = top + _PICTURE[1] + 8
    draw.text((PADDING, y), _lines(prompt, font, width, 1)[0], _FAINT, font)
    mark = 22
    _draw_mark(draw, PADDING, y + 28, mark, item.correct)
    answer_font = ImageFont.load_default(22)
    answer = _lines(item.text, answer_font, width - mark - 10, 1)[0]
    draw.text((PADDING + mark + 10, y + 26), answer or "(no answer)", colour, answer_font)
    if not item.correct:
        expected = f"expected {gold.shown(item.record)}"
        draw.text((PADDING + mark + 10, y + 56), _lines(expected, font, width - mark - 10, 1)[0], _TEXT, font)
    return card


def _picture(item: Item, image: Image.Image) -> Image.Image:
    fit = min(_PICTURE[0] / image.width, _PICTURE[1] / image.height)
    if fit < 1:
        size = (max(1, int(image.width * fit)), max(1, int(image.height * fit)))
        picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    else:
        # An integer factor, so that all pixels have the same size.
        factor = min(int(fit), _MAX_ENLARGEMENT)
        size = (image.width * factor, image.height * factor)
        picture = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    if item.record.get("task") != "point":
        return picture
    draw = ImageDraw.Draw(picture)
    answer = item.record["answer"]
    if not item.correct and isinstance(answer, dict):
        left, top, right, bottom = answer["box"]
        scale_x, scale_y = picture.width / 100, picture.height / 100
        draw.rectangle((left * scale_x, top * scale_y, right * scale_x, bottom * scale_y), outline=_RIGHT, width=2)
    point = extraction.point(item.text)
    if point is not None:
        x, y = point[0] / 100 * picture.width, point[1] / 100 * picture.height
        # A white outline keeps the cross visible on ink.
        for colour, width, arm in ((_WHITE, 7, 14), (_RIGHT if item.correct else _WRONG, 3, 12)):
            draw.line((x - arm, y, x + arm, y), colour, width)
            draw.line((x, y - arm, x, y + arm), colour, width)
    return picture


def _draw_mark(draw: ImageDraw.ImageDraw, left: float, top: float, size: float, correct: bool) -> None:
    """A white tick or cross on a disc; drawn, because the built-in font has neither."""
    draw.ellipse((left, top, left + size, top + size), _RIGHT if correct else _WRONG)
    tick = (((0.26, 0.52), (0.44, 0.70), (0.75, 0.34)),)
    cross = (((0.31, 0.31), (0.69, 0.69)), ((0.69, 0.31), (0.31, 0.69)))
    for stroke in tick if correct else cross:
        points = [(left + x * size, top + y * size) for x, y in stroke]
        draw.line(points, _WHITE, 3, joint="curve")


def _prompt(record: dict[str, Any]) -> str:
    """The text of the last user message."""
    for message in reversed(record["messages"]):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            return " ".join(part["text"] for part in content if part.get("type") == "text")
    return ""


def _lines(text: str, font: Font, width: float, max_lines: int) -> list[str]:
    """The text broken at spaces into 1 to `max_lines` lines, cut with "..." where it does not fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [lines[max_lines - 1] + _ELLIPSIS]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Font, width: float) -> str:
    # Answers may have thousands of characters; no card shows more than 200.
    line = line if len(line) <= 200 else line[:200] + _ELLIPSIS
    while line != _ELLIPSIS and font.getlength(line) > width:
        line = line.removesuffix(_ELLIPSIS)[:-1] + _ELLIPSIS
    return line
