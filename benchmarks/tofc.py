"""Coded visual features against image files: bytes, answers and time, on worn pages of 320 x 320 pixels.

    python benchmarks/tofc.py [--digits RUN] [--out OUT] [--parts train curves streams speed] [--examples 120]

It starts from the digits demo (`make pretrain`). Each part replaces its own figures in results/tofc.json. Needs
pillow-jxl-plugin and matplotlib. `benchmarks/tofc_network.py` measures latency.

    train      the model that reads pages (half an hour on two cores), and from it, four to ten minutes more each: a
               codec at every rate, one for each ablation, and the model without a codec. What is there is resumed or
               kept.
    curves     held-out questions, --examples of each task: read a number, count marks, point at a mark. Their pages are
               sent in every way: as files of JPEG, WebP, AVIF and JPEG XL at several qualities and sizes; as the
               features that are farthest from their mean, in int8 ("pruned"); and coded. The model without a codec
               answers from files and pruned features, each codec's own model from frames. Draws docs/tofc.png.
    streams    100,000 mutated frames, each decoded in a process with bounded memory: the features that were sent, or a
               typed error. If checksums are mended, other features may come out.
    speed      the codec alone, on one core: a tile of 32 features with 1,152 channels, and a page. And what a device
               spends on a page in all.

Bytes are those of the file or the frame. "At the same accuracy" is read off the upper envelope of each kind of file,
between whose points bytes grow geometrically with accuracy.
"""

import argparse
import collections
import dataclasses
import functools
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import machine
import numpy as np
from flax import nnx
from PIL import Image

from stepjax.config import DocumentsSource, TofcConfig
from stepjax.data.documents_render import SIDE
from stepjax.data.records import open_source
from stepjax.errors import BitstreamError
from stepjax.evaluation.coded import evaluate_coded
from stepjax.evaluation.evaluate import Report, evaluate, evaluation_engine
from stepjax.interop.load import load_run
from stepjax.models.step_vl import StepVL
from stepjax.processing.image_files import open_image
from stepjax.processing.images import CodedImage, make_views
from stepjax.processing.processor import Processor
from stepjax.tofc import codec
from stepjax.tofc.device import Device
from stepjax.tofc.hyperprior import Hyperprior, freeze
from stepjax.tofc.range_coder import varint
from stepjax.tofc.tables import Tables

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "tofc.png"
TEXT, PAGES, PLAIN = "documents_sft_text", "documents_sft", "documents_sft_control"
RATES = (0.2, 0.01, 0.05, 0.6)  # lambda; the first one is trained longest, and the others go on from it
MIDDLE = {"rate-weight": str(RATES[0])}
FIRST = f"lambda {RATES[0]}"
VARIANTS: dict[str, dict[str, str]] = {
    **{f"lambda {rate}": {"rate-weight": str(rate)} for rate in RATES},
    "one expert": {**MIDDLE, "experts": "1"},
    "no hyperprior": {**MIDDLE, "latents": "0"},
    "32 clusters": {**MIDDLE, "crop-clusters": "32"},
    "32 rectangles": {**MIDDLE, "crop-clusters": "32", "merging": "uniform"},
}
FRESH = (FIRST, "one expert", "no hyperprior")  # those whose parameters have other shapes; the rest goes on from FIRST
SHORT = ["--schedule.phases.0.tokens", "6e5", "--schedule.phases.0.start", "8e-4"]
FILES: dict[str, dict[float, tuple[int, ...]]] = {  # qualities by size, as a share of the page's side
    "jpeg": {1.0: (10, 30), 0.5: (10, 25, 50), 0.35: (15, 40, 70)},
    "webp": {1.0: (5, 30), 0.5: (5, 25, 50), 0.35: (15, 40, 70)},
    "avif": {1.0: (15, 30), 0.5: (15, 30, 45), 0.35: (20, 40, 60)},
    "jxl": {1.0: (10, 30), 0.5: (10, 30, 55), 0.35: (15, 40, 65)},
}
PRUNED = (8, 16, 32)  # features left
TASKS = {"read": "a number read", "count": "marks counted", "point": "pointed at a mark"}
MEMORY = 1 << 30  # of the process that decodes mutated frames, beside what it has when it starts
STREAMS = 100_000


