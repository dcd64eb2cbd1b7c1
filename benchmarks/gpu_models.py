"""The models' stages of gpu.py: a train step, decoding, samples that share a prompt, the demo."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu import DRY, ROOT, Figures, run_stage, tell

from stepjax.chips import peak_flops
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
TINY = DecoderConfig(
    vocab_size=512, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_positions=1024
)
DECODER = TINY if DRY else DecoderConfig(max_positions=40_960)


# Training ------------------------------------------------------------------------------------------------------------


def train_config(layers: int, rows: int, tokens: int) -> PretrainConfig:
    """The text part of the recipe's step, since its time is the decoder's; the vision part is a stub of one layer."""
    side = 56
    return PretrainConfig(
        name="gpu",
        model=ModelConfig(
            vision=VisionConfig(width=64, num_layers=1, num_heads=2, mlp_dim=64, position_grid=side // 14),
            decoder=dataclasses.replace(DECODER, num_layers=layers),
        ),
        images=ImageConfig(global_size=side, crop_size=side),
        data=DataConfig(sources=(DigitsSource(name="text", weight=1.0, task="transcribe"),)),
        batch=BatchConfig(rows=rows, tokens=tokens, global_views=0, crops=0),
        schedule=ScheduleConfig(phases=(Phase(tokens=1e12, start=1e-4, end=1e-5),)),
        numerics=NumericsConfig(remat="attention", loss_chunk=64 if DRY else 2048),
    )


def train_batch(config: PretrainConfig, segments: int) -> dict[str, jax.Array]:
    shape = rows, tokens = config.batch.rows, config.batch.tokens
    side, length = config.images.crop_size, tokens // segments
    place = np.arange(tokens)
    weights = np.tile((place % length != 0).astype(np.float32), (rows, 1))
    ids = np.random.default_rng(0).integers(0, config.model.decoder.vocab_size, shape)
    batch = {
        "tokens_BT": ids.astype(np.int32),
        "segment_ids_BT": np.tile((1 + place // length).astype(np.int32), (rows, 1)),
        "positions_BT": np.tile((place % length).astype(np.int32), (rows, 1)),
        "loss_weights_BT": weights,
        "feature_index_BT": np.full(shape, -1, np.int32),
        "group_BT": np.zeros(shape, np.int32),
        "global_views_BGHWC": np.zeros((rows, 0, side, side, 3), jnp.bfloat16),
        "crops_BCHWC": np.zeros((rows, 0, side, side, 3), jnp.bfloat16),
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}


def layers_that_fit(rows: int, tokens: int) -> int:
    """By the prediction that `stepjax plan` makes; 5 % stay free."""
    from stepjax.training.footprint import GIB, predict_memory

    limit = 0.95 * (jax.devices()[0].memory_stats() or {})["bytes_limit"] / GIB
    few, more = (predict_memory(train_config(n, rows, tokens), 1).total for n in (4, 8))
    return max(1, min(DECODER.num_layers, int(4 + (limit - few) / ((more - few) / 4))))


def train() -> None:
    """One compiled step, on rows of one example and on rows of four."""
    rows, tokens = (2, 64) if DRY else (4, 4096)
    layers = 2 if DRY else layers_that_fit(rows, tokens)
    found: Figures = {"rows": rows, "tokens": tokens, "tried": []}
    while layers > 0:
        found |= {"layers": layers}
        try:
            train_steps(train_config(layers, rows, tokens), found)
            return
        except jax.errors.JaxRuntimeError as error:  # out of memory: the prediction was too low
            found["tried"].append(f"{layers} layers: {str(error)[:160]}")
            tell(found)
        layers = layers * 4 // 5
    raise AssertionError("no number of layers fits")


def train_steps(config: PretrainConfig, found: Figures) -> None:
    from stepjax.models.flops import decoder_flops
    from stepjax.models.step_vl import abstract_model, init_model
    from stepjax.training.optimizer import learning_rate, make_optimizer
    from stepjax.training.step import make_train_step, new_state

    rows, tokens = config.batch.rows, config.batch.tokens
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_model(config.model, config.numerics))
    step = jax.jit(make_train_step(config, optimizer, schedule), donate_argnums=0)
    model = init_model(config.model, config.numerics)
    state = jax.jit(partial(new_state, optimizer=optimizer), donate_argnums=0)(model)
    del model
    for segments in (1, 4):
        batch, times, losses = train_batch(config, segments), [], []
        for i in range(5):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if i > 1:
                times.append(time.perf_counter() - began)
        assert np.isfinite(losses).all(), f"losses {losses}"
        each, peak = statistics.median(times), peak_flops(jax.devices()[0])
        length = tokens // segments
        useful = 3 * decoder_flops(config.model.decoder, rows * tokens, rows * segments * length * (length + 1) / 2)
        found[f"examples of {length} tokens"] = {
            "step_seconds": each,
            "tokens_per_second": rows * tokens / each,
            "mfu": peak and useful / each / peak,
            "losses": losses,
        }
        found["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        tell(found)


# Decoding ------------------------------------------------------------------------------------------------------------


def decoder_model() -> Any:
    from flax import nnx

    from stepjax.models.qwen3 import Qwen3
    from stepjax.models.serving_decoder import serving_decoder

    numerics = NumericsConfig(param_dtype="bfloat16", remat="none")

    def make(key):
        model = Qwen3(DECODER, numerics, rngs=nnx.Rngs(key))
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)

    # The engine takes this layout as it is, so that the weights are not on the GPU twice.
    return serving_decoder(jax.jit(make)(jax.random.key(0)), None, donate=True)


def engine_without_prefill(model: Any, config: Any) -> Any:
    """Decoding takes the same time over the zeros of an empty cache, and nothing waits for prefill to be compiled."""
    from stepjax.inference import programs
    from stepjax.inference.engine import Engine

    programs.prefill = lambda model, pool_S2KTW, *args, **kwargs: pool_S2KTW  # type: ignore
    return Engine(model, None, config)


def weight_bytes(model: Any) -> int:
    embedding = model.embedding[...].nbytes  # a step reads only one row per token
    return sum(x.nbytes for x in jax.tree.leaves(model)) - embedding


def tokens_per_second(engine: Any, prompts: list[list[int]], n: int, answer: int, most: float = 1e9) -> float:
    """Of decoding alone: from when every sample has its first tokens, for `most` seconds at most, one call at least."""
    from stepjax.inference.request import SamplingParams

    requests = [
        engine.submit(prompt, SamplingParams(max_tokens=answer, ignore_eos=True, n=n, seed=i))
        for i, prompt in enumerate(prompts)
    ]
    begun: set[tuple[str, int]] = set()
    started, ended, drawn = None, 0.0, 0
    while engine.has_work:
        deltas = engine.step()
        if started is not None:
            drawn += sum(len(delta.tokens) for delta in deltas)
            ended = time.perf_counter()
            if ended - started > most:
                break
        begun |= {(delta.request_id, delta.sample) for delta in deltas if delta.tokens}
        if started is None and len(begun) == n * len(prompts):
            started = time.perf_counter()
    for request in requests:
        engine.cancel(request)
    assert started is not None and drawn, "the answers ended before all had begun"
    return drawn / (ended - started)


def decode() -> None:
    """One engine, and a compiled program for each number of sequences."""
    from stepjax.inference.config import EngineConfig

    model = decoder_model()
    kind = jax.devices()[0].device_kind
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if kind.startswith(name)), None)
    prompt, answer = (16, 25) if DRY else (128, 97)
    batches = (1, 4) if DRY else (1, 16, 64)
    context = -(-(prompt + answer) // 64) * 64
    config = EngineConfig(max_sequences=batches[-1], max_context=context, decode_steps=8, prefix_caching=False)
    engine = engine_without_prefill(model, config)
    found: Figures = {"prompt": prompt, "answer": answer, "weight_bytes": weight_bytes(model), "batch": {}}
    rng = np.random.default_rng(0)
    for batch in batches:
        rates, began = [], time.perf_counter()
        for i in range(4):  # the first compiles
            prompts = rng.integers(0, DECODER.vocab_size, (batch, prompt)).tolist()
            rates.append(tokens_per_second(engine, prompts, 1, answer))
            if i == 0:
                first = time.perf_counter() - began
        rate = statistics.median(rates[1:])
        found["batch"][str(batch)] = {
            "tokens_per_second": rate,
            "share_of_bandwidth": bandwidth and rate / batch * weight_bytes(model) / bandwidth,
            "first_call_seconds": first,
        }
        tell(found)


def shared() -> None:
    """One engine and one compiled program per batch size. Independent prompts are as many as the cache holds."""
    from stepjax.inference.config import EngineConfig
    from stepjax.inference.engine import Engine

    model = decoder_model()
    prefixes, counts = ((64, 128), (4,)) if DRY else ((2048, 8192, 32_768), (4, 16, 32))
    steps, answer, page = 4, 41, 64
    context = prefixes[-1] + page
    found: Figures = {"decode_steps": steps, "tried": [], "tokens_per_second": {}}
    rng = np.random.default_rng(0)

    def rate(engine: Engine, prefix: int, prompts: int, samples: int, most: float) -> float:
        tokens = rng.integers(0, DECODER.vocab_size, (prompts, prefix)).tolist()
        return tokens_per_second(engine, tokens, samples, answer, most)

    def measure(tokens: int) -> None:
        config = EngineConfig(
            max_sequences=counts[-1],
            smallest_batch=counts[0],
            max_context=context,
            cache_tokens=tokens,
            page_size=page,
            prefill_tokens=2 * counts[-1] * context,  # all prompts at once
            max_prefix_groups=1,
            decode_steps=steps,
            prefix_caching=False,
        )
        engine = engine_without_prefill(model, config)
        found["cache_tokens"] = tokens
        for samples in counts:
            rate(engine, prefixes[0], 1, samples, 0.0)  # compiles
        for prefix in prefixes:
            # Every sequence needs the pages of its prompt and answer; the scheduler keeps one in reserve for each.
            fit = tokens // (-(-(prefix + answer) // page) * page + page)
            for samples in counts:
                independent = min(samples, fit)
                together = rate(engine, prefix, 1, samples, 3.0)
                alone = rate(engine, prefix, independent, 1, 3.0)
                found["tokens_per_second"][f"prefix {prefix}, K={samples}"] = {
                    "shared": together,
                    "independent": alone,
                    "independent sequences": independent,
                    "ratio": together / alone,
                }
                tell(found)

    tokens = cache_tokens(model, counts[-1] * (context + page))
    while tokens > context:
        try:
            measure(tokens)
            return
        except jax.errors.JaxRuntimeError as error:  # out of memory: the program needs more beside the cache
            found["tried"].append(f"{tokens} tokens of cache: {str(error)[:160]}")
            tell(found)
        tokens = tokens // 2 // page * page
    raise AssertionError("no cache fits")


def cache_tokens(model: Any, wanted: int) -> int:
    """As many of the wanted tokens as the memory that is left holds; a tenth stays free."""
    stats = jax.devices()[0].memory_stats()
    if not stats:
        return wanted
    config = model.config
    each = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
    free = 0.9 * stats["bytes_limit"] - stats["bytes_in_use"]
    return min(wanted, int(free / each) // 64 * 64)


# The demo ------------------------------------------------------------------------------------------------------------


DEMO = """
import dataclasses
from configs.digits.pretrain import config as whole
from stepjax.config import EvaluationConfig
config = dataclasses.replace(whole, evaluation=EvaluationConfig())
"""


def demo() -> None:
    """Training alone: evaluation would compile the engine."""
    with tempfile.TemporaryDirectory() as out:
        tokens, logging = ("4000", "1") if DRY else ("400000", "20")
        recipe = Path(out, "recipe.py")
        recipe.write_text(DEMO)
        command = [sys.executable, "-m", "stepjax.cli", "pretrain", str(recipe), "--out", out]
        command += ["--schedule.phases.0.tokens", tokens, "--schedule.phases.1.tokens", "2048"]
        command += ["--schedule.warmup-tokens", "2000", "--logging.every", logging]
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            rows = Path(out, "digits", "metrics.jsonl")
            if rows.exists():
                told = [
                    json.loads(row) for row in rows.read_text().splitlines() if "speed/" in row and row.endswith("}")
                ]
                last = {key: value for row in told[-1:] for key, value in row.items() if key.startswith("speed/")}
                tell({"seconds": time.monotonic() - began, "speed": last})
        if process.wait():
            raise RuntimeError("".join(lines)[-2500:])


if __name__ == "__main__":
    run_stage({"train": train, "decode": decode, "shared": shared, "demo": demo})
