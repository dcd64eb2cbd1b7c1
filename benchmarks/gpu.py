"""One GPU, measured: numerics of the kernels' GPU routes, attention, a train step, decoding, sampling, the demo.

    python benchmarks/gpu.py [--out DIR] [--only STAGE ...] [--seconds 480] [--dry]

Needs JAX on CUDA and no network. Every stage runs in its own process, so that it frees its memory, and writes
DIR/gpu_STAGE.json (benchmarks/results by default) when it ends or fails. `--dry` runs everything on CPU with tiny
shapes.

    numerics    largest error of each route against float32 XLA, over heads, masks and lengths
    attention   TFLOP/s of useful work, forward and with backward: our routes, cuDNN by JAX, PyTorch's best
    train       a train step with Qwen3-8B's shapes and 8 of its layers: tokens/s, MFU
    decode      Qwen3-8B with random weights: tokens/s at batch 1, 16, 64, and the share of memory bandwidth that
                reading the weights once per step takes
    shared      K samples of one prompt against K prompts of that length, decoding only
    demo        tokens/s of `stepjax pretrain configs/digits/pretrain.py`
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import machine
import numpy as np

from pallas_kernels.flash_attention import flash_attention
from stepjax.config import (
    BatchConfig,
    DataConfig,
    DecoderConfig,
    DigitsSource,
    ImageConfig,
    ModelConfig,
    NumericsConfig,
    Phase,
    PretrainConfig,
    ScheduleConfig,
    VisionConfig,
)

# bytes/s of memory, as NVIDIA's data sheets say; by the beginning of the device's kind, the longest first.
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 PCIe": 2.0e12, "NVIDIA H100": 3.35e12}
DRY = os.environ.get("STEPJAX_GPU_DRY") == "1"
TINY = DecoderConfig(
    vocab_size=512, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_positions=1024
)
DECODER = TINY if DRY else DecoderConfig(max_positions=40_960)
Figures = dict[str, Any]
ROOT = Path(__file__).parent.parent


def seconds(call: Callable[..., Any], *args: Any, repeats: int = 10) -> float:
    """Median of single calls, after two that are not counted."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        if i > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def arrays(B: int, T: int, S: int, N: int, K: int, H: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def packed(B: int, T: int, segments: int, padding: int = 0) -> jax.Array:
    ids = np.repeat(np.arange(segments), -(-T // segments))[:T]
    ids[T - padding :] = -1
    return jnp.asarray(np.tile(ids, (B, 1)), jnp.int32)


# Stages --------------------------------------------------------------------------------------------------------------


def numerics() -> Figures:
    """Errors relative to the largest value, so that bfloat16 answers of any size compare."""
    cases = {
        "causal": (dict(B=2, T=256, S=256, N=8, K=2, H=128), dict(causal=True)),
        "full, 96": (dict(B=2, T=144, S=144, N=4, K=4, H=96), {}),
        "odd length": (dict(B=2, T=131, S=131, N=4, K=2, H=64), dict(causal=True)),
        "odd length, full": (dict(B=1, T=81, S=81, N=4, K=4, H=96), {}),
        "packed": (dict(B=2, T=256, S=256, N=8, K=2, H=128), dict(causal=True, ids=packed(2, 256, 4, 20))),
        "offset": (dict(B=1, T=64, S=256, N=8, K=2, H=128), dict(causal=True, q_offset=192)),
    }
    routes = ("xla",) if DRY else ("xla", "gpu")
    found: Figures = {}
    for name, (shape, options) in cases.items():
        ids = options.pop("ids", None)
        q, k, v = arrays(**shape)

        def loss(q, k, v, implementation, options=options, ids=ids):
            out = flash_attention(q, k, v, q_segment_ids_BT=ids, implementation=implementation, **options)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        def run(implementation, dtype, q=q, k=k, v=v, loss=loss):
            call = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
            grads, out = call(*(x.astype(dtype) for x in (q, k, v)), implementation)
            return [np.asarray(x, np.float32) for x in (out, *grads)]

        with jax.default_matmul_precision("highest"):
            exact = run("xla", jnp.float32)
        for route in routes:
            errors = [
                float(np.abs(x - y).max() / np.abs(y).max())
                for x, y in zip(run(route, jnp.bfloat16), exact, strict=True)
            ]
            found[f"{name}: {route}"] = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
            assert max(errors) < 0.03, (name, route, errors)
    return found


def attention() -> Figures:
    shapes = {
        "4,096 tokens, causal, D=128, 32/8 heads": (dict(B=4, T=4096, S=4096, N=32, K=8, H=128), True, None),
        "4,096 tokens, packed by four": (dict(B=4, T=4096, S=4096, N=32, K=8, H=128), True, 4),
        "2,704 patches, D=96": (dict(B=8, T=2704, S=2704, N=16, K=16, H=96), False, None),
        "1,296 patches, D=96": (dict(B=32, T=1296, S=1296, N=16, K=16, H=96), False, None),
    }
    found: Figures = {}
    for name, (shape, causal, segments) in shapes.items():
        if DRY:
            shape = dict(B=1, T=64, S=64, N=4, K=2, H=16)
        q, k, v = arrays(**shape)
        B, T, N, H = q.shape
        ids = None if segments is None else packed(B, T, segments)
        length = T // (segments or 1)
        pairs = B * (segments or 1) * (length * (length + 1) / 2 if causal else length * length)
        flops = {"forward": 4 * N * H * pairs, "forward and backward": 14 * N * H * pairs}

        def library(q, k, v, causal=causal):
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=None if DRY else "cudnn")

        def route(q, k, v, which, causal=causal, ids=ids):
            return flash_attention(q, k, v, causal=causal, q_segment_ids_BT=ids, implementation=which)

        sides: dict[str, Callable[..., jax.Array]] = {"ours, xla": partial(route, which="xla")}
        if not DRY:
            sides["ours, gpu"] = partial(route, which="gpu")
        if segments is None:
            sides["cuDNN by JAX"] = library
        rows: Figures = {}
        for side, forward in sides.items():

            def both(q, k, v, forward=forward):
                return jax.grad(lambda *x: jnp.sum(forward(*x).astype(jnp.float32)), (0, 1, 2))(q, k, v)

            rows[side] = rates(flops, {"forward": jax.jit(forward), "forward and backward": jax.jit(both)}, q, k, v)
        if segments is None:
            rows["PyTorch"] = torch_attention(shape, causal, flops)
        found[name] = rows
    return found


def rates(flops: dict[str, float], calls: dict[str, Callable[..., Any]], *args: Any) -> Figures:
    """TFLOP/s by pass; what fails (as for want of memory) is told instead."""
    figures: Figures = {}
    for name, call in calls.items():
        try:
            figures[name] = round(flops[name] / seconds(call, *args) / 1e12, 1)
        except Exception as error:  # noqa: BLE001 - the next side is to be measured all the same
            figures[name] = f"{type(error).__name__}: {str(error)[:160]}"
    return figures


def torch_attention(shape: dict[str, int], causal: bool, flops: dict[str, float]) -> Figures:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {"not installed": True}
    device = "cpu" if DRY else "cuda"
    B, T, N, K, H = (shape[name] for name in "BTNKH")
    q, k, v = (
        torch.randn(B, heads, T, H, device=device, dtype=torch.bfloat16, requires_grad=True) for heads in (N, K, K)
    )

    def run(backward: bool) -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=N != K)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))
        if not DRY:
            torch.cuda.synchronize()

    return rates(flops, {"forward": partial(run, False), "forward and backward": partial(run, True)})