def run_of(out: Path, variant: str) -> Path:
    return out / f"documents_tofc_{variant.replace(' ', '_').replace(',', '')}"


# Training -------------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of each run that was not there."""
    out, seconds = options.out, {}
    commands = {
        TEXT: ["sft", "configs/documents/sft_text.py", "--init-from.path", str(options.digits)],
        PAGES: ["sft", "configs/documents/sft.py", "--init-from.path", str(out / TEXT)],
        PLAIN: ["sft", "configs/documents/sft_control.py", "--init-from.path", str(out / PAGES)],
    }
    fresh = ["--init-from.path", str(out / PAGES)]
    for variant, changes in VARIANTS.items():
        fields = itertools.chain.from_iterable((f"--model.tofc.{name}", value) for name, value in changes.items())
        name = ["--name", run_of(out, variant).name]
        start = fresh if variant in FRESH else ["--init-from.path", str(run_of(out, FIRST)), *SHORT]
        commands[variant] = ["tofc", "train", "configs/documents/tofc.py", *start, *name, *fields]
    for name, command in commands.items():
        began = time.perf_counter()
        full = [sys.executable, "-m", "stepjax.cli", *command, "--out", str(out), "--evaluation.examples", "10"]
        print(f"$ stepjax {' '.join(full[3:])}", flush=True)
        subprocess.run(full, check=True, cwd=ROOT)
        seconds[name] = round(time.perf_counter() - began)
    return {"seconds": seconds}


# Bytes and answers ----------------------------------------------------------------------------------------------------


class Files:
    """Opens an image as its receiver would, and counts bytes."""

    def __init__(self, kind: str, quality: int, size: float):
        self.kind, self.quality, self.size, self.bytes = kind, quality, size, []

    def __call__(self, image: Any, *, name: str, frame: int | None = None) -> Image.Image:
        pixels: Image.Image = open_image(image, name=name, frame=frame)
        made = encoded(pixels, self.kind, self.quality, self.size)
        self.bytes.append(len(made))
        received = Image.open(io.BytesIO(made)).convert("RGB")
        return received.resize(pixels.size, Image.Resampling.BICUBIC) if received.size != pixels.size else received


