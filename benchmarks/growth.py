"""How cost grows: the train step, the loader and the engine, each against what makes it larger.

    python benchmarks/growth.py [--only train loader engine]

Every curve is fitted in log-log over its larger half, where constant costs matter least. The script prints the order of
growth, and marks any above what the algorithm demands: 2 in tokens where every token attends to all before it, else 1.
Models are small and one runs on CPU, so the orders count, not the seconds.

    train    seconds of a step, and temporary memory of the compiled program: tokens a row (one example fills it),
             global views a row, decoder layers
    loader   images per second against worker processes; JSON Lines of 1,000 to 1,000,000 records: start, memory, time
             per batch
    engine   seconds of a decoding step against sequences and against the length of their prefix, seconds of a prefill
             against its length; host: a step of a model so small that all of its time is the engine's own

Writes results/growth.json, and docs/growth_{train,loader,engine}.png (needs the `plot` extra).
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import machine
import numpy as np

from stepjax.config import (
    BatchConfig,
    DataConfig,
    DecoderConfig,
    ImageConfig,
    JsonlSource,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    Phase,
    PretrainConfig,
    ScheduleConfig,
    VisionConfig,
)
from stepjax.config_file import load_recipe
from stepjax.data.loader import Loader
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack_batch
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.models.step_vl import abstract_model, init_model
from stepjax.processing.processor import Processor
from stepjax.processing.tokens import text_example
from stepjax.sharding import make_mesh
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.step import make_train_step, new_state

ROOT = Path(__file__).parents[1]
TOLERANCE = 0.2  # a fit over few points on a busy machine is no better
IMAGES = ImageConfig(global_size=112, crop_size=56, patch_size=14)
FLOAT32 = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none", loss_chunk=256)


@dataclasses.dataclass
class Curve:
    """`y` in `unit` against `x`."""

    subject: str
    title: str
    x_name: str
    unit: str
    x: list[float]
    y: list[float]
    limit: float = 1.0  # the order that the algorithm demands

    @property
    def order(self) -> float:
        half = max(2, (len(self.x) + 1) // 2)
        return float(np.polyfit(np.log(self.x[-half:]), np.log(np.maximum(self.y[-half:], 1e-12)), 1)[0])

    @property
    def exceeds(self) -> bool:
        return self.order > self.limit + TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"order": round(self.order, 2), "exceeds": self.exceeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = {"train": train_curves, "loader": loader_curves, "engine": engine_curves}
    parser.add_argument("--only", nargs="+", choices=list(subjects), default=list(subjects))
    arguments = parser.parse_args()
    path = machine.RESULTS / "growth.json"
    kept = json.loads(path.read_text())["curves"] if path.exists() else []
    curves = [curve for curve in kept if curve["subject"] not in arguments.only]
    for subject in arguments.only:
        made = subjects[subject]()
        draw(subject, made)
        for curve in made:
            mark = "   MORE THAN IT SHOULD BE" if curve.exceeds else ""
            print(f"{curve.title:52} order {curve.order:5.2f} of at most {curve.limit:g}{mark}", flush=True)
        curves += [curve.to_json() for curve in made]
    print(f"written to {machine.write('growth', {'command': 'python benchmarks/growth.py', 'curves': curves})}")


def median_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# Train step ----------------------------------------------------------------------------------------------------------


def recipe(tokens: int = 256, views: int = 1, layers: int = 2) -> PretrainConfig:
    vision = VisionConfig(
        width=64, num_layers=2, num_heads=2, mlp_dim=128, patch_size=14, position_grid=IMAGES.global_grid
    )
    decoder = DecoderConfig(
        vocab_size=512,
        width=64,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        mlp_dim=128,
        max_positions=tokens,
    )
    return PretrainConfig(
        name="growth",
        model=ModelConfig(vision=vision, decoder=decoder),
        images=IMAGES,
        data=DataConfig(sources=load_recipe(ROOT / "configs/digits/pretrain.py").data.sources[-1:]),
        batch=BatchConfig(rows=2, tokens=tokens, global_views=views, crops=0),
        schedule=ScheduleConfig(phases=(Phase(tokens=1e6, start=1e-3, end=1e-3),)),
        optimizer=OptimizerConfig(),
        numerics=FLOAT32,
    )


def step_cost(config: PretrainConfig) -> tuple[float, float]:
    """Seconds of a step, and MB of the compiled program's temporary memory."""
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_model(config.model, config.numerics))
    tokens = np.random.default_rng(0).integers(0, 512, config.batch.tokens)
    rows = [[Sample(text_example(tokens), 0)] for _ in range(config.batch.rows)]
    with jax.set_mesh(make_mesh(config.mesh)):
        batch = jax.device_put(pack_batch(rows, RowBudget.of(config.batch, config.images)))
        batch["loss_weights_BT"] = jax.numpy.ones_like(batch["loss_weights_BT"])
        state = new_state(init_model(config.model, config.numerics, seed=0), optimizer)
        step = jax.jit(make_train_step(config, optimizer, schedule), donate_argnums=0).lower(state, batch).compile()
        memory: Any = step.memory_analysis()

        def run() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

        run()
        seconds, megabytes = median_seconds(run), memory.temp_size_in_bytes / 1e6
        batch_of, layers = config.batch, config.model.decoder.num_layers
        shape = f"{batch_of.tokens} tokens, {batch_of.global_views} views, {layers} layers"
        print(f"{shape}: {seconds:.3f} s, {megabytes:.1f} MB", flush=True)
        return seconds, megabytes


