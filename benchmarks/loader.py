"""Images that the loader makes per core-second, against an older version of itself, and how long training waits for it.

    python benchmarks/loader.py [--before COMMIT] [--repeats 3]

Checks out the older version into a temporary worktree (needs Git), and runs both in turns, each in its own process:

    demo    the mixture of configs/digits/pretrain.py, float32
    jpegs   photographs of 0.2 to 3 megapixels, generated and saved as JPEG, in views of 728 and crops of 504 pixels,
            bfloat16, as the 10B recipe has them

A figure is the median of the repeats. The first batch of both versions must be equal to the last bit. Then it trains
the demo for some steps, and reports the step and the share of it in which the devices had nothing to do but wait for
data.
Writes results/loader.json.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parents[1]
BEFORE = "aac3db6"  # made an array of every view, and copied it three times on the way to a batch
BATCHES = {"demo": 30, "jpegs": 10}  # a turn; the examples in open rows come and go
PHOTOGRAPHS = 24
STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="the version to compare to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps to train; 0 for none")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return serve(*arguments.side)
    import machine

    with tempfile.TemporaryDirectory() as temporary:
        make_photographs(Path(temporary) / "jpegs")
        older = Path(temporary) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(older), arguments.before], check=True)
        try:
            figures = {kind: compare(kind, older, temporary, arguments.repeats) for kind in BATCHES}
        finally:
            subprocess.run([*git, "remove", "--force", str(older)], check=True)
        if arguments.steps:
            figures["training"] = train(Path(temporary), arguments.steps)
            print(f"training: {figures['training']}")
    command = "python benchmarks/loader.py"
    print(f"written to {machine.write('loader', {'command': command, 'before': arguments.before, **figures})}")


def compare(kind: str, older: Path, temporary: str, repeats: int) -> dict[str, Any]:
    sides = {name: Side(root, kind, temporary) for name, root in (("before", older), ("now", ROOT))}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            turns[name].append(side.turn())
    for side in sides.values():
        side.end()
    assert len({turn["digest"] for turns in turns.values() for turn in turns}) == 1, "the batches differ"
    rates = {
        name: statistics.median(turn["images"] / turn["core_seconds"] for turn in made) for name, made in turns.items()
    }
    milliseconds = {
        name: statistics.median(1000 * turn["core_seconds"] / turn["batches"] for turn in made)
        for name, made in turns.items()
    }
    ratio = rates["now"] / rates["before"]
    print(f"{kind}: {rates['before']:.1f} -> {rates['now']:.1f} images per core-second, {ratio:.2f} x", flush=True)
    return {"images_per_core_second": rates, "core_milliseconds_per_batch": milliseconds, "ratio": ratio}


class Side:
    """A version in a process of its own, which measures when told to."""

    def __init__(self, root: Path, kind: str, temporary: str):
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, __file__, "--side", kind, temporary]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )

    def turn(self) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(kind: str, temporary: str) -> None:
    """In the side's process: a line of figures for every line of input."""
    loader = make_loader(kind, Path(temporary))
    for _ in sys.stdin:
        batches: Iterator[Any] = iter(loader)
        first = next(batches)
        digest = hashlib.sha256(b"".join(array.tobytes() for _, array in sorted(first.arrays.items()))).hexdigest()
        next(batches)  # from here on every batch is taken as soon as it is made
        before = time.process_time()
        images = sum(int(batch.used[1]) for batch in itertools.islice(batches, BATCHES[kind]))
        seconds = time.process_time() - before
        batches.close()  # type: ignore[attr-defined]
        figures = {"images": images, "batches": BATCHES[kind], "core_seconds": seconds, "digest": digest}
        print(json.dumps(figures), flush=True)


def make_loader(kind: str, temporary: Path) -> Any:
    from stepjax.config import BatchConfig, DataConfig, ImageConfig, JsonlSource, TokenizerConfig
    from stepjax.config_file import load_recipe
    from stepjax.data.loader import Loader
    from stepjax.processing.processor import Processor

    if kind == "demo":
        config = load_recipe(ROOT / "configs/digits/pretrain.py")
        processor = Processor.from_config(config.images, config.tokenizer)
        return Loader(config.data, config.batch, config.images, processor, seed=0)
    images = ImageConfig()
    processor = Processor.from_config(images, TokenizerConfig(path="demo"))
    source = JsonlSource(name="photographs", weight=1.0, path=str(temporary / "jpegs" / "records.jsonl"))
    batch = BatchConfig(rows=2, tokens=4096, global_views=6, crops=28)
    return Loader(DataConfig(sources=(source,)), batch, images, processor, seed=0, pixel_dtype="bfloat16")


def make_photographs(folder: Path) -> None:
    """Smooth shapes with the grain of a sensor, in sizes and shapes as they are found on the web."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    records = []
    for index in range(PHOTOGRAPHS):
        rng = np.random.default_rng(index)
        pixels, aspect = np.exp(rng.uniform(np.log(2e5), np.log(3e6))), np.exp(rng.uniform(np.log(0.6), np.log(1.8)))
        size = int((pixels * aspect) ** 0.5), int((pixels / aspect) ** 0.5)
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
        picture += rng.normal(0, 6, (size[1], size[0], 1))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg", quality=88)
        text = f"<image>A picture of {size[0]} x {size[1]} pixels, and what one could say about it."
        messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": text[7:]}]
        records.append(json.dumps({"messages": messages, "images": [f"{index}.jpg"]}))
    (folder / "records.jsonl").write_text("\n".join(records))


def train(out: Path, steps: int) -> dict[str, float]:
    """Medians over the intervals of the log, without the first."""
    sys.path.insert(0, str(ROOT))
    from stepjax.config import Phase
    from stepjax.config_file import load_recipe
    from stepjax.training.loop import pretrain

    config = load_recipe(ROOT / "configs/digits/pretrain.py")
    phases = (Phase(tokens=float(steps * config.tokens_per_step), start=3e-3, end=3e-3),)
    schedule = dataclasses.replace(config.schedule, phases=phases, warmup_tokens=config.tokens_per_step)
    pretrain(dataclasses.replace(config, schedule=schedule, out=str(out / "run")))
    lines = (out / "run" / config.name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "speed/step_seconds" in row][1:]
    return {name: statistics.median(row[f"speed/{name}"] for row in rows) for name in ("step_seconds", "data_wait")}


if __name__ == "__main__":
    main()