def encoded(image: Image.Image, kind: str, quality: int, size: float) -> bytes:
    """The file, with the settings that make it smallest at this quality."""
    if kind == "jxl":
        import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]
    if size != 1:
        image = image.resize((round(image.width * size), round(image.height * size)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    settings: dict[str, Any] = {
        "jpeg": {"optimize": True, "progressive": True},
        "webp": {"method": 6},
        "avif": {"speed": 4},
        "jxl": {"effort": 7},
    }[kind]
    image.save(file, {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF", "jxl": "JXL"}[kind], quality=quality, **settings)
    return file.getvalue()


class Pruned:
    """Opens an image as the `count` of its crop's features that are farthest from their mean, in int8 with a scale."""

    def __init__(self, model: StepVL, processor: Processor, count: int):
        self.count, self.bytes = count, []
        vision, projector = model.vision, model.projector
        self.encode = jax.jit(lambda pixels_MSSC: projector.downsampled(vision(pixels_MSSC)))
        images = processor.image_config
        tofc = TofcConfig(width=4 * model.config.vision.width, global_clusters=1, crop_clusters=count, experts=1)
        self.model = StepVL(
            dataclasses.replace(model.config, tofc=tofc), model.decoder.numerics, rngs=nnx.Rngs(0)
        )  # its codec is not used
        nnx.update(self.model, nnx.state(model))
        self.processor = Processor(
            processor.tokenizer, images.merged_for(self.model.config), processor.tokenizer_config
        )

    def __call__(self, image: Any, *, name: str, frame: int | None = None) -> CodedImage:
        views = make_views(open_image(image, name=name, frame=frame), self.processor.image_config)
        tiles = [self.few(x_QF, self.count) for x_QF in np.asarray(self.encode(views.crops_NHWC))]
        tiles.append(self.few(np.asarray(self.encode(views.global_view_HWC[None]))[0], 1))
        self.bytes.append(sum(tile.size + 4 * len(tile) for tile in tiles))
        return CodedImage.of(tiles, views.plan.columns, self.processor.image_config)

    def few(self, x_QF: np.ndarray, count: int) -> np.ndarray:
        distance_Q = np.square(x_QF - x_QF.mean(axis=0)).sum(axis=1)
        x_QF = x_QF[np.sort(np.argsort(-distance_Q)[:count])]
        scale_Q1 = np.abs(x_QF).max(axis=1, keepdims=True) / 127
        return (np.rint(x_QF / scale_Q1) * scale_Q1).astype(np.float32)


def curves(options: argparse.Namespace) -> dict[str, Any]:
    out: Path = options.out
    points: list[dict[str, Any]] = []

    def add(way: str, report: Report, num_bytes: float, **more: Any) -> None:
        answers = scores(report)
        points.append({"way": way, **more, "bytes": round(num_bytes, 1), **answers})
        shares = ", ".join(f"{task} {100 * each['accuracy']:.1f} %" for task, each in answers.items())
        print(f"{way} {' '.join(map(str, more.values()))}: {num_bytes:,.0f} bytes, {shares}", flush=True)

    model, processor, config = load_run(out / PLAIN)
    evaluation = dataclasses.replace(config.evaluation, examples=options.examples)
    engine = evaluation_engine(model, processor, evaluation)
    score = functools.partial(evaluate, model, processor, evaluation, seed=config.seed, engine=engine)
    add("uncompressed", score(), 3 * SIDE**2)
    for kind, qualities in FILES.items():
        for size, quality in ((share, each) for share in qualities for each in qualities[share]):
            files = Files(kind, quality, size)
            report = score(open_image=files)
            add(kind, report, statistics.fmean(files.bytes), quality=quality, size=size)
    for count in PRUNED:
        pruned = Pruned(model, processor, count)
        report = evaluate(pruned.model, pruned.processor, evaluation, seed=config.seed, open_image=pruned)
        add("pruned", report, statistics.fmean(pruned.bytes), features=count)
    for variant in VARIANTS:
        run = run_of(out, variant)
        model, processor, _ = load_run(run)
        report, sizes = evaluate_coded(model, processor, Device(run), evaluation, seed=config.seed)
        more = {name: round(sizes[name], 1) for name in ("bytes_95", "payload", "estimate")}
        add("tofc", report, sizes["bytes"], variant=variant, **more)
    found = {"examples": options.examples, "points": points, "saved": savings(points)}
    for each in found["saved"]:
        print(
            f"{each['variant']}: {each['task']} {100 * each['accuracy']:.1f} % from {each['bytes']:.0f} bytes; "
            + (
                f"the best file needs {each['file_bytes']:.0f} ({each['file']})"
                if each["file"]
                else "no file is so good"
            )
        )
    return found


def scores(report: Report) -> dict[str, dict[str, Any]]:
    """Of every task the share of right answers and its 95 % interval."""
    found = {}
    for result in report.results:
        low, high = result.interval
        found[result.name] = {"accuracy": round(result.accuracy, 4), "interval": [round(low, 4), round(high, 4)]}
    return found


def accuracy(point: dict[str, Any], task: str) -> float:
    return point[task]["accuracy"]


def savings(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every rate and task, the bytes of a frame and of the best file that is as accurate."""
    found = []
    for point in points:
        if not point.get("variant", "").startswith("lambda"):
            continue
        for task in TASKS:
            wanted = accuracy(point, task)
            sizes = {
                kind: at_accuracy([each for each in points if each["way"] == kind], task, wanted) for kind in FILES
            }
            size, name = min(((each, kind) for kind, each in sizes.items() if each is not None), default=(None, None))
            saved = None if size is None else round(1 - point["bytes"] / size, 3)
            found.append(
                {
                    "variant": point["variant"],
                    "task": task,
                    "accuracy": wanted,
                    "bytes": point["bytes"],
                    "file": name,
                    "file_bytes": size and round(size),
                    "saved": saved,
                }
            )
    return found


def at_accuracy(files: list[dict[str, Any]], task: str, wanted: float) -> float | None:
    """The fewest bytes with which one kind of file reaches an accuracy; None if it does not."""
    envelope: list[dict[str, Any]] = []
    for each in sorted(files, key=lambda each: each["bytes"]):
        if not envelope or accuracy(each, task) > accuracy(envelope[-1], task):
            envelope.append(each)
    for index, above in enumerate(envelope):
        if accuracy(above, task) >= wanted:
            if not index:
                return above["bytes"]
            below = envelope[index - 1]
            share = (wanted - accuracy(below, task)) / (accuracy(above, task) - accuracy(below, task))
            return below["bytes"] * (above["bytes"] / below["bytes"]) ** share
    return None


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, len(TASKS), sharex=True)
    styles = {"jpeg": "tab:gray", "webp": "tab:olive", "avif": "tab:blue", "jxl": "tab:cyan", "pruned": "tab:brown"}
    names = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jxl": "JPEG XL", "pruned": "pruned, int8"}
    for axis, task in zip(axes, TASKS, strict=True):
        for way, colour in styles.items():
            mine = [point for point in found["points"] if point["way"] == way]
            best: list[dict[str, Any]] = []
            for point in sorted(mine, key=lambda point: point["bytes"]):
                if not best or accuracy(point, task) > accuracy(best[-1], task):
                    best.append(point)
            line(axis, best, task, names[way], colour=colour)
        coded = [point for point in found["points"] if point.get("variant", "").startswith("lambda")]
        line(axis, sorted(coded, key=lambda point: point["bytes"]), task, "TOFC", colour="tab:red", linewidth=2.2)
        for point, mark in zip(
            (p for p in found["points"] if p["way"] == "tofc" and p not in coded), "sDv^P", strict=False
        ):
            axis.plot(
                point["bytes"],
                100 * accuracy(point, task),
                mark,
                color="tab:orange",
                markersize=5,
                label=point["variant"],
            )
        plain = next(point for point in found["points"] if point["way"] == "uncompressed")
        axis.axhline(100 * accuracy(plain, task), color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", title=TASKS[task], xlabel="bytes a page")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"right on {found['examples']} held-out pages, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def line(
    axis: Any, points: list[dict[str, Any]], task: str, label: str, *, colour: str, linewidth: float = 1.2
) -> None:
    sizes = [point["bytes"] for point in points]
    shares = np.array([accuracy(point, task) for point in points])
    errors = np.abs(np.array([point[task]["interval"] for point in points]).T - shares)
    axis.errorbar(
        sizes, 100 * shares, 100 * errors, marker="o", markersize=3.5, color=colour, label=label, linewidth=linewidth,
        elinewidth=0.5,
    )  # fmt: skip


# Mutated frames -------------------------------------------------------------------------------------------------------


def mutations(frames: list[bytes], rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Endless mutated frames with their kind; every frame truncated at every byte first."""
    for frame in frames:
        for length in range(len(frame)):
            yield "truncated", frame[:length]
    while True:
        frame = frames[rng.integers(len(frames))]
        kind = ("bits", "bytes", "splice", "hash", "length", "insert", "mended bits", "mended length")[rng.integers(8)]
        data = bytearray(frame)
        match kind.split()[-1]:
            case "bits":
                for place in rng.integers(8 * len(data), size=rng.integers(1, 9)).tolist():
                    data[place // 8] ^= 1 << place % 8
            case "bytes":
                start = int(rng.integers(len(data)))
                data[start : start + 8] = rng.bytes(min(8, len(data) - start))
            case "splice":
                other = frames[rng.integers(len(frames))]
                cut = int(rng.integers(len(data)))
                data = bytearray(data[:cut] + other[int(rng.integers(len(other))) :])
            case "hash":
                data[1:5] = rng.bytes(4)
            case "length":  # of tiles, columns, features or bytes, anywhere up to what no machine has
                place = 5 + int(rng.integers(6))
                data[place : place + 1] = varint(int(2 ** rng.uniform(0, 62)))
            case "insert":
                place = int(rng.integers(len(data) + 1))
                data[place:place] = rng.bytes(int(rng.integers(1, 64)))
        yield kind, mended(frame, bytes(data)) if kind.startswith("mended") else bytes(data)


def mended(frame: bytes, data: bytes) -> bytes:
    """The data with the right checksums, if its tiles lie where the frame's do: damage then reaches the decoder."""
    payloads = codec.parse(frame).payloads
    position = len(frame) - sum(len(payload) + 4 for payload in payloads)
    position += len(data) - len(frame)
    out, crc = bytearray(data[:position]), zlib.crc32(data[:position])
    for payload in payloads:
        part = data[position : position + len(payload)]
        crc = zlib.crc32(part, crc)
        out += part + crc.to_bytes(4, "little")
        position += len(payload) + 4
    return bytes(out)


def streams(options: argparse.Namespace) -> dict[str, Any]:
    """Starts itself again, so that a crash of the decoder is seen."""
    command = [sys.executable, __file__, "--out", str(options.out), "--decode", str(options.streams)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"the process that decodes ended with status {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


def decode_mutated(out: Path, count: int) -> dict[str, Any]:
    device = Device(run_of(out, FIRST))
    records = open_source(DocumentsSource(name="pages", weight=1.0, task="read", split="held_out"), 0)
    frames = [device.encode(records[i]["messages"][0]["content"][1]["image"]).frame for i in range(20)]
    decoded = [codec.decode(device.tables, frame) for frame in frames]
    originals = dict(zip(frames, decoded, strict=True))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest, began = 0.0, time.perf_counter()
    for kind, data in itertools.islice(mutations(frames, np.random.default_rng(0)), count):
        start = time.perf_counter()
        try:
            tiles = codec.decode(device.tables, data)
        except BitstreamError as error:
            outcomes[kind][type(error).__name__] += 1
        else:
            same = data in originals and all(map(np.array_equal, tiles, originals[data]))
            if not same and not kind.startswith("mended"):
                raise SystemExit(f"a frame mutated by {kind} decodes to other features: {data.hex()}")
            outcomes[kind]["the original" if same else "other features"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return {
        "streams": count,
        "outcomes": {kind: dict(counts) for kind, counts in sorted(outcomes.items())},
        "seconds": round(time.perf_counter() - began, 1),
        "slowest_ms": round(1e3 * slowest, 2),
        "memory_grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) // 1024,
    }


# Speed ----------------------------------------------------------------------------------------------------------------


def median_ms(function: Callable[[], Any], rounds: int = 3, calls: int = 20) -> float:
    """The median over rounds of the mean over calls."""
    function()
    means = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            function()
        means.append(1e3 * (time.perf_counter() - began) / calls)
    return round(statistics.median(means), 2)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads that start later inherit it
    rng = np.random.default_rng(0)
    config = TofcConfig(width=1152, crop_clusters=32)
    model = Hyperprior(config, rngs=nnx.Rngs(0))
    x_NC = rng.laplace(size=(32, 1152)).astype(np.float32)
    model.calibrate(jax.numpy.asarray(x_NC))
    device = Device(run_of(options.out, FIRST))
    record = open_source(DocumentsSource(name="pages", weight=1.0, task="read", split="held_out"), 0)[0]
    image = record["messages"][0]["content"][1]["image"]
    found: dict[str, Any] = {"tile of 32 x 1152": coder(freeze(model), [x_NC])}
    found["page"] = coder(device.tables, device.features(image)[0])
    found["page"]["views, encoder and merging"] = median_ms(lambda: device.features(image))
    for kind in FILES:
        size, [_, quality, _] = 0.5, FILES[kind][0.5]
        name = f"{kind}, quality {quality}, at half the size"
        found["page"][name] = median_ms(functools.partial(encoded, image, kind, quality, size))
    print(json.dumps(found, indent=1))
    return {"milliseconds": found, "device_bytes": device.size}


def coder(tables: Tables, tiles: list[np.ndarray]) -> dict[str, Any]:
    frame = codec.encode(tables, tiles)
    return {
        "bytes": len(frame),
        "encode": median_ms(lambda: codec.encode(tables, tiles)),
        "decode": median_ms(lambda: codec.decode(tables, frame)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, default=Path("runs/digits"), help="the demo's run (`make pretrain`)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory of the runs")
    parts = {"train": train, "curves": curves, "streams": streams, "speed": speed}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--examples", type=int, default=120, help="held-out questions of each task")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--decode", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        print(json.dumps(decode_mutated(options.out, options.decode)))
        return
    path = machine.RESULTS / "tofc.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found.pop("machine", None)
    for name in options.parts:
        found[name] = parts[name](options)
        machine.write("tofc", found)
        if name == "curves":
            draw(found[name], PICTURE)
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
