"""The demo's post-training, from its pretrained checkpoint: SFT, RLVR and RLHF on receipts, measured.

    make post-train      # or: python benchmarks/post_train.py [--out runs] [--images 500] [--pacore] [--long | --short]

    digits           the model of `make pretrain`; trained first if OUT has none
    digits_sft_text  stepjax sft configs/digits/sft_text.py: adding, and using messages of others, in words
    digits_sft       stepjax sft configs/digits/sft.py: what a receipt is, how to answer, and how to judge two answers
    digits_rlvr      stepjax rl configs/digits/rlvr.py: 1 for an answer whose digits are all right; half a point is
                     lost by a false verdict
    digits_rlhf      stepjax rl configs/digits/rlhf.py: preferences of digits_sft, for a few iterations
    digits_pacore    with --pacore: stepjax pacore cache, then stepjax rl configs/digits/pacore_rl.py: 1 for a right
                     synthesis; then PaCoRe against voting, before and after it, on receipts and on smudged ledgers
                     (benchmarks/pacore_receipts.py)

Every stage resumes where it was; run the command again after an interruption. All are measured on the same held-out
receipts (benchmarks/receipts.py: greedy, and 8 samples at temperature 1). Writes OUT/post_train.json and, with
matplotlib, OUT/post_train.png and OUT/pacore.png; a whole run also writes results/post_train.json.

`--long` has the report's numbers of iterations, 600 of RLVR, 300 of RLHF and 500 of PaCoRe, of a fifth of the prompts
and with smaller steps; give it an --out of its own. Writes results/post_train_long.json. `--short` only shows that all
of it works.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np
import pacore_receipts
import receipts

from stepjax.data.records import open_source
from stepjax.figures import human_time
from stepjax.interop.load import load_run
from stepjax.training.host import num_cores

ROOT = Path(__file__).parents[1]
TINY = ["--logging.every", "1", "--evaluation.examples", "8", "--checkpoint.every", "2"]
TINY_RL = ["--iterations", "2", "--rollout.prompts", "2", "--rollout.samples", "4", "--rollout.max-sequences", "8"]
SHORT = {
    "pretrain": ["--schedule.phases.0.tokens", "20000", "--schedule.phases.1.tokens", "2048"],
    "sft_text": ["--schedule.phases.0.tokens", "12000"],
    "sft": ["--schedule.phases.0.tokens", "12000"],
    "rlvr": TINY_RL,
    "pacore_rl": TINY_RL,
    "rlhf": [*TINY_RL, "--reward.max-missing", "1.0"],  # a judge that has learned nothing gives no verdicts
}
# The noise of a gradient falls with the root of the answers, so steps are smaller by the root of five.
LONG = {
    "rlvr": ["--iterations", "600", "--rollout.prompts", "8", "--policy.learning-rate", "4.5e-5"],
    "rlhf": ["--iterations", "300", "--rollout.prompts", "4", "--policy.learning-rate", "4.5e-5"],
    "pacore_rl": ["--iterations", "500", "--rollout.prompts", "8", "--policy.learning-rate", "4.5e-5"],
}


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str  # of its recipe
    verb: str
    run: str
    start: str | None  # the run that it starts from


STAGES = (
    Stage("pretrain", "pretrain", "digits", None),
    Stage("sft_text", "sft", "digits_sft_text", "digits"),
    Stage("sft", "sft", "digits_sft", "digits_sft_text"),
    Stage("rlvr", "rl", "digits_rlvr", "digits_sft"),
    Stage("rlhf", "rl", "digits_rlhf", "digits_rlvr"),
    Stage("pacore_rl", "rl", "digits_pacore", "digits_rlhf"),
)
MEASURED = "sft", "rlvr", "rlhf"  # by receipts.py; the ones before have seen hardly any receipts
PACORE_RUNS = {
    "digits_sft": "after SFT",
    "digits_rlhf": "after RLVR and RLHF",
    "digits_pacore": "after PaCoRe's training",
}
PACORE_TASKS = {"receipt": "receipts", "smudged": "smudged ledgers, no images"}
PROBLEMS = 1000  # of the cache, before its filter


def train(stage: Stage, out: Path, *, short: bool, long: bool) -> float:
    """Runs or resumes a stage; returns the seconds that took."""
    began = time.monotonic()
    start = ["--init-from.path", str(out / stage.start)] if stage.start is not None else []
    command = [stage.verb, f"configs/digits/{stage.name}.py", "--out", str(out), *start]
    if stage.name == "pacore_rl":
        cache = ["--cache", str(out / "digits_cache.jsonl"), "--problems", str(4 if short else PROBLEMS)]
        # What nearly all answers solve, or none, teaches nothing. A short run solves nothing and keeps them all; of its
        # sixteen answers, most are cut off before they have a message.
        cache += [*TINY_RL, "--rollout.samples", "16"] if short else ["--above", "0", "--below", "0.9"]
        stepjax(["pacore", "cache", "configs/digits/rlvr.py", *start, *cache], out, short)
        command += ["--data.sources.0.path", cache[1]]
    if stage.name == "rlhf":
        command += ["--reward.judge.run", str(out / "digits_sft")]
    if long:
        command += LONG.get(stage.name, [])
    if short:
        command += [*TINY, *SHORT[stage.name], *(["--schedule.warmup-tokens", "4000"] if stage.verb != "rl" else [])]
    stepjax(command, out, short)
    return time.monotonic() - began


def stepjax(arguments: list[str], out: Path, short: bool) -> None:
    environment = dict(os.environ)
    if short:
        environment |= {name.upper(): str(value) for name, value in hurried(out).items()} | {"JAX_NUM_CPU_DEVICES": "1"}
    status = subprocess.run([sys.executable, "-m", "stepjax.cli", *arguments], cwd=ROOT, env=environment).returncode
    if status:
        sys.exit(f"stepjax {' '.join(arguments)} ended with status {status}; to go on, run this command again")


def hurried(out: Path) -> dict[str, Any]:
    """Settings of JAX's for a short run, nearly all of which is compilation."""
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(out / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }


def measure(run: Path, images: int) -> dict[str, Any]:
    model, processor, config = load_run(run)
    records = open_source(receipts.receipts_of(config.evaluation.sources), 1)
    return receipts.measure(model, processor, [records[i] for i in range(images)], 8, 1)[0]


def in_parallel(jobs: dict[Any, Any], settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The results of functions with their arguments, one a core; an engine of a model this small fills no more."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_cores(), context, initializer=configure, initargs=(settings,)) as pool:
        futures = {pool.submit(*job): key for key, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)


def table(found: dict[str, Any]) -> str:
    columns = ("greedy", "mean@8", "pass@8", "majority@8", "checked majority")
    lines = [f"{'':12}" + "".join(f"{name:>24}" for name in columns)]
    for name, stage in found.items():
        cells = []
        for column in columns:
            accuracy, low, high = (100 * stage["receipts"][column][key] for key in ("accuracy", "low", "high"))
            cells.append(f"{accuracy:6.1f} % ({low:.1f} to {high:.1f})")
        lines.append(f"{name:12}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def draw(found: dict[str, Any], out: Path) -> Path | None:
    """RLVR's reward and entropy, and how many held-out receipts each stage's model gets right.

    RLHF's reward is not drawn: answers are compared within their group, so its mean is a half whatever is learned.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    reward, entropy, bars = figure.subplots(1, 3)
    rows = [json.loads(line) for line in (out / "digits_rlvr" / "metrics.jsonl").read_text().splitlines()]
    steps, window = [row["step"] for row in rows], max(1, len(rows) // 10)
    for axes, name, title in (
        (reward, "reward/receipt", "reward of answers to receipts"),
        (entropy, "entropy", "entropy, nats a token"),
    ):
        values = [row.get(name, 0.0) for row in rows]
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
        axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color="C0", linewidth=1.6)
        axes.set(xlabel="iteration of RLVR", title=title)
    names = list(found)
    for offset, column in ((-0.2, "greedy"), (0.2, "mean@8")):
        cells = [found[name]["receipts"][column] for name in names]
        values = [100 * cell["accuracy"] for cell in cells]
        low, high = ([100 * abs(cell[key] - cell["accuracy"]) for cell in cells] for key in ("low", "high"))
        places = [place + offset for place in range(len(names))]
        bars.bar(places, values, 0.38, yerr=[low, high], label=column, capsize=3)
    bars.set_xticks(range(len(names)), [name.upper() for name in names])
    bars.set(ylim=(0, 100), title="held-out receipts right, %")
    bars.legend(fontsize=8)
    for axes in (reward, entropy, bars):
        axes.grid(alpha=0.3)
    figure.savefig(out / "post_train.png", dpi=120)
    return out / "post_train.png"


def draw_pacore(found: dict[str, Any], out: Path) -> Path | None:
    """Accuracy against the tokens that it takes, after each stage that was measured, for each task."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(5.2 * len(found) + 2, 4.4), layout="constrained")
    for axes, (task, runs) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
        names = [name for name in PACORE_RUNS if name in runs]
        styles = ("--", "C7", "v"), ("-.", "C4", "^"), ("-", "C0", "D")
        for name, (style, color, marker) in zip(names, styles[-len(names) :], strict=True):
            methods = runs[name]["methods"]
            schedules = {key.removeprefix("PaCoRe "): each for key, each in methods.items() if key.startswith("PaCoRe")}
            schedules = dict(sorted(schedules.items(), key=lambda item: item[1]["tokens"]))
            rising = [methods["single"], *schedules.values()]
            values, low, high = (100 * np.array([each[key] for each in rising]) for key in ("accuracy", "low", "high"))
            axes.errorbar(
                [each["tokens"] for each in rising], values, yerr=[values - low, high - values],
                label=f"PaCoRe, {PACORE_RUNS[name]}", linestyle=style, color=color, marker=marker, capsize=2,
            )  # fmt: skip
        for key, each in schedules.items():
            place = each["tokens"], 100 * each["accuracy"]
            axes.annotate(key, place, xytext=(4, -11), textcoords="offset points", fontsize=8, color=color)
        # The rest is of the last run.
        last = runs[names[-1]]["methods"]
        for key, marker in ("sequential@8", "P"), ("RSA N=8 K=4 T=3", "*"):
            axes.plot(last[key]["tokens"], 100 * last[key]["accuracy"], marker, color="C5", markersize=9, label=key)
        votes = ("majority", "majority vote", "o", "C1"), ("checked majority", 'of those that say "ok"', "s", "C2")
        for name, label, marker, color in votes:
            points = [each for key, each in last.items() if key.startswith(f"{name}@")]
            axes.plot(
                [each["tokens"] for each in points], [100 * each["accuracy"] for each in points],
                label=label, linestyle=":", marker=marker, color=color,
            )  # fmt: skip
        axes.axhline(100 * last["greedy"]["accuracy"], color="C3", linewidth=0.8, label="greedy")
        axes.set_xscale("log")
        axes.set(xlabel="tokens sampled for a problem", ylabel="right, %", title=PACORE_TASKS[task])
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(out / "pacore.png", dpi=120)
    return out / "pacore.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--pacore", action="store_true", help="train and measure PaCoRe, too")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--long", action="store_true", help="1,400 iterations of reinforcement learning")
    sizes.add_argument("--short", action="store_true", help="a few steps of each stage")
    args = parser.parse_args()
    out, images = args.out.resolve(), 8 if args.short else args.images
    path = out / "post_train.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stages": {}, "pacore": {}}

    def save() -> None:
        path.write_text(json.dumps(found, indent=1) + "\n")

    if "stages" not in found:
        sys.exit(f"{path} was written by an older version of this script: remove it, or name another --out")
    stages, pacore = found["stages"], found["pacore"]
    for stage in STAGES if args.pacore else STAGES[:-1]:
        if stage.name in stages or (stage.name == "pretrain" and (out / "digits" / "checkpoints").exists()):
            continue
        print(f"\n=== {stage.name}", flush=True)
        stages[stage.name] = {"seconds": train(stage, out, short=args.short, long=args.long)}
        save()
    shown = MEASURED[-1:] if args.short else MEASURED
    jobs: dict[tuple[str, str], tuple[Callable[..., Any], *tuple[Any, ...]]] = {}
    for stage in STAGES:
        if stage.name in shown and "receipts" not in stages[stage.name]:
            jobs["receipts", stage.name] = measure, out / stage.run, images
    for task, run in itertools.product(PACORE_TASKS, [*PACORE_RUNS][-1:] if args.short else PACORE_RUNS):
        if args.pacore and run not in pacore.setdefault(task, {}):
            schedules = [(2,)] if args.short else pacore_receipts.SCHEDULES
            jobs[task, run] = pacore_receipts.measure, str(out / run), images, schedules, task
    for (what, name), figures in in_parallel(jobs, hurried(out) if args.short else {}):
        if what == "receipts":
            stages[name] |= {"images": images, "receipts": figures}
        else:
            pacore[what][name] = figures
        save()
    print(f"\n{table({name: stages[name] for name in shown})}\n")
    for task, runs in pacore.items():
        print(
            f"{PACORE_TASKS[task]}\n{pacore_receipts.table({run: runs[run] for run in PACORE_RUNS if run in runs})}\n"
        )
    print(", ".join(f"{name} {human_time(stage['seconds'])}" for name, stage in stages.items()))
    if not args.short:
        pictures = [draw({name: stages[name] for name in shown}, out), *([draw_pacore(pacore, out)] if pacore else [])]
        print(f"curves in {' and '.join(map(str, pictures))}" if all(pictures) else "no curves: pip install matplotlib")
        machine.write("post_train_long" if args.long else "post_train", found)


if __name__ == "__main__":
    main()
