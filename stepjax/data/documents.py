"""Questions about worn pages, composed on the fly. Works offline.

| task  | prompt              | answer   |
|-------|---------------------|----------|
| read  | What is the sum?    | 407      |
| count | How many crosses?   | 3        |
| point | Point at the cross. | (68, 31) |

A page has up to six fields, each a printed label and handwritten digits, four kinds of marks, and printed text to
ignore (`data.documents_render`). One kind of mark is there once: the one to point at. A point is a place in hundredths
of the page's width and height, 0..99 from the top left corner; it is right inside the mark's box. The answer to learn
is the cell's centre, which lies in the box wherever the mark is in its cell.

The reasoning before an answer is a transcript of the page: a character for every cell, row by row; a digit, a label's
first letter, o, #, ^ or x for a mark, ~ for text to ignore, . for nothing. A small model does not learn to find answers
among a page's features, but it learns to copy the page out and to find them in the copy. That much it learns from text
alone, ten times as fast: with `as_text` the prompt has the transcript in place of the image. The page comes last in the
prompt: a cell is then always as far from its character, whatever the question.

The splits share no scans. Held-out pages are full: fields have as many digits as there is room for, and the rest is
printed text. Training pages may be emptier.

Record i of a source depends only on (seed, source, i): any process can make any record, in any order.
"""

import hashlib
import operator
from typing import Any

import numpy as np

from stepjax.config import DocumentsSource, Split
from stepjax.data.digits_render import load_scans
from stepjax.data.documents_render import CELL, CELLS, SHAPES, SIDE, Cell, Field, Mark, Page, draw_page

NUM_RECORDS = 10_000_000  # per source; more than a run reads

LABELS = ("sum", "tax", "fee", "day", "age", "lot")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SLOT = 4  # cells in a row for a field, or for as many marks
DIGITS = SLOT - 1  # of a field, at most
HELD_OUT_FIELDS = 4
MARK_SLOTS = 4
MOST_MARKS = 4  # of a kind
CHARACTERS = {"circle": "o", "square": "#", "triangle": "^", "cross": "x"}


class DocumentsRecords:
    """Random access to the records of a documents source, for Grain and evaluation. Stateless and picklable.

    Besides `id`, `messages` and `task`, a record has `page`, what is drawn, and its `answer` with the `text` and, for
    points, the `box` of the mark (left, top, right, bottom, in hundredths of the page).
    """

    def __init__(self, source: DocumentsSource, seed: int):
        self.source, self.seed = source, seed
        key = f"{source.name}/{source.task}/{source.split}".encode()
        self._source_key = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def __len__(self) -> int:
        return NUM_RECORDS

    def __repr__(self) -> str:
        return f"DocumentsRecords({self.source!r}, seed={self.seed})"

    def files(self) -> list[dict[str, Any]]:
        return []

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < NUM_RECORDS:
            raise IndexError(f"record {index} of {self.source.name}: there are {NUM_RECORDS}")
        rng = np.random.default_rng((self.seed, self._source_key, index))
        task, split = self.source.task, self.source.split
        page = _page(rng, split)
        questions = _questions(page)[task]
        prompt, answer = questions[rng.integers(len(questions))]
        copied = transcript(page)
        if self.source.as_text:
            content: Any = f"{prompt}\n{copied}"
            column, row = page.marks[0].cell
            box = (CELL * column, CELL * row, CELL * (column + 1), CELL * (row + 1))
        else:
            image, (box, *_) = draw_page(rng, page, wear=self.source.wear)
            content = [{"type": "text", "text": prompt}, {"type": "image", "image": image}]
        if task == "point":
            answer["box"] = [100 * x / SIDE for x in box]
        said = {"role": "assistant", "reasoning_content": copied, "content": answer["text"]}
        return {
            "id": f"documents/{task}/{split}/{index}",
            "messages": [{"role": "user", "content": content}, said],
            "task": task,
            "answer": answer,
            "page": page,
        }


def _page(rng: np.random.Generator, split: Split) -> Page:
    """A random page. Its first mark is the only one of its kind."""
    slots = [(column, row) for row in range(CELLS) for column in range(0, CELLS, SLOT)]
    slots = [slots[i] for i in rng.permutation(len(slots))]
    is_train, by_class = split == "train", load_scans().by_class[split]
    num_fields = min(rng.geometric(0.3), len(LABELS)) if is_train else HELD_OUT_FIELDS  # few are easy to learn from
    fields = []
    for label in rng.permutation(LABELS)[:num_fields].tolist():
        digits = rng.integers(10, size=rng.integers(1, DIGITS + 1) if is_train else DIGITS).tolist()
        scans = tuple(by_class[digit][rng.integers(len(by_class[digit]))] for digit in digits)
        fields.append(Field(label, scans, slots.pop()))
    marked = _cells([slots.pop() for _ in range(MARK_SLOTS)])
    counts = [1, *rng.integers(1, MOST_MARKS + 1, size=len(SHAPES) - 1).tolist()]
    shapes = rng.permutation(SHAPES).repeat(counts).tolist()
    marks = tuple(Mark(shape, marked[i]) for shape, i in zip(shapes, rng.permutation(len(marked)), strict=False))
    most = rng.integers(-len(slots), len(slots) + 1) if is_train else len(slots)  # half of the pages have no text
    texts = slots[: max(most, 0)]
    return Page(tuple(fields), marks, tuple(_cells(texts)))


def _cells(slots: list[Cell]) -> list[Cell]:
    return [(column + place, row) for column, row in slots for place in range(SLOT)]


def transcript(page: Page) -> str:
    """A character for every cell, row by row."""
    lines = [["."] * CELLS for _ in range(CELLS)]
    for column, row in page.texts:
        lines[row][column] = "~"
    for field in page.fields:
        column, row = field.cell
        characters = [field.label[0], *_number(field)]
        lines[row][column : column + len(characters)] = characters
    for mark in page.marks:
        lines[mark.cell[1]][mark.cell[0]] = CHARACTERS[mark.shape]
    return "".join(map("".join, lines))


def _number(field: Field) -> str:
    labels = load_scans().labels
    return "".join(str(labels[scan]) for scan in field.scan_ids)


def _questions(page: Page) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Prompts and answers of each task."""
    shapes = [mark.shape for mark in page.marks]
    single, others = page.marks[0], [shape for shape in SHAPES if shape in shapes[1:]]
    x, y = (int(100 * (place + 0.5) / CELLS) for place in single.cell)
    return {
        "read": [(f"What is the {field.label}?", {"text": _number(field)}) for field in page.fields],
        "count": [(f"How many {PLURALS[shape]}?", {"text": str(shapes.count(shape))}) for shape in others],
        "point": [(f"Point at the {single.shape}.", {"text": f"({x}, {y})"})],
    }
