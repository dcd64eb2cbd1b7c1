"""Decoding SmolLM2-135M: our engine, Transformers' `generate` and llama.cpp; samples that share a prompt.

    python benchmarks/decode.py [--model DIR] [--repeats 3]

Needs the weights from `benchmarks/smollm2.py` (`make .venv-parity/installed`), and includes llama.cpp if
llama-cpp-python is installed. All sides use the same float32 weights and the same cores in one run with interleaved
turns; every figure is a median. The script turns on large pages for malloc, which help JAX on CPU.

    one, sixteen   tokens/s of 1 and of 16 requests at once, prompts of 100 tokens and answers of 64, greedy, from the
                   first prompt token to the last token drawn. Transformers takes the sixteen as one padded batch,
                   llama.cpp sequentially, because llama-cpp-python does not batch requests.
    shared         16 samples of one prompt of 2,048 tokens, 32 tokens each, against 16 requests with 16 prompts:
                   tokens/s, and the peak number of cache pages.

Writes results/decode.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import machine
import numpy as np
import smollm2

import stepjax
from stepjax.config import NumericsConfig
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.request import SamplingParams

PROMPT, ANSWER = 100, 64
SHARED_PROMPT, SHARED_ANSWER, SAMPLES = 2048, 32, 16
PAGE = 64
FLOAT32 = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none")
Generate = Callable[[list[list[int]], int], int]  # prompts and tokens of an answer -> tokens drawn


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Distinct prompts of ordinary tokens."""
    return np.random.default_rng(seed).integers(100, 40_000, (count, length)).tolist()


def stepjax_side(directory: Path) -> Generate:
    model, processor = stepjax.load(directory, numerics=FLOAT32)
    context = -(-(PROMPT + ANSWER) // PAGE) * PAGE
    config = EngineConfig(max_sequences=16, max_context=context, page_size=PAGE, prefix_caching=False)
    engine = Engine(model, processor, config)

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


def beside(sides: dict[str, Generate], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens per second of every side, for one request and for sixteen."""
    figures: dict[str, dict[str, float]] = {}
    for label, count in (("one", 1), ("sixteen", 16)):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for generate in sides.values():
            generate(prompts(count, PROMPT, seed=0), 4)  # compiles
        for repeat in range(repeats):
            for name, generate in sides.items():
                asked = prompts(count, PROMPT, seed=1 + repeat)
                began = time.perf_counter()
                drawn = generate(asked, ANSWER)
                seconds[name].append(time.perf_counter() - began)
                assert drawn == count * ANSWER, f"{name} drew {drawn} tokens"
        figures[label] = {name: count * ANSWER / statistics.median(taken) for name, taken in seconds.items()}
    return figures


def shared(directory: Path, repeats: int) -> dict[str, Any]:
    """16 samples of one prompt, and one sample each of 16 prompts, on one engine in turns."""
    model, processor = stepjax.load(directory, numerics=FLOAT32)
    context = -(-(SHARED_PROMPT + SHARED_ANSWER) // PAGE) * PAGE
    config = EngineConfig(max_sequences=SAMPLES, max_context=context, page_size=PAGE, prefix_caching=False)
    engine = Engine(model, processor, config)
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
    options = parser.parse_args()
    directory = smollm2.smollm2(options.model)

    sides = {"stepjax": stepjax_side(directory), "transformers": transformers_side(directory)}
    llama = llama_cpp_side(directory)
    if llama is not None:
        sides["llama.cpp"] = llama
    figures = beside(sides, options.repeats)
    print(f"{'tokens/s':<24}" + "".join(f"{name:>14}" for name in sides))
    for label, by_side in figures.items():
        print(f"{label + ' at once':<24}" + "".join(f"{by_side[name]:>14.1f}" for name in sides))
    if llama is None:
        print("llama.cpp: llama-cpp-python is not installed")

    ways = shared(directory, options.repeats)
    few, many = ways["samples of one prompt"], ways["independent requests"]
    ratio = few["tokens_per_second"] / many["tokens_per_second"]
    print(f"\n{SAMPLES} answers of {SHARED_ANSWER} tokens to {SHARED_PROMPT:,} tokens")
    for name, way in ways.items():
        print(f"{name:<24}{way['tokens_per_second']:>8.1f} tokens/s, {way['pages_held']:>4} pages of {PAGE} tokens")
    print(f"ratio: {ratio:.1f}")
    packages = ("torch", "transformers", "llama-cpp-python")
    path = machine.write(
        "decode",
        {
            "versions": {package: machine.version(package) for package in packages},
            "prompt_tokens": PROMPT,
            "answer_tokens": ANSWER,
            "tokens_per_second": figures,
            "shared_prompt_tokens": SHARED_PROMPT,
            "shared_answer_tokens": SHARED_ANSWER,
            "page_tokens": PAGE,
            "shared": ways,
            "shared_ratio": ratio,
        },
    )
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
