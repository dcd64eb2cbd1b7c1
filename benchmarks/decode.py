"""Decoding SmolLM2-135M: our engine, Transformers' `generate` and llama.cpp; samples that share a prompt.

    python benchmarks/decode.py [--model DIR] [--repeats 3] [--answer 64] [--requests 1 16] [--part sides ...]

Needs the weights from `benchmarks/smollm2.py` (`make .venv-parity/installed`), and includes llama.cpp if
llama-cpp-python is installed. All sides use the same weights and the same cores in one run with interleaved turns;
every figure is a median. The script turns on large pages for malloc, which help JAX on CPU. Each part replaces its own
figures in results/decode.json, so that a short quiet window suffices for one.

    sides      tokens/s of 1 and of 16 requests at once, prompts of 32 tokens, greedy, all float32: whole requests, and
               decoding alone (the time that tokens after the first four add). "int8" is our engine with
               `EngineConfig(weights="int8")`. Transformers takes the sixteen as one padded batch; llama-cpp-python does
               not batch requests. Also the bytes of weights that one request reads a second, against two threads that
               read memory.
    accuracy   int8 weights against float32, on answers that float32 samples: perplexity, how often the likeliest token
               is the same, the mean absolute difference of the log-probabilities.
    shared     16 samples of one prompt of 2,048 tokens, 32 tokens each, against 16 requests with 16 prompts: tokens/s,
               and the peak number of cache pages.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import machine
import numpy as np
import smollm2

import stepjax
from stepjax.config import NumericsConfig
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams
from stepjax.sharding import parameter_name

PROMPT = 32
SHARED_PROMPT, SHARED_ANSWER, SAMPLES = 2048, 32, 16
PAGE = 64
FLOAT32 = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none")
# Contracted dimensions of the kernels.
INPUTS = {
    "q_kernel": 1,
    "k_kernel": 1,
    "v_kernel": 1,
    "gate_kernel": 1,
    "up_kernel": 1,
    "down_kernel": 1,
    "embedding": 1,
    "out_kernel": (1, 2),
}
Generate = Callable[[list[list[int]], int], int]  # prompts and tokens of an answer -> tokens drawn


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Distinct prompts of ordinary tokens."""
    return np.random.default_rng(seed).integers(100, 40_000, (count, length)).tolist()


def stepjax_side(directory: Path, weights: Literal["int8"] | None = None) -> Generate:
    model, processor = stepjax.load(directory, numerics=FLOAT32)
    context = 4 * PAGE
    config = EngineConfig(max_sequences=16, max_context=context, page_size=PAGE, prefix_caching=False, weights=weights)
    engine = Engine(model, processor, config, donate=True)

    def generate(prompts: list[list[int]], answer: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
        return sum(len(completion.tokens) for (completion,) in engine.generate(prompts, params))

    return generate


def transformers_side(directory: Path) -> Generate:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def generate(prompts: list[list[int]], answer: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=answer,
                min_new_tokens=answer,
                pad_token_id=0,
            )
        return out.numel() - ids.numel()

    return generate


def llama_cpp_side(directory: Path) -> Generate | None:
    """None if llama-cpp-python is not installed."""
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    model = llama_cpp.Llama(str(gguf_float32(directory)), n_ctx=512, n_threads=2, n_batch=512, verbose=False)

    def generate(prompts: list[list[int]], answer: int) -> int:
        drawn = 0
        for prompt in prompts:
            model.reset()
            for i, _ in enumerate(model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)):
                drawn += 1
                if i + 1 == answer:
                    break
        return drawn

    return generate


