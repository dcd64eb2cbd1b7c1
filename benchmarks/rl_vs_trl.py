"""`stepjax rl` against GRPOTrainer of TRL and a plain loop of Transformers: iterations an hour, and where time goes.

    python benchmarks/rl_vs_trl.py [--long] [--size demo|small] [--prompts 16] [--samples 16] [--iterations 3]

Needs PyTorch and TRL (the extra "benchmarks"). All sides train the same text model (Qwen3, float32, the same initial
weights) on the same prompts with the same reward. No token ends an answer, so every iteration has the same work on
every side: PROMPTS x SAMPLES answers of the same length, sampled at temperature 1, trained on once in one step of
AdamW, strictly on-policy (no scoring pass, no reference model, no critic). Each side runs by itself, with all cores,
stepjax's settings of the allocator, and the micro-batch that suits it best.

stepjax is the whole command, with its metrics and page of samples. TRL has no gradient checkpointing, fused AdamW and a
key-value cache; its generation is Transformers', because vLLM is for GPUs. The plain loop does what TRL does here,
without its trainer. An iteration is timed from the end of the one before; medians of those after the warm-up.

Writes results/rl_vs_trl.json; the names of --long and --size small are added to the file's.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import machine
import rl_task

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    InitConfig,
    JsonlSource,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
)
from stepjax.config_file import load_recipe
from stepjax.post_training.config import AdvantageConfig, PolicyLossConfig, RLConfig, RolloutConfig, UpdateConfig
from stepjax.training.host import num_cores, prepare

ROOT = Path(__file__).parent.parent
ANSWER_TOKENS, WARM_UP, LEARNING_RATE = 64, 2, 1e-4
demo = load_recipe(ROOT / "configs" / "digits" / "rlvr.py", RLConfig)
DECODERS = {
    "demo": demo.model.decoder,
    "small": DecoderConfig(
        vocab_size=384,
        width=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=1536,
        max_positions=2048,
    ),
}
SIDES = ("stepjax", "trl", "transformers")
Figures = dict[str, Any]


def recipe(args: argparse.Namespace, work: Path) -> RLConfig:
    """What `stepjax rl` runs."""
    return RLConfig(
        name="stepjax",
        out=str(work),
        model=ModelConfig(vision=demo.model.vision, decoder=DECODERS[args.size], init_range=demo.model.init_range),
        init_from=InitConfig(decoder=str(work / "weights")),
        images=demo.images,
        tokenizer=demo.tokenizer,
        data=DataConfig(sources=(JsonlSource(name="sums", weight=1.0, path=str(work / "prompts.jsonl")),)),
        batch=BatchConfig(rows=args.rows, tokens=args.row_tokens, global_views=0, crops=0),
        iterations=WARM_UP + args.iterations,
        rollout=RolloutConfig(
            prompts=args.prompts,
            samples=args.samples,
            max_tokens=ANSWER_TOKENS,
            max_sequences=128,
            page_size=16,
            prefill_tokens=512,
            decode_steps=args.decode_steps,
        ),
        advantages=AdvantageConfig(estimator="grpo", whiten=False),
        loss=PolicyLossConfig(aggregation="token"),
        policy=UpdateConfig(learning_rate=LEARNING_RATE),
        optimizer=OptimizerConfig(weight_decay=0.0),
        numerics=demo.numerics,
        mesh=demo.mesh,
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=1),
        evaluation=EvaluationConfig(),
    )


def differences(ends: list[float]) -> list[float]:
    """The seconds of the timed iterations, from the times at which all ended."""
    return [after - before for before, after in itertools.pairwise(ends)][WARM_UP - 1 :]


def run_stepjax(args: argparse.Namespace, work: Path) -> Figures:
    config = recipe(args, work)
    prepare(config, config.batch.micro_rows)
    from functools import partial

    from stepjax.post_training import loop, sampling

    ends, write_page = [], loop.write_page

    def written(*args):  # the last that an iteration does
        write_page(*args)
        ends.append(time.perf_counter())

    loop.write_page = written
    sampling.SamplingParams = partial(sampling.SamplingParams, ignore_eos=True)  # pyright: ignore
    loop.reinforce(config)
    rows = [json.loads(line) for line in (work / config.name / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    tokens = args.prompts * args.samples * ANSWER_TOKENS
    assert all(row["length"] == ANSWER_TOKENS and row["trained"] * row["length"] == tokens for row in rows)
    phases = {phase: [row[f"seconds/{phase}"] for row in rows] for phase in ("sample", "update")}
    return {"seconds": differences(ends), "phases": phases, "entropy": rows[0]["entropy"]}


# PyTorch -------------------------------------------------------------------------------------------------------------


def import_torch() -> Any:
    sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]  # its wheel may not match a CPU's torch
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    return torch


def write_weights(args: argparse.Namespace, path: Path) -> None:
    """A Qwen3 model with random weights, in Transformers' layout."""
    import_torch()
    from transformers import Qwen3Config, Qwen3ForCausalLM  # pyright: ignore[reportMissingImports]

    sizes = DECODERS[args.size]
    config = Qwen3Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_positions,
        rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=sizes.tie_embeddings,
        initializer_range=sizes.width**-0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)