def train() -> Figures:
    """The text part of the recipe's step, since its time is the decoder's; the vision part is a stub of one layer."""
    from stepjax.chips import peak_flops
    from stepjax.models.flops import decoder_flops
    from stepjax.models.step_vl import abstract_model, init_model
    from stepjax.training.optimizer import learning_rate, make_optimizer
    from stepjax.training.step import make_train_step, new_state

    side, rows, tokens = 56, 2 if DRY else 4, 64 if DRY else 4096
    decoder = dataclasses.replace(DECODER, num_layers=2 if DRY else 8)
    found: Figures = {}
    for which in ("xla",) if DRY else ("gpu", "xla"):
        config = PretrainConfig(
            name="gpu",
            model=ModelConfig(
                vision=VisionConfig(width=64, num_layers=1, num_heads=2, mlp_dim=64, position_grid=side // 14),
                decoder=decoder,
            ),
            images=ImageConfig(global_size=side, crop_size=side),
            data=DataConfig(sources=(DigitsSource(name="text", weight=1.0, task="transcribe"),)),
            batch=BatchConfig(rows=rows, tokens=tokens, global_views=0, crops=0),
            schedule=ScheduleConfig(phases=(Phase(tokens=1e12, start=1e-4, end=1e-5),)),
            numerics=NumericsConfig(attention=which, loss_chunk=64 if DRY else 2048),
        )
        schedule = learning_rate(config.schedule, config.tokens_per_step)
        optimizer = make_optimizer(config.optimizer, schedule, abstract_model(config.model, config.numerics))
        step = jax.jit(make_train_step(config, optimizer, schedule), donate_argnums=0)
        model = init_model(config.model, config.numerics)
        state = jax.jit(partial(new_state, optimizer=optimizer), donate_argnums=0)(model)
        del model
        shape = (rows, tokens)
        batch = {
            "tokens_BT": jnp.asarray(np.random.default_rng(0).integers(0, decoder.vocab_size, shape), jnp.int32),
            "segment_ids_BT": jnp.ones(shape, jnp.int32),
            "positions_BT": jnp.tile(jnp.arange(tokens, dtype=jnp.int32), (rows, 1)),
            "loss_weights_BT": jnp.ones(shape, jnp.float32).at[:, 0].set(0),
            "feature_index_BT": jnp.full(shape, -1, jnp.int32),
            "group_BT": jnp.zeros(shape, jnp.int32),
            "global_views_BGHWC": jnp.zeros((rows, 0, side, side, 3), jnp.bfloat16),
            "crops_BCHWC": jnp.zeros((rows, 0, side, side, 3), jnp.bfloat16),
        }
        times, losses = [], []
        try:
            for i in range(6):
                start = time.perf_counter()
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
                if i:
                    times.append(time.perf_counter() - start)
        except Exception as error:  # noqa: BLE001 - such as out of memory; the other route is to be measured
            found[which] = f"{type(error).__name__}: {str(error)[:160]}"
            continue
        finally:
            del state
        each, peak = statistics.median(times), peak_flops(jax.devices()[0])
        useful = 3 * decoder_flops(decoder, rows * tokens, rows * tokens * (tokens + 1) / 2)
        found[which] = {
            "step_seconds": each,
            "tokens_per_second": rows * tokens / each,
            "mfu": peak and useful / each / peak,
            "losses": losses,
        }
    return {"layers": decoder.num_layers, "rows": rows, "tokens": tokens, "attention": found}


def decoder_model() -> Any:
    from flax import nnx

    from stepjax.models.qwen3 import Qwen3

    numerics = NumericsConfig(param_dtype="bfloat16", remat="none")

    def make(key):
        model = Qwen3(DECODER, numerics, rngs=nnx.Rngs(key))
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)

    return jax.jit(make)(jax.random.key(0))