def gguf_float32(directory: Path) -> Path:
    """The same float32 weights as a GGUF file, with llama.cpp's names and head order."""
    import gguf  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import load_file

    path = directory / "float32.gguf"
    if path.exists():
        return path
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"[unused{i}]" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for key, tensor in load_file(directory / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in key:  # llama.cpp rotates adjacent pairs, the public layout halves
                rows, width = tensor.shape
                tensor = tensor.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def beside(
    sides: dict[str, Generate], counts: list[int], repeats: int, answer: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Tokens per second of every side, for each number of requests: of whole requests, and of decoding alone, which
    is what tokens after the first four take.
    """
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for count in counts:
        label = {1: "one", 16: "sixteen"}[count]
        here = {name: side for name, side in sides.items() if count == 1 or name != "llama.cpp"}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in here}
        for generate in here.values():
            generate(prompts(count, PROMPT, seed=0), 4)  # compiles
        for repeat in range(repeats):
            for name, generate in here.items():
                asked = prompts(count, PROMPT, seed=1 + repeat)
                times = [time.perf_counter()]
                for length in (4, answer):
                    drawn = generate(asked, length)
                    assert drawn == count * length, f"{name} drew {drawn} tokens"
                    times.append(time.perf_counter())
                whole = times[2] - times[1]
                taken[name].append((whole, whole - (times[1] - times[0])))
        medians = {name: [statistics.median(of) for of in zip(*pairs, strict=True)] for name, pairs in taken.items()}
        figures[label] = {
            "whole": {name: count * answer / whole for name, (whole, _) in medians.items()},
            "decoding": {name: count * (answer - 4) / alone for name, (_, alone) in medians.items()},
        }
    return figures


def memory_bandwidth(threads: int = 2, size: int = 2**28) -> float:
    """Bytes per second at which threads of numpy read memory together, the best of five."""
    parts = np.ones(threads * size // 8).reshape(threads, -1)
    best = float("inf")
    for _ in range(5):
        workers = [threading.Thread(target=part.sum) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - began)
    return parts.nbytes / best


def accuracy(directory: Path, length: int = 512) -> dict[str, float]:
    """int8 weights against float32, on the first tokens of docs/inference.md."""
    model, processor = stepjax.load(directory, numerics=FLOAT32)
    text = (Path(__file__).parents[1] / "docs" / "inference.md").read_text()
    tokens_1T = np.asarray(processor.encode(text)[:length])[None]  # type: ignore  # a text processor

    @jax.jit
    def log_probs(model) -> jax.Array:
        hidden_1TD, _ = model(model.embed(tokens_1T), np.arange(length)[None])
        return jax.nn.log_softmax(model.logits(hidden_1TD)[0, :-1])

    def rounded(path, kernel: jax.Array) -> jax.Array:
        inputs = INPUTS.get(parameter_name(path).rsplit("/", 1)[-1])
        if inputs is None:
            return kernel
        step = jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True) / 127
        return jnp.round(kernel / step) * step

    exact_TV = np.asarray(log_probs(model))
    int8_TV = np.asarray(log_probs(jax.tree_util.tree_map_with_path(rounded, model)))
    next_T1 = tokens_1T[0, 1:, None]
    exact_T, int8_T = (np.take_along_axis(x, next_T1, axis=1)[:, 0] for x in (exact_TV, int8_TV))
    return {
        "tokens": length - 1,
        "perplexity_float32": float(np.exp(-exact_T.mean())),
        "perplexity_int8": float(np.exp(-int8_T.mean())),
        "same_likeliest_token": float((exact_TV.argmax(1) == int8_TV.argmax(1)).mean()),
        "mean_log_prob_difference": float(np.abs(exact_T - int8_T).mean()),
    }


def shared(directory: Path, repeats: int) -> dict[str, Any]:
    """16 samples of one prompt, and one sample each of 16 prompts, on one engine in turns."""
    model, processor = stepjax.load(directory, numerics=FLOAT32)
    context = -(-(SHARED_PROMPT + SHARED_ANSWER) // PAGE) * PAGE
    config = EngineConfig(max_sequences=SAMPLES, max_context=context, page_size=PAGE, prefix_caching=False)
    engine = Engine(model, processor, config, donate=True)
    ways = {
        "samples of one prompt": (1, SamplingParams(n=SAMPLES, seed=0, max_tokens=SHARED_ANSWER, ignore_eos=True)),
        "independent requests": (SAMPLES, SamplingParams(seed=0, max_tokens=SHARED_ANSWER, ignore_eos=True)),
    }

    def run(count: int, params: SamplingParams, seed: int) -> tuple[float, int]:
        for prompt in prompts(count, SHARED_PROMPT, seed):
            engine.submit(prompt, params)
        began, pages = time.perf_counter(), 0
        while engine.has_work:
            engine.step()
            pages = max(pages, engine.stats().pages_used)
        return time.perf_counter() - began, pages

    for _, params in ways.values():  # compiles, with short prompts
        for prompt in prompts(SAMPLES // params.n, 70, 0):
            engine.submit(prompt, params)
        while engine.has_work:
            engine.step()
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, (count, params) in ways.items():
            taken[name].append(run(count, params, repeat))
    return {
        name: {
            "tokens_per_second": SAMPLES * SHARED_ANSWER / statistics.median(seconds for seconds, _ in runs),
            "pages_held": max(pages for _, pages in runs),
        }
        for name, runs in taken.items()
    }


def main() -> None:
    if "GLIBC_TUNABLES" not in os.environ:  # read when a process starts
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=smollm2.DIRECTORY, help="the weights; fetched if missing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, nargs="+", choices=(1, 16), default=[1, 16], help="for sides")
    parser.add_argument("--part", choices=("sides", "accuracy", "shared"), nargs="+", help="all by default")
    options = parser.parse_args()
    directory = smollm2.smollm2(options.model)
    wanted = options.part or ("sides", "accuracy", "shared")
    path = machine.RESULTS / "decode.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if "sides" in wanted:
        found = compare(directory, options.requests, options.repeats, options.answer)
        earlier = results.get("sides", {})
        found["tokens_per_second"] = earlier.get("tokens_per_second", {}) | found["tokens_per_second"]
        results["sides"] = earlier | found
    if "accuracy" in wanted:
        results["int8_accuracy"] = accuracy(directory)
        print("int8 against float32: " + ", ".join(f"{k} {v:.4g}" for k, v in results["int8_accuracy"].items()))
    if "shared" in wanted:
        ways = shared(directory, options.repeats)
        few, many = ways["samples of one prompt"], ways["independent requests"]
        ratio = few["tokens_per_second"] / many["tokens_per_second"]
        print(f"{SAMPLES} answers of {SHARED_ANSWER} tokens to {SHARED_PROMPT:,} tokens")
        for name, way in ways.items():
            print(f"{name:<24}{way['tokens_per_second']:>8.1f} tokens/s, {way['pages_held']:>4} pages of {PAGE} tokens")
        print(f"ratio: {ratio:.1f}")
        sizes = {"prompt_tokens": SHARED_PROMPT, "answer_tokens": SHARED_ANSWER, "page_tokens": PAGE}
        results["shared"] = sizes | {"ways": ways, "ratio": ratio}
    packages = ("torch", "transformers", "llama-cpp-python")
    results["peers"] = {package: machine.version(package) for package in packages}
    results.pop("machine", None)
    path = machine.write("decode", results)
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


def compare(directory: Path, counts: list[int], repeats: int, answer: int) -> dict[str, Any]:
    """The part "sides"."""
    sides = {
        "stepjax": stepjax_side(directory),
        "stepjax int8": stepjax_side(directory, "int8"),
        "transformers": transformers_side(directory),
    }
    llama = llama_cpp_side(directory)
    if llama is not None:
        sides["llama.cpp"] = llama
    figures = beside(sides, counts, repeats, answer)
    print(f"{'tokens/s':<24}" + "".join(f"{name:>14}" for name in sides))
    for label, by_scope in figures.items():
        for scope, by_side in by_scope.items():
            cells = (f"{by_side[name]:>14.1f}" if name in by_side else f"{'-':>14}" for name in sides)
            print(f"{f'{label} at once, {scope}':<24}" + "".join(cells))
    if llama is None:
        print("llama.cpp: llama-cpp-python is not installed")
    found = {"prompt_tokens": PROMPT, "answer_tokens": answer, "tokens_per_second": figures}
    if "one" in figures:
        read = figures["one"]["decoding"]["stepjax"] * (directory / "model.safetensors").stat().st_size
        bandwidth = memory_bandwidth()
        print(f"one request reads {read / 1e9:.1f} GB/s of weights, two threads {bandwidth / 1e9:.1f} GB/s of memory")
        found |= {"weights_read_per_second": read, "memory_read_per_second": bandwidth}
    return found


if __name__ == "__main__":
    main()