def load_peer(work: Path) -> tuple[Any, Any, list[str]]:
    """The model, the tokenizer and the texts of the prompts, which it turns into stepjax's tokens."""
    import_torch()
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    from stepjax.processing.processor import Processor

    file = ROOT / "stepjax" / "assets" / "demo_tokenizer" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", padding_side="left")
    processor = Processor.from_config(demo.images, demo.tokenizer)
    texts = []
    for line in (work / "prompts.jsonl").read_text().splitlines():
        ids = processor.process_prompt(json.loads(line)["messages"]).tokens.tolist()
        texts.append(processor.tokenizer.decode(ids, skip_special=False))
        assert tokenizer(texts[-1])["input_ids"] == ids, texts[-1]
    model = AutoModelForCausalLM.from_pretrained(work / "weights", dtype="float32", attn_implementation="sdpa")
    return model, tokenizer, texts


def run_trl(args: argparse.Namespace, work: Path) -> Figures:
    model, tokenizer, texts = load_peer(work)
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from datasets.table import InMemoryTable  # pyright: ignore[reportMissingImports]
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

    answers = args.prompts * args.samples
    calls = answers // args.micro_batch
    config = GRPOConfig(
        output_dir=str(work / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=WARM_UP + args.iterations,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=calls,
        steps_per_generation=calls,
        num_generations=args.samples,
        max_completion_length=ANSWER_TOKENS,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        adam_beta2=demo.optimizer.beta2,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs={"eos_token_id": None},
    )
    ends, sampling = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            sampling.append(time.perf_counter() - began)
            assert made["completion_mask"].sum() == answers * ANSWER_TOKENS
            return made

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [rl_task.share_of_digits({}, text) for text in completions]

    # With a name it need not be pickled for one, which not every pyarrow allows.
    data = Dataset(InMemoryTable.from_pydict({"prompt": texts}), fingerprint="prompts")
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.eos_token_ids = [-1]
    trainer.train()
    seconds = differences(ends)
    sampling = sampling[WARM_UP:]
    update = [whole - part for whole, part in zip(seconds, sampling, strict=True)]
    entropy = [row["entropy"] for row in trainer.state.log_history if "entropy" in row][WARM_UP]
    return {"seconds": seconds, "phases": {"sample": sampling, "update": update}, "entropy": entropy}


def run_transformers(args: argparse.Namespace, work: Path) -> Figures:
    model, tokenizer, texts = load_peer(work)
    torch = import_torch()
    parameters = list(model.parameters())
    betas = demo.optimizer.beta1, demo.optimizer.beta2
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=betas, weight_decay=0.0, fused=True)
    answers, seconds, sampling, entropies = args.prompts * args.samples, [], [], []
    for iteration in range(WARM_UP + args.iterations):
        began = time.perf_counter()
        start = iteration * args.prompts
        ids_PT = tokenizer(texts[start : start + args.prompts], return_tensors="pt")["input_ids"]
        ids_BT = ids_PT.repeat_interleave(args.samples, 0)
        model.eval()
        with torch.no_grad():
            whole_BT = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                top_k=0,
                max_new_tokens=ANSWER_TOKENS,
            )
        choices_BL = whole_BT[:, ids_BT.shape[1] :]
        decoded = tokenizer.batch_decode(choices_BL, skip_special_tokens=True)
        rewards_PS = torch.tensor([rl_task.share_of_digits({}, text) for text in decoded]).view(-1, args.samples)
        centred_PS = rewards_PS - rewards_PS.mean(1, keepdim=True)
        advantages_B1 = (centred_PS / (rewards_PS.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        sampling.append(time.perf_counter() - began)

        model.train()
        optimizer.zero_grad(set_to_none=True)
        entropies.append(0.0)
        for place in range(0, answers, args.micro_batch):
            part = slice(place, place + args.micro_batch)
            logits_BLV = model(whole_BT[part], logits_to_keep=ANSWER_TOKENS + 1).logits[:, :-1]
            targets_BL1 = choices_BL[part, :, None]
            log_probs_BL = logits_BLV.gather(-1, targets_BL1)[..., 0] - logits_BLV.logsumexp(-1)
            ratio_BL = (log_probs_BL - log_probs_BL.detach()).exp()
            surrogate_BL = torch.minimum(
                ratio_BL * advantages_B1[part], ratio_BL.clamp(0.8, 1.28) * advantages_B1[part]
            )
            (-surrogate_BL.sum() / choices_BL.numel()).backward()
            entropies[-1] -= float(log_probs_BL.detach().sum()) / choices_BL.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    seconds, sampling = seconds[WARM_UP:], sampling[WARM_UP:]
    update = [whole - part for whole, part in zip(seconds, sampling, strict=True)]
    return {"seconds": seconds, "phases": {"sample": sampling, "update": update}, "entropy": entropies[WARM_UP]}


# Comparison ----------------------------------------------------------------------------------------------------------


def run_side(side: str, args: argparse.Namespace, work: Path) -> Figures:
    """Runs a side in a process of its own; the medians of its seconds."""
    file = work / f"{side}.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--work", str(work)]
    subprocess.run(command, check=True)
    found = json.loads(file.read_text())
    seconds = statistics.median(found["seconds"])
    return {
        "iterations_per_hour": 3600 / seconds,
        "seconds": seconds,
        "seconds_of_phases": {phase: statistics.median(times) for phase, times in found["phases"].items()},
        "seconds_of_iterations": found["seconds"],
        "entropy": found["entropy"],  # of the first timed iteration: all sides start from the same weights
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=DECODERS, default="demo")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=3, help=f"timed; {WARM_UP} more go before")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rows", type=int, default=8, help="of a call of stepjax's trainer")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=32, help="answers of a backward pass in PyTorch")
    parser.add_argument("--long", action="store_true", help="prompts of 251 tokens instead of 51")
    parser.add_argument("--side", choices=(*SIDES, "weights"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.long:
        args.rows, args.row_tokens = max(args.rows // 2, 2), 2 * args.row_tokens
    if args.side == "weights":
        rl_task.write_prompts(args.work / "prompts.jsonl", digits=120 if args.long else 20)
        write_weights(args, args.work / "weights")
        return
    if args.side is not None:
        prepare(recipe(args, args.work), args.rows)
        found = {"stepjax": run_stepjax, "trl": run_trl, "transformers": run_transformers}[args.side](args, args.work)
        (args.work / f"{args.side}.json").write_text(json.dumps(found))
        return
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed: pip install '.[benchmarks]'")
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", "weights", "--work", work], check=True)
        found = {side: run_side(side, args, Path(work)) for side in args.sides}
    ours = found["stepjax"]["seconds"]
    figures = {
        "command": " ".join(["python", "benchmarks/rl_vs_trl.py", *sys.argv[1:]]),
        "peers": {package: machine.version(package) for package in ("torch", "transformers", "trl")},
        "threads": num_cores(),
        "decoder": args.size,
        "prompts": {"count": args.prompts, "tokens": 251 if args.long else 51},
        "answers": {"to_a_prompt": args.samples, "tokens": ANSWER_TOKENS},
        "sides": found,
        "stepjax_is_faster_by": {side: each["seconds"] / ours for side, each in found.items() if side != "stepjax"},
    }
    name = "_".join(["rl_vs_trl", *([args.size] if args.size != "demo" else []), *(["long"] if args.long else [])])
    path = machine.write(name, figures)
    for side, each in found.items():
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in each["seconds_of_phases"].items())
        print(f"  {side:<13} {each['iterations_per_hour']:7.0f} iterations an hour ({phases})")
    for side, ratio in figures["stepjax_is_faster_by"].items():
        print(f"  stepjax is {ratio:.2f} x as fast as {side}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