def weight_bytes(model: Any) -> int:
    embedding = model.embedding[...].nbytes  # a step reads only one row per token
    return sum(x.nbytes for x in jax.tree.leaves(model)) - embedding


def timed_answers(engine: Any, prompts: list[list[int]], n: int, answer: int) -> tuple[float, int]:
    """Seconds from when every sample has its first token to the last token, and the tokens drawn in that time."""
    from stepjax.inference.request import SamplingParams

    for i, prompt in enumerate(prompts):
        engine.submit(prompt, SamplingParams(max_tokens=answer, ignore_eos=True, n=n, seed=i))
    begun: set[tuple[str, int]] = set()
    started, drawn = None, 0
    while engine.has_work:
        deltas = engine.step()
        if started is not None:
            drawn += sum(len(delta.tokens) for delta in deltas)
        begun |= {(delta.request_id, delta.sample) for delta in deltas if delta.tokens}
        if started is None and len(begun) == n * len(prompts):
            started = time.perf_counter()
    assert started is not None and drawn, "the answers ended before all had begun"
    return time.perf_counter() - started, drawn


def decode() -> Figures:
    from stepjax.inference.config import EngineConfig
    from stepjax.inference.engine import Engine

    model, found = decoder_model(), {}
    kind = jax.devices()[0].device_kind
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if kind.startswith(name)), None)
    prompt, answer = (16, 16) if DRY else (128, 129)
    rng = np.random.default_rng(0)
    for batch in (1, 4) if DRY else (1, 16, 64):
        context = -(-(prompt + answer) // 64) * 64
        config = EngineConfig(
            max_sequences=batch, smallest_batch=batch, max_context=context, decode_steps=8, prefix_caching=False
        )
        engine = Engine(model, None, config)
        taken, drawn = 0.0, 0
        for _ in range(2):  # the first compiles
            prompts = rng.integers(0, DECODER.vocab_size, (batch, prompt)).tolist()
            taken, drawn = timed_answers(engine, prompts, 1, answer)
        steps = drawn / batch / taken
        found[str(batch)] = {
            "tokens_per_second": drawn / taken,
            "share_of_bandwidth": bandwidth and steps * weight_bytes(model) / bandwidth,
        }
        del engine
    return {"prompt": prompt, "answer": answer, "batch": found}


def shared() -> Figures:
    from stepjax.inference.config import EngineConfig
    from stepjax.inference.engine import Engine

    model, found = decoder_model(), {}
    answer = 17 if DRY else 65
    rng = np.random.default_rng(0)
    for prefix in (64,) if DRY else (2048, 8192, 32_768):
        context = -(-(prefix + answer + 64) // 64) * 64
        for samples in (4,) if DRY else (4, 16, 32):
            if prefix * samples > 32_768 * 8:
                continue  # the independent side would not fit
            config = EngineConfig(
                max_sequences=samples,
                smallest_batch=samples,
                max_context=context,
                decode_steps=8,
                prefill_tokens=2048,
                prefix_caching=False,
            )
            engine, figures = Engine(model, None, config), {}
            for side, count, n in (("shared", 1, samples), ("independent", samples, 1)):
                taken, drawn = 0.0, 0
                for _ in range(2):
                    prompts = rng.integers(0, DECODER.vocab_size, (count, prefix)).tolist()
                    taken, drawn = timed_answers(engine, prompts, n, answer)
                figures[side] = drawn / taken
            found[f"prefix {prefix}, K={samples}"] = figures | {"ratio": figures["shared"] / figures["independent"]}
            tell("shared", {"answer": answer, "tokens_per_second": found})
            del engine
    return {"answer": answer, "tokens_per_second": found}


def demo() -> Figures:
    with tempfile.TemporaryDirectory() as out:
        tokens = "20000" if DRY else "400000"
        command = [sys.executable, "-m", "stepjax.cli", "pretrain", "configs/digits/pretrain.py", "--out", out]
        command += ["--schedule.phases.0.tokens", tokens, "--schedule.phases.1.tokens", "2048"]
        command += ["--schedule.warmup-tokens", "10000", "--evaluation.examples", "20", "--logging.every", "20"]
        started = time.monotonic()
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path()}, capture_output=True, text=True
        )
        rows = Path(out, "digits", "metrics.jsonl")
        last = (
            [json.loads(line) for line in rows.read_text().splitlines() if "speed" in line][-1:]
            if rows.exists()
            else []
        )
        return {
            "status": ended.returncode,
            "seconds": time.monotonic() - started,
            "speed": {key: value for row in last for key, value in row.items() if key.startswith("speed/")},
            "end_of_output": (ended.stdout + ended.stderr)[-600:] if ended.returncode else "",
        }