def train_curves() -> list[Curve]:
    grid: dict[str, tuple[str, list[int], float]] = {
        "tokens": ("tokens a row", [256, 512, 1024, 2048], 2.0),
        "views": ("global views a row", [2, 4, 8, 16], 1.0),
        "layers": ("decoder layers", [2, 4, 8, 16], 1.0),
    }
    curves = []
    for name, (x_name, sizes, limit) in grid.items():
        seconds, memory = zip(*(step_cost(recipe(**{name: size})) for size in sizes), strict=True)
        x = [float(size) for size in sizes]
        curves.append(Curve("train", f"train step against {x_name}", x_name, "s", x, list(seconds), limit))
        curves.append(Curve("train", f"memory of a step against {x_name}", x_name, "MB", x, list(memory), limit))
    return curves


# Loader --------------------------------------------------------------------------------------------------------------


def batch_seconds(loader: Loader, count: int) -> float:
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = (time.perf_counter() - began) / count
    batches.close()
    return seconds


def loader_curves() -> list[Curve]:
    demo = load_recipe(ROOT / "configs/digits/pretrain.py")
    processor = Processor.from_config(demo.images, demo.tokenizer)
    workers, batch_times = [1, 2], []
    for count in workers:
        data = dataclasses.replace(demo.data, num_workers=count)
        batch_times.append(batch_seconds(Loader(data, demo.batch, demo.images, processor, seed=0), 30))

    counts, start, memory, batch = [1_000, 10_000, 100_000, 1_000_000], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = Path(folder) / f"{count}.jsonl"
            path.write_text("".join(f'{{"text": "record {i} says what {i} says"}}\n' for i in range(count)))
            data = DataConfig(sources=(JsonlSource(name="text", weight=1.0, path=str(path)),))
            make = functools.partial(
                Loader, data, BatchConfig(rows=8, tokens=256, global_views=0, crops=0), demo.images, processor, seed=0
            )
            start.append(median_seconds(make, 3))
            tracemalloc.start()
            loader = make()
            memory.append(tracemalloc.get_traced_memory()[0] / 1e6)
            tracemalloc.stop()
            batch.append(batch_seconds(loader, 20))
    x, records = [float(count) for count in counts], "records in a file"
    return [
        Curve("loader", "batch of the demo against workers", "worker processes", "s", [1.0, 2.0], batch_times),
        Curve("loader", "start of the loader against records", records, "s", x, start),
        Curve("loader", "memory of the loader against records", records, "MB", x, memory),
        Curve("loader", "batch against records", records, "s", x, batch, limit=0.0),
    ]


# Engine --------------------------------------------------------------------------------------------------------------


