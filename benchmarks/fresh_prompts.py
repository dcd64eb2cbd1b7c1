"""Sampling for reinforcement learning: 16 fresh prompts with an image, 16 samples each, against an earlier revision.

    python benchmarks/fresh_prompts.py [--run DIR] [--repeats 3] [--base REVISION]

The model has the demo recipe's shapes and random weights; with --run, a trained run's weights. The prompts are held-out
transcriptions, none used twice; every sample has 12 tokens. Three sides take turns in one run, each in a process of its
own, and every figure is the median of the repeats:

    now             this checkout
    base            the revision, checked out into a temporary git worktree: prompts and views one by one
    one at a time   this checkout, a request after another, each with a batch of its own 16 samples

Seconds are from the first request to the last token drawn. The parts are measured on further prompts, waiting for the
device after each call: encoder, prefill, copies of pages, decoding, and the host's work between them. The script turns
on large pages for malloc, which help JAX on CPU.

Writes results/fresh_prompts.json.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPTS, SAMPLES, TOKENS = 16, 16, 12
PARTS = ("encode", "prefill", "copy", "decode")
CONFIG = dict(max_context=256, page_size=16, max_prefix_groups=PROMPTS)
# One size of decoding batches, as for any run that keeps them full.
TOGETHER = dict(max_sequences=PROMPTS * SAMPLES, smallest_batch=PROMPTS * SAMPLES)
ALONE = dict(max_sequences=SAMPLES, smallest_batch=SAMPLES)


def side(run: str | None, alone: bool) -> None:
    """A child: warms up, then answers each line of input, the number of a round, with a line of figures."""
    import jax

    import stepjax
    from stepjax.config import DigitsSource
    from stepjax.config_file import load_recipe
    from stepjax.data.records import open_source
    from stepjax.inference.config import EngineConfig
    from stepjax.inference.engine import Engine
    from stepjax.inference.request import SamplingParams
    from stepjax.models.step_vl import init_model
    from stepjax.processing.processor import Processor

    if run is None:
        recipe = load_recipe(ROOT / "configs/digits/pretrain.py")
        model = init_model(recipe.model, recipe.numerics)
        processor = Processor.from_config(recipe.images, recipe.tokenizer)
    else:
        model, processor = stepjax.load(run)
    options: dict[str, Any] = CONFIG | (ALONE if alone else TOGETHER)
    engine = Engine(model, processor, EngineConfig(**options))
    started = time.process_time()
    compiled = engine.warm_up(top_logprobs=False)
    print(json.dumps({"programs": compiled, "warm_up_cpu_seconds": time.process_time() - started}), flush=True)
    records = open_source(DigitsSource(name="transcribe", weight=1.0, task="transcribe", split="held_out"), 0)
    params = SamplingParams(n=SAMPLES, max_tokens=TOKENS, seed=0, ignore_eos=True)
    runner, calls = engine._runner, []

    def answer(first: int) -> tuple[float, list]:
        prompts = [processor.process_prompt(records[first + i]["messages"][:-1]) for i in range(PROMPTS)]
        started = time.perf_counter()
        groups = [[prompt] for prompt in prompts] if alone else [prompts]
        completions = [each for group in groups for each in engine.generate(group, params)]
        return time.perf_counter() - started, [[c.tokens for c in samples] for samples in completions]

    def timed(name: str) -> Any:
        call = getattr(runner, name)

        def wrapped(*args: Any) -> Any:
            started = time.perf_counter()
            result = call(*args)
            jax.block_until_ready((runner.pool_S2KTW, runner.features_RD))
            calls.append((name, time.perf_counter() - started))
            return result

        return wrapped

    for line in sys.stdin:
        first = 2 * PROMPTS * int(line)
        seconds, tokens = answer(first)
        calls.clear()
        for name in PARTS:
            setattr(runner, name, timed(name))
        whole, _ = answer(first + PROMPTS)
        for name in PARTS:
            delattr(runner, name)
        parts: dict[str, float] = {name: sum(taken for which, taken in calls if which == name) for name in PARTS}
        parts["host"] = whole - sum(parts.values())
        number = {name: sum(which == name for which, _ in calls) for name in PARTS}
        digest = [hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in tokens]
        print(json.dumps({"seconds": seconds, "parts": parts, "calls": number, "answers": digest}), flush=True)


class Side:
    def __init__(self, root: Path, run: str | None, *, alone: bool = False):
        command = [sys.executable, __file__, "--side", "alone" if alone else "together"]
        command += [] if run is None else ["--run", run]
        tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | tunables | {"PYTHONPATH": str(root)},
        )
        self.warm_up: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []

    def wait(self) -> None:
        """Until it is warm."""
        self.warm_up = self._line()

    def measure(self, number: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args}: ended with status {self.process.wait()}")
        return json.loads(line)

    def figures(self) -> dict[str, Any]:
        def median(of: Any) -> float:
            return round(statistics.median(map(of, self.rounds)), 4)

        return {
            "seconds": median(lambda made: made["seconds"]),
            "tokens_per_second": round(PROMPTS * SAMPLES * TOKENS / median(lambda made: made["seconds"])),
            "parts": {name: median(lambda made, name=name: made["parts"][name]) for name in (*PARTS, "host")},
            "calls": self.rounds[-1]["calls"],
            **self.warm_up,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="directory of a trained run; by default random weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", default="aac3db6", help="revision to compare with; prompts were computed one by one")
    parser.add_argument("--side", choices=["together", "alone"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.run, options.side == "alone")
        return
    import machine

    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary, "base")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(base), options.base], cwd=ROOT, check=True)
        try:
            run = None if options.run is None else str(Path(options.run).resolve())
            sides = {"now": Side(ROOT, run), "base": Side(base, run), "one at a time": Side(ROOT, run, alone=True)}
            for each in sides.values():
                each.wait()
            for number in range(options.repeats + 1):
                for each in sides.values():
                    each.rounds.append(each.measure(number))
            for each in sides.values():
                del each.rounds[0]  # warms caches
                assert each.process.stdin is not None
                each.process.stdin.close()
                each.process.wait()
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)
    same = [
        a == b
        for now, before in zip(sides["now"].rounds, sides["base"].rounds, strict=True)
        for a, b in zip(now["answers"], before["answers"], strict=True)
    ]
    figures = {name: each.figures() for name, each in sides.items()}
    ratios = {name: round(made["seconds"] / figures["now"]["seconds"], 2) for name, made in figures.items()}
    columns = ("seconds", *PARTS, "host", "programs")
    print(f"{'':<16}" + "".join(f"{name:>10}" for name in columns) + f"{'ratio':>10}")
    for name, made in figures.items():
        row = [made["seconds"], *made["parts"].values(), made["programs"], ratios[name]]
        print(f"{name:<16}" + "".join(f"{value:>10.3g}" for value in row))
    print(f"prompts whose 16 samples are equal now and in {options.base}: {sum(same)} of {len(same)}")
    path = machine.write(
        "fresh_prompts",
        {
            "command": "python benchmarks/fresh_prompts.py",
            "prompts": PROMPTS,
            "samples": SAMPLES,
            "tokens": TOKENS,
            "base": options.base,
            "trained": options.run is not None,
            "sides": figures,
            "ratios": ratios,
            "equal_prompts": sum(same) / len(same),
        },
    )
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
