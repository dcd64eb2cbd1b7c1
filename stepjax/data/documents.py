"""Questions about worn pages, composed on the fly. Works offline.

| task  | prompt              | answer   |
|-------|---------------------|----------|
| read  | What is the total?  | 4072     |
| count | How many crosses?   | 3        |
| point | Point at the cross. | (62, 30) |

The task "all" asks every question about a page in random order, as turns of one conversation. So a training step
computes the features of a page once and learns from ten answers. An "excerpt" is the same on a piece of a page of
128 x 128 pixels, with one or two fields and two kinds of marks: a fifth of the work, and easier to learn to read from.

A page has up to six fields, each a printed label and handwritten digits, four kinds of marks, and printed text to
ignore (`data.documents_render`). One kind of mark is there once: the one to point at. A point is a place in hundredths
of the page's width and height, 0..99 from the top left corner; it is right inside the mark's box.

The splits share no scans. Held-out pages have four fields of 3 or 4 digits; many training pages have fewer or shorter
ones, which teach fastest what a digit is.

Record i of a source depends only on (seed, source, i): any process can make any record, in any order.
"""

import hashlib
import operator
from typing import Any

import numpy as np

from stepjax.config import DocumentsSource, Split
from stepjax.data.digits_render import Box, load_scans
from stepjax.data.documents_render import CELLS, SHAPES, Field, Mark, Page, draw_page

NUM_RECORDS = 10_000_000  # per source; more than a run reads

LABELS = ("total", "date", "room", "order", "page", "code")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
# Probability of each number of fields, and of digits in a field.
NUM_FIELDS: dict[Split, dict[int, float]] = {"train": {n: 1 / 6 for n in range(1, 7)}, "held_out": {4: 1.0}}
NUM_DIGITS: dict[Split, dict[int, float]] = {
    "train": {1: 0.2, 2: 0.2, 3: 0.3, 4: 0.3},
    "held_out": {3: 0.5, 4: 0.5},
}
MAX_MARKS = 4  # of a kind; an excerpt has a slot of them, so at most 3 of one kind and one of another


class DocumentsRecords:
    """Random access to the records of a documents source, for Grain and evaluation. Stateless and picklable.

    Besides `id` and `messages`, a record has `page`, what is drawn; `task`, that of the last question; and its `answer`
    with the `text` and, for points, the `box` of the mark (left, top, right, bottom, in hundredths of the page).
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
        page = _excerpt(rng, split) if task == "excerpt" else _page(rng, split)
        image, boxes = draw_page(rng, page, wear=self.source.wear)
        turns = _questions(page, boxes[0])
        turns = [turns[i] for i in rng.permutation(len(turns))]
        if task not in ("all", "excerpt"):
            turns = [next(turn for turn in turns if turn[0] == task)]
        messages: list[dict[str, Any]] = []
        for _, prompt, answer in turns:
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": answer["text"]})
        messages[0]["content"] = [{"type": "image", "image": image}, {"type": "text", "text": messages[0]["content"]}]
        kind, _, answer = turns[-1]
        return {
            "id": f"documents/{task}/{split}/{index}",
            "messages": messages,
            "task": kind,
            "answer": answer,
            "page": page,
        }


def _page(rng: np.random.Generator, split: Split) -> Page:
    counts = [1, *rng.integers(1, MAX_MARKS + 1, size=len(SHAPES) - 1).tolist()]
    return _filled(rng, split, _draw(rng, NUM_FIELDS[split]), counts, mark_slots=4, rows=8, columns=2)


def _excerpt(rng: np.random.Generator, split: Split) -> Page:
    counts = [1, int(rng.integers(1, MAX_MARKS))]
    return _filled(rng, split, int(rng.integers(1, 3)), counts, mark_slots=1, rows=4, columns=1)


def _filled(
    rng: np.random.Generator,
    split: Split,
    num_fields: int,
    counts: list[int],
    *,
    mark_slots: int,
    rows: int,
    columns: int,
) -> Page:
    """A page with everything in random slots. Its marks are listed by kind, in the numbers of `counts`."""
    slots = rng.permutation(rows * columns).tolist()
    by_class = load_scans().by_class[split]
    fields = []
    for label in rng.permutation(LABELS)[:num_fields].tolist():
        digits = rng.integers(10, size=_draw(rng, NUM_DIGITS[split])).tolist()
        scans = tuple(by_class[digit][rng.integers(len(by_class[digit]))] for digit in digits)
        fields.append(Field(label, scans, slots.pop()))
    marked = [slots.pop() for _ in range(mark_slots)]
    cells = [(slot % columns * CELLS + place, slot // columns) for slot in marked for place in range(CELLS)]
    cells = [cells[i] for i in rng.permutation(len(cells))]
    shapes = rng.permutation(SHAPES)[: len(counts)].repeat(counts).tolist()
    marks = tuple(Mark(shape, cell) for shape, cell in zip(shapes, cells, strict=False))
    return Page(tuple(fields), marks, tuple(slots), rows, columns)


def _draw(rng: np.random.Generator, distribution: dict[int, float]) -> int:
    return int(rng.choice(list(distribution), p=list(distribution.values())))


def _questions(page: Page, box: Box) -> list[tuple[str, str, dict[str, Any]]]:
    """Task, prompt and answer of each question about a page. `box` is that of the first mark, the only of its kind."""
    labels = load_scans().labels
    reads = [
        ("read", f"What is the {field.label}?", {"text": "".join(str(labels[scan]) for scan in field.scan_ids)})
        for field in page.fields
    ]
    shapes = [mark.shape for mark in page.marks]
    single = shapes[0]
    counts = [
        ("count", f"How many {PLURALS[shape]}?", {"text": str(shapes.count(shape))})
        for shape in SHAPES
        if shape in shapes[1:]
    ]
    left, top, right, bottom = hundredths = [100 * x / side for x, side in zip(box, page.size * 2, strict=True)]
    point = {"text": f"({int((left + right) / 2)}, {int((top + bottom) / 2)})", "box": hundredths}
    return [*reads, *counts, ("point", f"Point at the {single}.", point)]