def text_engine(width: int, layers: int, sequences: int, context: int, batch: int) -> Engine:
    decoder = DecoderConfig(
        vocab_size=512,
        width=width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        mlp_dim=2 * width,
        max_positions=context,
    )
    vision = VisionConfig(
        width=16, num_layers=1, num_heads=2, mlp_dim=32, patch_size=14, position_grid=IMAGES.global_grid
    )
    model = init_model(ModelConfig(vision=vision, decoder=decoder), FLOAT32, seed=0).decoder
    config = EngineConfig(
        max_sequences=sequences, smallest_batch=batch, max_context=context, prefix_caching=False, prefill_tokens=context
    )
    return Engine(model, None, config)


def request_seconds(engine: Engine, length: int, count: int, steps: int = 16) -> tuple[float, float]:
    """Seconds until `count` prompts of `length` tokens are computed, and of a decoding step after that."""
    params = SamplingParams(temperature=0.0, max_tokens=steps + 8, ignore_eos=True)
    prompts = np.random.default_rng(length).integers(0, 512, (count, length)).tolist()
    prefill, decode = [], []
    for repeat in range(3):  # the first compiles
        requests = [engine.submit(prompt, params) for prompt in prompts]
        began, waiting = time.perf_counter(), set(requests)
        while waiting:
            waiting -= {delta.request_id for delta in engine.step() if delta.tokens}
        if repeat:
            prefill.append(time.perf_counter() - began)
            decode += [median_seconds(engine.step, 1) for _ in range(steps // 2)]
        for request in requests:
            engine.cancel(request)
    seconds = statistics.median(prefill), statistics.median(decode)
    print(f"{count} x {length} tokens: prefill {seconds[0]:.4f} s, decoding step {seconds[1]:.4f} s", flush=True)
    return seconds


def engine_curves() -> list[Curve]:
    sequences, lengths = [1, 4, 16, 32], [256, 512, 1024, 2048]
    wide = functools.partial(text_engine, 128, 2)
    by_count = [request_seconds(wide(count, 128, count), 64, count)[1] for count in sequences]
    by_length = [request_seconds(wide(1, length + 64, 1), length, 1) for length in lengths]
    host = [request_seconds(text_engine(32, 1, count, 128, count), 64, count)[1] for count in sequences]
    x, tokens = [float(count) for count in sequences], [float(length) for length in lengths]
    return [
        Curve("engine", "decoding step against sequences", "sequences", "s", x, by_count),
        Curve("engine", "host's part of a step against sequences", "sequences", "s", x, host),
        Curve("engine", "decoding step against prefix", "prefix tokens", "s", tokens, [d for _, d in by_length]),
        Curve("engine", "prefill against prompt", "prompt tokens", "s", tokens, [p for p, _ in by_length], limit=2.0),
    ]


# Plots ---------------------------------------------------------------------------------------------------------------


def draw(subject: str, curves: Sequence[Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = (len(curves) + 1) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(3.4 * columns, 5.6), squeeze=False, layout="constrained")
    # Time above memory, where a subject has both in turn.
    order = [*curves[0::2], *curves[1::2]] if subject == "train" else list(curves)
    for axis, curve in zip(axes.flat, order, strict=False):
        axis.loglog(curve.x, curve.y, "o-", color="tab:red" if curve.exceeds else "tab:blue")
        bound = [curve.y[-1] * (x / curve.x[-1]) ** curve.limit for x in curve.x]
        axis.loglog(curve.x, bound, ":", color="gray")
        axis.set_title(f"{curve.title}\norder {curve.order:.2f}; dotted: {curve.limit:g}", fontsize=9)
        axis.set_xlabel(curve.x_name)
        axis.set_ylabel("seconds" if curve.unit == "s" else curve.unit)
        axis.set_xticks(curve.x, [f"{x:,.0f}" for x in curve.x], fontsize=8)
        axis.set_xticks([], minor=True)
        if max(curve.y) < 10 * min(curve.y):  # no power of ten may lie between them
            axis.set_ylim(min(*curve.y, *bound) / 2, max(*curve.y, *bound) * 2)
            axis.set_yticks([min(curve.y), max(curve.y)], [f"{y:.2g}" for y in (min(curve.y), max(curve.y))])
            axis.set_yticks([], minor=True)
        axis.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / f"growth_{subject}.png", dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
