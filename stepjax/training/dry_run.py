"""Describes a run without running it: configuration, parameters, FLOPs and memory, from abstract shapes."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax

from stepjax.config import MeshConfig, PretrainConfig
from stepjax.config_file import differences, flat
from stepjax.figures import human_number
from stepjax.interop.init_from import describe as describe_start
from stepjax.interop.init_from import plan_start
from stepjax.models.step_vl import abstract_model
from stepjax.training.footprint import GIB, predict_memory, step_flops
from stepjax.training.loop import make_processor
from stepjax.training.optimizer import learning_rate, make_optimizer, named_leaves, trained_names
from stepjax.training.run_directory import run_directory
from stepjax.training.step import abstract_state, abstract_trained


def describe(config: PretrainConfig, preset: PretrainConfig) -> str:
    """A page of text. Allocates no parameters, even for large models.

    Raises:
        ConfigError: the run would reject the configuration. Data and devices are not checked.
        CheckpointError: a source of parameters does not fit. Only headers of local sources are read.
    """
    processor = make_processor(config)
    model = abstract_model(config.model, config.numerics)
    to_train = abstract_trained(config)
    optimizer = make_optimizer(config.optimizer, learning_rate(config.schedule, config.tokens_per_step), to_train)
    moments = abstract_state(config, optimizer).opt_state
    sizes = {name: leaf.size for name, leaf in named_leaves(model).items()}
    of_trained = {name: leaf.size for name, leaf in named_leaves(to_train).items()}
    trained = sum(of_trained[name] for name in trained_names(config.optimizer, to_train))
    which = f"of which {trained:,} trained" if config.adapters is None else f"frozen; {trained:,} of adapters trained"
    parts = Counter()
    for name, size in sizes.items():
        parts[name.split("/")[0]] += size
    starts = plan_start(config, must_exist=False)
    lines = ["configuration"]
    lines += [f"  {name} = {value!r}" for name, value in flat(config).items()]
    lines += ["", "overrides of the recipe", *(f"  {line}" for line in differences(config, preset) or ["none"])]
    lines += ["", f"parameters  {sum(sizes.values()):,}, {which}"]
    lines += [f"  {part:<10} {count:,}" for part, count in parts.items()]
    if starts:
        lines += ["", "parameters start", *(f"  {line}" for line in describe_start(starts, config))]
    vocabulary = f"{processor.tokenizer.vocab_size:,} ids in {config.model.decoder.vocab_size:,} embeddings"
    lines += ["", f"tokenizer   {vocabulary}"]
    lines += ["", *_step_lines(config)]
    lines += ["", *_memory_lines(config, moments)]
    lines += ["", f"the run would live in {run_directory(config)}"]
    return "\n".join(lines)


def _step_lines(config: PretrainConfig) -> list[str]:
    batch, images, flops = config.batch, config.images, step_flops(config)
    in_all = human_number(flops * config.num_steps)
    return [
        f"steps       {config.num_steps:,} of {config.tokens_per_step:,} tokens, "
        f"{batch.rows * batch.global_views:,} global views ({images.global_size} px, {images.global_tokens} tokens) "
        f"and {batch.rows * batch.crops:,} crops ({images.crop_size} px, {images.crop_tokens} tokens)",
        f"FLOPs       {human_number(flops)} per step with all slots full, {in_all} in all",
    ]


def _memory_lines(config: PretrainConfig, moments: Any) -> list[str]:
    """Memory of the whole run on one device with full rematerialisation: the minimum."""
    numerics = dataclasses.replace(config.numerics, remat="full", encoder_remat="full")
    least = predict_memory(dataclasses.replace(config, mesh=MeshConfig(), numerics=numerics), 1)
    rows = {
        "parameters": least.parameters,
        "optimizer": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(moments)) / GIB,
        "gradients": least.gradients / (2 if config.batch.accumulation > 1 else 1),
        "batch": least.batch,
        "layer inputs": least.activations,
    }
    total, count = sum(rows.values()), jax.device_count()
    return [
        f"memory      {total:.2f} GiB in all, {total / count:.2f} GiB on each of {count} device(s) if spread evenly",
        *(f"  {name:<12} {value:.2f} GiB" for name, value in rows.items()),
        f"  (remat={config.numerics.remat!r} keeps at least the layer inputs; temporaries come on top)",
    ]
