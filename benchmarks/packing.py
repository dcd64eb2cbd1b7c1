"""How full packed rows are: tokens, global-view slots and crop slots, and the compute spent on them.

    python benchmarks/packing.py

Vision slots are static: an empty slot is encoded like a full one, and the encoder is most of a step of the 10B model.
So the row's budgets must suit the mixture, and the packer must fill all three at once, which is easier with more
examples per row. The benchmark packs synthetic records of the recipe's kinds and weights (sizes only, no longer than
4,096 tokens; we assume the distributions below) into rows of 4,096 to 16,384 tokens, with the mixture's average number
of slots and with a tenth less. For several numbers of open rows it prints the share of each kind of slot in use and the
share of the step's FLOPs that is not wasted.

Legend: T tokens, G global views, N crops, HWC pixels.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # works without installing stepjax

from benchmarks import machine
from stepjax.config import ImageConfig, ModelConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import PackingStream, RowBudget
from stepjax.models.flops import training_flops
from stepjax.processing.images import plan_views
from stepjax.processing.tokens import Example

REAL = ImageConfig()
# The packer copies pixels, but its decisions do not depend on their number.
SMALL = ImageConfig(global_size=16, crop_size=8, patch_size=1)
CONTEXT = 4096  # tokens of the longest record
CROPS = 20  # of the largest one
Size = tuple[int, int, int]  # tokens, global views, crops


class Records:
    """An endless mixture of records with sizes but no content."""

    def __init__(self, seed: int):
        self._seed = seed

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self._seed, index))
        tokens, views, crops = self.size(rng)
        example = Example(
            name=f"record {index}",
            tokens=np.zeros(tokens, np.int32),
            loss_weights=np.zeros(tokens, np.float32),
            feature_index=np.full(tokens, -1, np.int32),
            global_views=np.zeros((views, SMALL.global_size, SMALL.global_size, 3), np.float32),
            crops=np.zeros((crops, SMALL.crop_size, SMALL.crop_size, 3), np.float32),
        )
        return Sample(example, domain=0)

    @staticmethod
    def size(rng: np.random.Generator) -> Size:
        """Draws a record's size: one of the recipe's five kinds, by the recipe's weights."""
        kind = rng.choice(["text", "interleaved", "pairs", "ocr", "grounding"], p=[0.3, 0.2, 0.2, 0.15, 0.15])
        while True:
            if kind == "text":  # documents, cut at the length of a row
                size = min(int(rng.lognormal(6.5, 0.9)) + 16, CONTEXT), 0, 0
            elif kind == "interleaved":  # web pages with one to four pictures
                size = _with_images(rng, int(rng.integers(1, 5)), rng.lognormal(5.8, 0.5), (500, 1400), (0.6, 1.8))
            elif kind == "pairs":  # a picture and its caption
                size = _with_images(rng, 1, rng.lognormal(4.0, 0.6), (400, 1600), (0.6, 1.8))
            elif kind == "ocr":  # a scanned page and its text
                size = _with_images(rng, 1, rng.lognormal(6.3, 0.5), (1000, 1800), (0.65, 0.8))
            else:  # a photograph, objects and their boxes
                size = _with_images(rng, 1, rng.lognormal(4.8, 0.5), (600, 1300), (0.7, 1.5))
            if size[0] <= CONTEXT and size[2] <= CROPS:
                return size


def _with_images(
    rng: np.random.Generator, count: int, text: float, longest: tuple[int, int], aspect: tuple[float, float]
) -> Size:
    tokens, crops = int(text) + 8, 0
    for _ in range(count):
        side, ratio = rng.integers(*longest), np.exp(rng.uniform(*np.log(aspect)))
        width, height = (side, side / ratio) if ratio > 1 else (side * ratio, side)
        plan = plan_views(int(width), int(height), REAL)
        tokens, crops = tokens + plan.num_tokens(REAL), crops + plan.num_crops
    return tokens, int(count), crops


def flops(tokens: float, views: float, crops: float) -> float:
    """FLOPs of training on them, without the decoder's attention, which depends on how tokens are divided."""
    return training_flops(
        ModelConfig(),
        tokens=tokens,
        attention_pairs=0,
        global_views=views,
        crops=crops,
        global_grid=REAL.global_grid,
        crop_grid=REAL.crop_grid,
    )


def fill(budget: tuple[int, int, int], open_rows: int, rows: int, seed: int) -> dict[str, Any]:
    """Shares of slots in use over `rows` rows, after as many to fill the open ones."""
    row = RowBudget(*budget, SMALL)
    records: Any = Records(seed)
    stream = PackingStream(records, row, stream=0, num_streams=1, open_rows=open_rows)
    used = np.array([next(stream).used[:3] for _ in range(rows + open_rows)])[open_rows:]
    shares = used.sum(axis=0) / (rows * np.array(budget))
    return {
        "budget": budget,
        "open_rows": open_rows,
        "tokens": shares[0],
        "global_views": shares[1],
        "crops": shares[2],
        "flops": flops(*used.sum(axis=0)) / flops(*(rows * np.array(budget))),
        "vision_flops": flops(0, *used.sum(axis=0)[1:]) / flops(0, *(rows * np.array(budget[1:]))),
    }


def demand(records: int, seed: int) -> np.ndarray:
    """The mixture's global views and crops per token."""
    sizes = np.array([Records.size(np.random.default_rng((seed, index))) for index in range(records)])
    return sizes.sum(axis=0)[1:] / sizes[:, 0].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description="How full packed rows are.")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens packed per setting (default a million)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    views, crops = demand(4000, arguments.seed)
    print(f"the mixture has {views * CONTEXT:.2f} global views and {crops * CONTEXT:.2f} crops in {CONTEXT:,} tokens\n")
    budgets = []
    for tokens in (CONTEXT, 2 * CONTEXT, 4 * CONTEXT):
        for share in (1.0, 0.9):
            budget = (tokens, max(4, round(share * views * tokens)), max(CROPS, round(share * crops * tokens)))
            budgets += [budget] if budget not in budgets else []
    print(
        f"{'row':>7}{'views':>6}{'crops':>6}{'open':>6}{'tokens':>9}{'views':>9}{'crops':>9}{'vision FLOPs':>14}"
        f"{'all FLOPs':>11}"
    )
    figures = []
    for budget in budgets:
        for open_rows in (4, 8, 16):
            result = fill(budget, open_rows, arguments.tokens // budget[0], arguments.seed)
            figures.append(result)
            print(
                f"{budget[0]:>7}{budget[1]:>6}{budget[2]:>6}{open_rows:>6}{result['tokens']:>9.1%}{result['global_views']:>9.1%}"
                f"{result['crops']:>9.1%}{result['vision_flops']:>14.1%}{result['flops']:>11.1%}",
                flush=True,
            )
    path = machine.write("packing", {"views_a_token": views, "crops_a_token": crops, "settings": figures})
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
