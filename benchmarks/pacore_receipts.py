"""Learned synthesis against voting, on held-out receipts: PaCoRe's schedules and the baselines, for several runs.

    python benchmarks/pacore_receipts.py RUN [RUN ...] [--problems 500] [--schedules 8 8,2 16 32,4] [--task smudged]

Give the runs in the order of their training, such as digits_rlvr (which learned the format of synthesis from SFT only)
and digits_pacore. Every run samples a pool of 37 answers to each problem at temperature 1, and all of its methods use
the first ones of that pool. An answer is right if all its digits are. The task "smudged" has no images: ledgers, which
are receipts in words (stepjax.data.receipts).

    greedy, single, pass@8     temperature 0; the mean of the pool; any of the first 8
    majority@9                 the most frequent message of 9: as many calls as [8]
    checked majority@9         the most frequent of those that say "ok", if there are any: a rule made for this task
    PaCoRe [8], [8,2] ...      by stepjax.pacore, with the short template
    sequential@8, RSA          its baselines: eight rounds of one answer, and a last; three populations of eight, of
                               which each answer sees four of the one before, and a vote of the last

"gain" is the difference to another method with its interval, by a bootstrap over problems. "from wrong" counts the
right answers of [8] where all 8 messages are wrong, beside the share of the rest of the pool that is right there;
"cites" is the share of its reasonings that name a reference.
Writes results/pacore_receipts.json.
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import receipts

from stepjax.data.records import open_source
from stepjax.figures import wilson_interval
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.interop.load import load_run
from stepjax.pacore.baselines import Method, answer
from stepjax.pacore.compaction import citations
from stepjax.pacore.config import PacoreConfig, parse_schedule
from stepjax.pacore.coordinator import Coordinator, RoundFailedError
from stepjax.pacore.records import Problem, Trajectory
from stepjax.rewards.verify import is_right
from stepjax.rollouts.engine import EngineSampler

POOL, SEQUENCES, CONTEXT = 37, 64, 1408
SAMPLING = SamplingParams(max_tokens=receipts.MAX_TOKENS + 8, seed=1)
SCHEDULES = [(8,), (8, 2), (16,), (32, 4)]
BASELINES = Method(name="sequential", width=8), Method(name="rsa", width=8, references=4, loops=3)


def measure(run: str, count: int, schedules: Sequence[tuple[int, ...]], task: str = "receipt") -> dict[str, Any]:
    """The figures of a run's model on the first `count` held-out problems."""
    return asyncio.run(_measure(run, count, schedules, task))


