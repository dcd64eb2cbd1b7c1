"""Accuracy against test-time compute: PaCoRe's schedules, majority vote and sequential rounds, with small models.

    python benchmarks/pacore_curve.py [--tasks count arithmetic sums] [--run runs/digits] [--problems N] [--texts N]

Three tasks. Two use the demo model (`make pretrain`; trained here if the run is missing) at temperature 1: counting the
digits in an image, and arithmetic without one. The third uses SmolLM2-135M-Instruct as published: sums of two numbers,
in words. Neither model was trained to synthesise, so this shows where training starts from.

As in section 3.2 of the paper, a pool of 32 trajectories is sampled per problem and every method takes the first K.
Seeds derive from the problem, the round and the index, so these are the trajectories that the method would have sampled
itself. PaCoRe's later rounds are all sampled. Sequential rounds form one chain, read off after every round: the final
call of a short chain is the next round of a longer one.

The x axis is the mean number of tokens sampled per problem, without prompts. Needs matplotlib, and what smollm2.py
needs.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import machine
import smollm2

import stepjax
from stepjax.config import DigitsSource, NumericsConfig
from stepjax.data.records import open_source
from stepjax.figures import wilson_interval
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.pacore.answers import Matching, is_right, plurality
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.records import Problem, Totals, Trajectory
from stepjax.rollouts.engine import EngineSampler

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pacore_curve.png"
POOL = 32
SCHEDULES = ((1,), (2,), (4,), (8,), (16,), (32,), (32, 4))
Curves = dict[str, list[dict[str, Any]]]  # method -> its points as JSON
WIDTHS = (1, 2, 4, 8, 16, 32)  # of votes, and lengths of chains


@dataclasses.dataclass
class Task:
    name: str
    model: Any
    processor: Any
    problems: list[Problem]
    matching: Matching
    sampling: SamplingParams
    engine: EngineConfig


@dataclasses.dataclass
class Point:
    label: str
    right: int
    total: int
    tokens: float  # sampled per problem, on average

    def as_json(self) -> dict[str, Any]:
        low, high = wilson_interval(self.right, self.total)
        return {**dataclasses.asdict(self), "accuracy": self.right / self.total, "low": low, "high": high}


async def measure(task: Task) -> dict[str, list[Point]]:
    async with AsyncEngine(Engine(task.model, task.processor, task.engine)) as engine:
        sampler = EngineSampler(engine, task.processor)

        def coordinator(schedule: tuple[int, ...]) -> Coordinator:
            config = PacoreConfig(schedule=schedule, sampling=task.sampling)
            return Coordinator(sampler, config, matching=task.matching)

        async def pool_of(problem: Problem) -> tuple[Trajectory, ...]:
            run = coordinator((POOL,)).begin(problem)
            try:
                return (await run.round(POOL)).trajectories
            except RoundFailedError as error:
                return error.rounds[-1].trajectories

        pools = await asyncio.gather(*map(pool_of, task.problems))
        curves: dict[str, list[Point]] = {
            "majority vote": [vote(task, pools, width) for width in WIDTHS],
            "PaCoRe": [],
        }
        for schedule in SCHEDULES:
            solver = coordinator(schedule)
            ended = await asyncio.gather(
                *(
                    solve(solver, problem, pool[: schedule[0]], task.matching)
                    for problem, pool in zip(task.problems, pools, strict=True)
                )
            )
            curves["PaCoRe"].append(point(str(list(schedule)), ended))
            print(f"  {schedule}: {curves['PaCoRe'][-1].right}/{len(ended)}", flush=True)
        chains = await asyncio.gather(
            *(
                chain(coordinator((1,) * POOL), problem, pool[:1], task.matching)
                for problem, pool in zip(task.problems, pools, strict=True)
            )
        )
        curves["sequential"] = [point(f"[1] x {n}", [each[n] for each in chains]) for n in WIDTHS]
    return curves


def vote(task: Task, pools: Iterable[tuple[Trajectory, ...]], width: int) -> Point:
    ended = []
    for problem, pool in zip(task.problems, pools, strict=True):
        some = pool[:width]
        index, _ = plurality([each.rollout.content for each in some], task.matching)
        right = is_right(some[index].rollout.content, problem.ground_truth, task.matching)
        ended.append((right, Totals.of(some).output_tokens))
    return point(f"@{width}", ended)


async def solve(
    solver: Coordinator, problem: Problem, done: Iterable[Trajectory], matching: Matching
) -> tuple[bool, int]:
    try:
        outcome = await solver.solve(problem, done=done)
    except RoundFailedError as error:  # no answer: wrong, but its tokens count
        return False, Totals.of(each for made in error.rounds for each in made.trajectories).output_tokens
    return is_right(outcome.content, problem.ground_truth, matching), outcome.totals.output_tokens


async def chain(
    solver: Coordinator, problem: Problem, done: Iterable[Trajectory], matching: Matching
) -> list[tuple[bool, int]]:
    """Whether right, and tokens so far, after each round. A round without an answer keeps the previous one."""
    run, ended, tokens, right = solver.begin(problem, done=done), [], 0, False
    for _ in range(POOL + 1):
        try:
            made = await run.round(1)
            right = is_right(made.messages[0].text, problem.ground_truth, matching)
        except RoundFailedError:
            made = run.rounds.pop()  # the next one sees the same references
            tokens += made.totals.output_tokens
            ended += [(right, tokens)] * (POOL + 1 - len(ended))
            break
        tokens += made.totals.output_tokens
        ended.append((right, tokens))
    return ended


def point(label: str, ended: Iterable[tuple[bool, int]]) -> Point:
    ended = list(ended)
    return Point(label, sum(right for right, _ in ended), len(ended), sum(n for _, n in ended) / len(ended))


def digits(run: str, task: str, count: int) -> Task:
    if not Path(run, "checkpoints").exists():
        command = [sys.executable, "-m", "stepjax.cli", "pretrain", "configs/digits/pretrain.py"]
        subprocess.run(command, check=True, cwd=ROOT)
    model, processor = stepjax.load(run)
    source = open_source(DigitsSource(name=task, weight=1.0, task=task, split="held_out"), seed=1)  # type: ignore[arg-type]
    records = [source[i] for i in range(count)]
    asked = [
        Problem(id=record["id"], messages=tuple(record["messages"][:-1]), ground_truth=record["answer"]["text"])
        for record in records
    ]
    engine = EngineConfig(
        max_sequences=64, smallest_batch=64, max_context=2048, page_size=16, cache_tokens=64 * 1024, view_batch=8,
        max_waiting=100_000, max_prefix_groups=32,
    )  # fmt: skip
    kind = "image" if task != "arithmetic" else "text"
    name = {"count": "counting digits", "arithmetic": "arithmetic"}.get(task, task)
    return Task(f"demo model, {name} ({kind})", model, processor, asked, "exact", SamplingParams(max_tokens=12), engine)


def sums(directory: Path, count: int) -> Task:
    numerics = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none")
    model, processor = stepjax.load(smollm2.smollm2(directory), numerics=numerics)
    rng, asked = random.Random(0), []
    for i in range(count):
        a, b = rng.randrange(11, 80), rng.randrange(11, 80)
        text = f"Tom has {a} apples and buys {b} more. How many apples does he have? Reply with one short sentence."
        asked.append(Problem(id=f"sum {i}", messages=({"role": "user", "content": text},), ground_truth=a + b))
    engine = EngineConfig(
        max_sequences=32, smallest_batch=32, max_context=4096, page_size=64, cache_tokens=32 * 2048, max_waiting=100_000
    )
    return Task("SmolLM2-135M, sums (text)", model, processor, asked, "math", SamplingParams(max_tokens=40), engine)


def plot(curves: dict[str, Curves], path: Path) -> None:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    from matplotlib.ticker import NullFormatter, ScalarFormatter  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(4.2 * len(curves), 4), layout="constrained")
    styles = {"PaCoRe": "o-", "majority vote": "s--", "sequential": "^:"}
    for place, (task, by_method) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        for method, rows in by_method.items():
            tokens, accuracy = [row["tokens"] for row in rows], [100 * row["accuracy"] for row in rows]
            [line] = axes.plot(tokens, accuracy, styles[method], label=method, markersize=4)
            low, high = [100 * row["low"] for row in rows], [100 * row["high"] for row in rows]
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 100)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("tokens sampled per problem")
        axes.grid(alpha=0.3)
        if not place:
            axes.set_ylabel("right, %")
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    if "GLIBC_TUNABLES" not in os.environ:  # read when a process starts
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", default=str(ROOT / "runs" / "digits"), help="run of the demo recipe; trained if missing"
    )
    parser.add_argument("--model", type=Path, default=smollm2.DIRECTORY, help="SmolLM2's weights; fetched if missing")
    parser.add_argument("--problems", type=int, default=200, help="problems per task of the demo model")
    parser.add_argument("--texts", type=int, default=40, help="problems for SmolLM2")
    makers = {
        "count": lambda: digits(options.run, "count", options.problems),
        "arithmetic": lambda: digits(options.run, "arithmetic", options.problems),
        "sums": lambda: sums(options.model, options.texts),
    }
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(makers),
        default=list(makers),
        help="tasks to run; the others keep their results",
    )
    options = parser.parse_args()
    for name in options.tasks:
        task = makers[name]()
        print(task.name, flush=True)
        curves = {method: [each.as_json() for each in points] for method, points in asyncio.run(measure(task)).items()}
        for method, rows in curves.items():
            for row in rows:
                print(
                    f"  {method:<14}{row['label']:>10}{100 * row['accuracy']:>8.1f} %"
                    f"  ({100 * row['low']:.0f} to {100 * row['high']:.0f}){row['tokens']:>10.0f} tokens",
                    flush=True,
                )
        save(task.name, curves)


def save(task: str, curves: Curves) -> None:
    """Adds the figures to those of other tasks, and plots all."""
    path = machine.RESULTS / "pacore_curve.json"
    tasks = json.loads(path.read_text())["tasks"] if path.exists() else {}
    tasks = {name: figures for name, figures in sorted((tasks | {task: curves}).items())}
    machine.write("pacore_curve", {"pool": POOL, "tasks": tasks})
    plot(tasks, PICTURE)
    print(f"written to {path.relative_to(ROOT)}, plotted in {PICTURE.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