def tell(stage: str, found: Figures) -> None:
    """One line with the figures so far; the last one counts."""
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "platform": device.platform, stage: found}), flush=True)


STAGES: dict[str, Callable[[], Figures]] = {
    "numerics": numerics,
    "attention": attention,
    "train": train,
    "decode": decode,
    "shared": shared,
    "demo": demo,
}


def path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=480, help="total time; no stage starts or runs after it")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        tell(args.stage, STAGES[args.stage]())
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ | {"PYTHONPATH": path()}
    if args.dry:
        environment |= {"STEPJAX_GPU_DRY": "1", "JAX_PLATFORMS": "cpu"}
    began, failed = time.monotonic(), 0
    for stage in args.only:
        left = args.seconds - (time.monotonic() - began)
        if left < 10:
            print(f"{stage}: no time left", flush=True)
            failed += 1
            continue
        started = time.monotonic()
        try:
            run = subprocess.run(
                [sys.executable, __file__, "--stage", stage],
                env=environment,
                capture_output=True,
                text=True,
                timeout=left,
            )
            figures = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"failed": run.stderr[-3000:]}
        except subprocess.TimeoutExpired as error:  # what the stage has told so far is kept
            told = [line for line in (error.stdout or b"").decode().splitlines(keepends=True) if line.endswith("\n")]
            figures = (json.loads(told[-1]) if told else {}) | {"failed": f"not done after {left:.0f} s"}
        failed += "failed" in figures
        figures = {"machine": machine.describe(), **figures, "stage_seconds": round(time.monotonic() - started, 1)}
        (args.out / f"gpu_{stage}.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{stage}: {json.dumps({k: v for k, v in figures.items() if k != 'machine'})}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