async def _measure(run: str, count: int, schedules: Sequence[tuple[int, ...]], task: str) -> dict[str, Any]:
    model, processor, config = load_run(run)
    source = dataclasses.replace(receipts.receipts_of(config.evaluation.sources), task=task)
    records = open_source(source, 1)
    records = [records[i] for i in range(count)]
    sizes = EngineConfig(
        max_sequences=SEQUENCES, smallest_batch=SEQUENCES, max_context=CONTEXT, page_size=32, prefill_tokens=512,
        cache_tokens=SEQUENCES * 768, max_waiting=1_000_000,
    )  # fmt: skip
    async with AsyncEngine(Engine(model, processor, sizes)) as engine:
        sampler = EngineSampler(engine, processor)
        problems = [Problem(id=record["id"], messages=tuple(record["messages"][:-1])) for record in records]

        def config_of(schedule: tuple[int, ...], sampling: SamplingParams = SAMPLING) -> PacoreConfig:
            return PacoreConfig(schedule=schedule, sampling=sampling, template="short", images="after")

        async def pool_of(problem: Problem, width: int, sampling: SamplingParams) -> tuple[Trajectory, ...]:
            try:
                run = Coordinator(sampler, config_of((width,), sampling)).begin(problem)
                return (await run.round(width)).trajectories
            except RoundFailedError as error:
                return error.rounds[-1].trajectories

        cold = dataclasses.replace(SAMPLING, temperature=0.0)
        greedy = await asyncio.gather(*(pool_of(each, 1, cold) for each in problems))
        pools = await asyncio.gather(*(pool_of(each, POOL, SAMPLING) for each in problems))
        right = np.array(
            [[is_right(r, t.rollout.content) for t in pool] for r, pool in zip(records, pools, strict=True)]
        )

        def voted(width: int, *, checked: bool) -> list[bool]:
            return [
                receipts.vote(record, [each.rollout for each in pool[:width]], checked=checked)
                for record, pool in zip(records, pools, strict=True)
            ]

        methods: dict[str, Any] = {
            "greedy": [is_right(r, t[0].rollout.content) for r, t in zip(records, greedy, strict=True)],
            "single": right.mean(axis=1),
            "pass@8": right[:, :8].any(axis=1),
            **{f"majority@{n}": voted(n, checked=False) for n in (9, 17, 37)},
            **{f"checked majority@{n}": voted(n, checked=True) for n in (9, 17, 37)},
        }
        tokens = np.array([[each.rollout.num_tokens for each in pool] for pool in pools])
        spent = {"single": float(tokens.mean())} | {
            f"{vote}majority@{n}": float(tokens[:, :n].sum(1).mean()) for n in (9, 17, 37) for vote in ("", "checked ")
        }
        notes: dict[str, Any] = {}
        runs: dict[str, tuple[Method, PacoreConfig]] = {
            f"PaCoRe [{','.join(map(str, schedule))}]": (Method(), config_of(schedule)) for schedule in schedules
        }
        runs |= {each.label(config_of(())): (each, each.configured(config_of(()))) for each in BASELINES}
        for name, (method, settings) in runs.items():
            solver, width = Coordinator(sampler, settings), settings.schedule[0] if settings.schedule else method.width

            async def solve(
                place: int, solver: Coordinator = solver, method: Method = method, width: int = width
            ) -> tuple[bool, int, str]:
                try:
                    outcome = await answer(solver, problems[place], method, done=pools[place][:width])
                except RoundFailedError:
                    return False, 0, ""
                reasoning = outcome.rollout.reasoning or ""
                return is_right(records[place], outcome.content), outcome.totals.output_tokens, reasoning

            ended = await asyncio.gather(*map(solve, range(count)))
            methods[name] = [each[0] for each in ended]
            spent[name] = statistics.fmean(each[1] for each in ended)
            if name == "PaCoRe [8]":
                wrong = [not any(each[:8]) for each in right]
                saved = [ok for (ok, _, _), all_wrong in zip(ended, wrong, strict=True) if all_wrong]
                fresh = float(right[wrong, 8:].mean()) if any(wrong) else None
                notes["from wrong"] = {"right": sum(saved), "of": len(saved), "one more sample": fresh}
                notes["cites"] = statistics.fmean(bool(citations(text, 8)) for _, _, text in ended)
            print(f"  {run} {task} {name}: {100 * np.mean(methods[name]):.1f} %", flush=True)
    found: dict[str, dict[str, Any]] = {
        name: figures(np.asarray(values, np.float64)) for name, values in methods.items()
    }
    for name, values in methods.items():
        found[name] |= {"tokens": spent[name]} if name in spent else {}
        if name.startswith("PaCoRe"):
            for other in ("single", "majority@9", "greedy", "checked majority@9"):
                found[name][f"gain over {other}"] = gain(np.asarray(values, np.float64), np.asarray(methods[other]))
    return {"task": task, "problems": count, "methods": found, **notes}


def figures(values: np.ndarray) -> dict[str, float]:
    if set(np.unique(values)) <= {0.0, 1.0}:
        low, high = wilson_interval(int(values.sum()), len(values))
    else:
        radius = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
        low, high = values.mean() - radius, values.mean() + radius
    return {"accuracy": float(values.mean()), "low": float(low), "high": float(high)}


def gain(values: np.ndarray, others: np.ndarray) -> list[float]:
    """The mean difference and its 95 % interval; images are drawn again in pairs."""
    difference = values - others.astype(np.float64)
    rng = np.random.default_rng(0)
    means = rng.choice(difference, (4000, len(difference))).mean(axis=1)
    return [float(difference.mean()), *map(float, np.quantile(means, (0.025, 0.975)))]


def table(found: dict[str, Any]) -> str:
    names = list(next(iter(found.values()))["methods"])
    lines = [f"{'':22}" + "".join(f"{Path(run).name:>26}" for run in found)]
    for name in names:
        cells = [each["methods"][name] for each in found.values()]
        shown = [f"{100 * c['accuracy']:.1f} ({100 * c['low']:.1f} to {100 * c['high']:.1f})" for c in cells]
        lines.append(f"{name:22}" + "".join(f"{cell:>26}" for cell in shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--task", choices=("receipt", "smudged"), default="receipt")
    parser.add_argument("--schedules", nargs="+", type=parse_schedule, default=SCHEDULES)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    found = {}
    for run in options.runs:
        found[run] = measure(run, options.problems, options.schedules, options.task)
        print(json.dumps(found[run], indent=1), flush=True)
    print(table(found))
    if not options.dry:
        machine.write("pacore_receipts", {"runs": {Path(run).name: each for run, each in found.items()}})


if __name__ == "__main__":
    main()
