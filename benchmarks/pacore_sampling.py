"""A synthesis round of PaCoRe on one engine: trajectories that share their prompt, against independent calls.

    python benchmarks/pacore_sampling.py [--model DIR] [--problems N] [--references TOKENS]

The model is SmolLM2-135M in float32 (`benchmarks/smollm2.py` fetches it). Each problem has 16 references, about
7,400 tokens together, which with template and answer fill the model's context of 8,192. Sixteen trajectories are
sampled per problem, by the same coordinator with the same seeds on engines of the same size. In one engine requests
with the same prompt share its computation, pages and page reads; in the other each is independent. Pages are counted
while the engine runs. All problems run concurrently, so their rounds overlap. Needs what smollm2.py needs.
"""

import argparse
import asyncio
import dataclasses
import os
import random
import statistics
import sys
import time
from pathlib import Path

import machine
import smollm2

import stepjax
from stepjax.config import NumericsConfig
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.coordinator import Coordinator
from stepjax.pacore.records import Problem
from stepjax.rollouts.engine import EngineSampler, ProcessorTokens

FLOAT32 = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none")
WIDTH, ANSWER, PAGE = 16, 64, 64
CONTEXT = 8192


def reference(tokens: ProcessorTokens, count: int, seed: int) -> str:
    """A worked solution of about `count` tokens, as a trajectory would leave."""
    rng, lines, have = random.Random(seed), [], 0
    while have < count:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        lines.append(f"Step {len(lines) + 1}: {a} and {b} make {a + b}, which we carry over.")
        have += tokens.count(lines[-1])
    return "\n".join(lines)


def problems(tokens: ProcessorTokens, count: int, reference_tokens: int) -> list[Problem]:
    return [
        Problem(
            id=f"problem {i}",
            messages=({"role": "user", "content": f"Add up all the numbers of list {i} and say the total."},),
            responses=tuple(reference(tokens, reference_tokens, 100 * i + k) for k in range(WIDTH)),
        )
        for i in range(count)
    ]


@dataclasses.dataclass
class Measured:
    seconds: float
    pages: int  # at the peak
    prompt_tokens: int  # computed


async def run(engine: Engine, processor, asked: list[Problem], answer: int) -> Measured:
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
    async with AsyncEngine(engine) as running:
        before = running.stats()
        coordinator = Coordinator(EngineSampler(running, processor), PacoreConfig(schedule=(), sampling=sampling))

        async def one_round(problem: Problem) -> None:
            made = await coordinator.begin(problem).round(WIDTH)
            assert all(each.rollout.num_tokens == answer for each in made.trajectories), made.losses

        pages, is_done = 0, asyncio.Event()

        async def watch() -> None:
            nonlocal pages
            while not is_done.is_set():
                pages = max(pages, running.stats().pages_used)
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        await asyncio.gather(*(one_round(problem) for problem in asked))
        seconds = time.perf_counter() - began
        is_done.set()
        await watching
        after = running.stats()
        computed = (after.prompt_tokens - after.cached_prompt_tokens) - (
            before.prompt_tokens - before.cached_prompt_tokens
        )
    return Measured(seconds, pages, computed)


def main() -> None:
    if "GLIBC_TUNABLES" not in os.environ:  # read when a process starts
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=smollm2.DIRECTORY, help="the weights; fetched if missing")
    parser.add_argument("--problems", type=int, default=1)
    parser.add_argument("--references", type=int, default=440, help="tokens of each of the 16")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    model, processor = stepjax.load(smollm2.smollm2(options.model), numerics=FLOAT32)
    tokens = ProcessorTokens(processor)
    decoder = getattr(model, "config", None)
    assert decoder is not None
    token_bytes = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 4

    ways = {"shared": True, "independent": False}
    runs: dict[str, list[Measured]] = {name: [] for name in ways}
    prompt = 0
    for repeat in range(options.repeats):
        asked = problems(tokens, options.problems, options.references)
        asked = [dataclasses.replace(each, id=f"{each.id} of {repeat}") for each in asked]
        for name, shares in ways.items():
            sequences = WIDTH * options.problems
            config = EngineConfig(
                max_sequences=sequences,
                smallest_batch=sequences,
                max_context=CONTEXT,
                page_size=PAGE,
                cache_tokens=WIDTH * CONTEXT,
                prefix_caching=shares,
            )
            engine = Engine(model, processor, config)
            short = problems(tokens, 1, 4)  # compiles
            asyncio.run(run(engine, processor, short, 2))
            measured = asyncio.run(run(engine, processor, asked, ANSWER))
            runs[name].append(measured)
            prompt = prompt or measured.prompt_tokens // options.problems
            print(f"{name}: {measured.seconds:.0f} s, {measured.pages} pages", flush=True)
            del engine

    figures = {
        name: {
            "problems_per_hour": 3600 * options.problems / statistics.median(each.seconds for each in measured),
            "seconds": [each.seconds for each in measured],
            "kv_bytes": max(each.pages for each in measured) * PAGE * token_bytes,
            "prompt_tokens_computed": measured[0].prompt_tokens,
        }
        for name, measured in runs.items()
    }
    ratio = figures["shared"]["problems_per_hour"] / figures["independent"]["problems_per_hour"]
    memory = figures["independent"]["kv_bytes"] / figures["shared"]["kv_bytes"]
    print(f"\n{options.problems} concurrent problems, {WIDTH} x {ANSWER} tokens each after a prompt of {prompt:,}")
    print(f"{'':<14}{'problems/hour':>16}{'KV cache':>12}{'prompt tokens':>16}")
    for name, figure in figures.items():
        print(
            f"{name:<14}{figure['problems_per_hour']:>16.1f}{figure['kv_bytes'] / 2**20:>8.0f} MiB"
            f"{figure['prompt_tokens_computed']:>16,}"
        )
    print(f"{'ratio':<14}{ratio:>16.1f}{memory:>11.1f}x")
    path = machine.write(
        "pacore_sampling",
        {
            "model": "SmolLM2-135M-Instruct, float32",
            "width": WIDTH,
            "answer_tokens": ANSWER,
            "prompt_tokens": prompt,
            "problems": options.problems,
            "page_tokens": PAGE,
            "ways": figures,
            "ratio": ratio,
            "memory_ratio": memory,
        },
    )
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
