"""Questions about worn pages, composed on the fly. Works offline.

| task  | prompt              | answer   |
|-------|---------------------|----------|
| read  | What is the sum?    | 407      |
| count | How many crosses?   | 3        |
| point | Point at the cross. | (62, 30) |

The task "all" asks every question about a page in random order, as turns of one conversation. So a training step
computes the features of a page once and learns from ten answers. An "excerpt" is the same on a piece of a page of
128 x 128 pixels, with one or two fields and two kinds of marks: a fifth of the work, and easier to learn to read from.

A page has up to six fields, each a printed label and handwritten digits, four kinds of marks, and printed text to
ignore (`data.documents_render`). One kind of mark is there once: the one to point at. A point is a place in hundredths
of the page's width and height, 0..99 from the top left corner; it is right inside the mark's box.

The task "all" asks every question about a page in random order, as turns of one conversation. So a training step
computes the features of a page once and learns from ten answers.

Small pages have less of everything, at the same scale. One of 64 pixels a side has a single field with a single digit,
one of 32 is just a digit. They are cheap, and most of them is the answer: a model that sees whole pages only is slow to
find that the answer is in the image at all.

The splits share no scans. Held-out pages are full: fields have as many digits as there is room for, and the rest is
printed text. Training pages may be emptier.

Record i of a source depends only on (seed, source, i): any process can make any record, in any order.
"""

import hashlib
import operator
from typing import Any, NamedTuple

import numpy as np

from stepjax.config import DocumentsSource, Split
from stepjax.data.digits_render import Box, load_scans
from stepjax.data.documents_render import CELL, SHAPES, Cell, Field, Mark, Page, draw_page

NUM_RECORDS = 10_000_000  # per source; more than a run reads

LABELS = ("sum", "tax", "fee", "day", "age", "lot")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


class Size(NamedTuple):
    """What a page of a size has; the numbers of fields are fewest and most."""

    slot: int  # cells in a row for a field, or for as many marks
    train_fields: tuple[int, int]
    held_out_fields: tuple[int, int]
    mark_slots: int
    kinds: int  # of marks
    most: int  # marks of a kind


SIZES = {
    32: Size(1, (1, 1), (1, 1), 0, 0, 0),
    64: Size(2, (1, 1), (1, 1), 1, 2, 1),
    128: Size(4, (1, 2), (2, 2), 1, 2, 3),
    256: Size(4, (1, 6), (4, 4), 4, 4, 4),
}


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
        page = _page(rng, self.source.side, split)
        image, boxes = draw_page(rng, page, wear=self.source.wear)
        turns = _questions(page, boxes)
        turns = [turns[i] for i in rng.permutation(len(turns))]
        if task != "all":
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


def _page(rng: np.random.Generator, side: int, split: Split) -> Page:
    """A random page. Its first mark is the only one of its kind."""
    size, cells, is_train = SIZES[side], side // CELL, split == "train"
    slots = [(column, row) for row in range(cells) for column in range(0, cells, size.slot)]
    slots = [slots[i] for i in rng.permutation(len(slots))]
    by_class = load_scans().by_class[split]
    fewest, most = size.train_fields if is_train else size.held_out_fields
    fields = []
    for label in rng.permutation(LABELS)[: rng.integers(fewest, most + 1)].tolist():
        longest = max(size.slot - 1, 1)
        digits = rng.integers(10, size=rng.integers(1, longest + 1) if is_train else longest).tolist()
        scans = tuple(by_class[digit][rng.integers(len(by_class[digit]))] for digit in digits)
        slot = slots.pop()
        fields.append(Field(label, scans, slot) if size.slot > 1 else Field("digit", scans, (-1, 0)))  # no label seen
    marked = _cells([slots.pop() for _ in range(size.mark_slots)], size.slot)
    counts = [1, *rng.integers(1, size.most + 1, size=size.kinds - 1).tolist()] if size.kinds else []
    shapes = rng.permutation(SHAPES)[: size.kinds].repeat(counts).tolist()
    marks = tuple(Mark(shape, marked[i]) for shape, i in zip(shapes, rng.permutation(len(marked)), strict=False))
    texts = slots[: rng.integers(len(slots) + 1)] if is_train else slots
    return Page(tuple(fields), marks, tuple(_cells(texts, size.slot)), side)


def _cells(slots: list[Cell], width: int) -> list[Cell]:
    return [(column + place, row) for column, row in slots for place in range(width)]


def _questions(page: Page, boxes: list[Box]) -> list[tuple[str, str, dict[str, Any]]]:
    """Task, prompt and answer of each question about a page. `boxes` are those of its marks."""
    labels = load_scans().labels
    reads = [
        ("read", f"What is the {field.label}?", {"text": "".join(str(labels[scan]) for scan in field.scan_ids)})
        for field in page.fields
    ]
    if not page.marks:
        return reads
    shapes = [mark.shape for mark in page.marks]
    single = shapes[0]
    counts = [
        ("count", f"How many {PLURALS[shape]}?", {"text": str(shapes.count(shape))})
        for shape in SHAPES
        if shape in shapes[1:]
    ]
    left, top, right, bottom = hundredths = [100 * x / page.side for x in boxes[0]]
    point = {"text": f"({int((left + right) / 2)}, {int((top + bottom) / 2)})", "box": hundredths}
    return [*reads, *counts, ("point", f"Point at the {single}.", point)]
