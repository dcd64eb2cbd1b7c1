"""What a run would be, without running it: configuration, parameters, FLOPs and memory from abstract shapes."""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.config import PretrainConfig
from stepjax.config_file import differences, flat
from stepjax.figures import human_number
from stepjax.interop.init_from import describe as describe_start
from stepjax.interop.init_from import plan_start
from stepjax.models.flops import training_flops
from stepjax.models.step_vl import abstract_model
from stepjax.training.loop import make_processor
from stepjax.training.optimizer import learning_rate, make_optimizer, named_leaves, trained_names
from stepjax.training.run_directory import run_directory
from stepjax.training.step import abstract_state

_GIB = 1024**3


def describe(config: PretrainConfig, preset: PretrainConfig) -> str:
    """A page of text. Allocates nothing, whatever the model's size.

    Raises:
        ConfigError: the run would refuse the configuration. Neither the data nor the devices are looked at.
        CheckpointError: a source of parameters does not fit. Of sources that are here, the headers are read.
    """
    processor = make_processor(config)
    model = abstract_model(config.model, config.numerics)
    optimizer = make_optimizer(config.optimizer, learning_rate(config.schedule, config.tokens_per_step), model)
    state = abstract_state(config, optimizer)

    sizes = {name: leaf.size for name, leaf in named_leaves(model).items()}
    trained = sum(sizes[name] for name in trained_names(config.optimizer, model))
    parts = Counter()
    for name, size in sizes.items():
        parts[name.split("/")[0]] += size
    lines = ["configuration"]
    lines += [f"  {name} = {value!r}" for name, value in flat(config).items()]
    changes = differences(config, preset)
    lines += ["", "overrides of the recipe"] + [f"  {line}" for line in changes or ["none"]]
    lines += ["", f"parameters  {sum(sizes.values()):,}, of which {trained:,} trained"]
    lines += [f"  {part:<10} {count:,}" for part, count in parts.items()]
    starts = plan_start(config, must_exist=False)
    if starts:
        lines += ["", "parameters start", *(f"  {line}" for line in describe_start(starts, config))]
    lines += [
        "",
        f"tokenizer   {processor.tokenizer.vocab_size:,} ids in {config.model.decoder.vocab_size:,} embeddings",
    ]
    lines += ["", *_step_lines(config)]
    lines += ["", *_memory_lines(config, state)]
    lines += ["", f"the run would live in {run_directory(config)}"]
    return "\n".join(lines)


def _step_lines(config: PretrainConfig) -> list[str]:
    batch, images = config.batch, config.images
    slots = batch.rows * batch.tokens
    # Attention of full rows, one segment each: the most that packing can leave.
    pairs = batch.rows * batch.attention_pairs
    flops = training_flops(
        config.model,
        tokens=slots,
        attention_pairs=pairs,
        global_views=batch.rows * batch.global_views,
        crops=batch.rows * batch.crops,
        global_grid=images.global_grid,
        crop_grid=images.crop_grid,
    )
    total = human_number(flops * config.num_steps)
    return [
        f"steps       {config.num_steps:,} of {slots:,} tokens, {batch.rows * batch.global_views:,} global views "
        f"({images.global_size} px, {images.global_tokens} tokens) and {batch.rows * batch.crops:,} crops "
        f"({images.crop_size} px, {images.crop_tokens} tokens)",
        f"FLOPs       {human_number(flops)} a step with all slots full, {total} in all",
    ]


def _memory_lines(config: PretrainConfig, state: Any) -> list[str]:
    def gib(tree: Any) -> float:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / _GIB

    devices = jax.device_count()
    batch, images = config.batch, config.images
    pixels = batch.global_views * images.global_size**2 + batch.crops * images.crop_size**2
    width = jnp.dtype(config.numerics.compute_dtype).itemsize
    batch_gib = batch.rows * (pixels * 3 * width + batch.tokens * 6 * 4) / _GIB
    residuals = (
        batch.rows
        // batch.accumulation
        * (
            batch.tokens * config.model.decoder.width * config.model.decoder.num_layers
            + (batch.global_views * images.global_grid**2 + batch.crops * images.crop_grid**2)
            * config.model.vision.width
            * config.model.vision.num_layers
        )
    )
    parameters, moments = gib(state.model), gib(state.opt_state)
    rows = {
        "parameters": parameters,
        "optimizer": moments,
        "gradients": parameters,
        "batch": batch_gib,
        "layer inputs": residuals * width / _GIB,
    }
    total = sum(rows.values())
    lines = [
        f"memory      {total:.2f} GiB in all, {total / devices:.2f} GiB on each of {devices} device(s) if spread evenly"
    ]
    lines += [f"  {name:<12} {value:.2f} GiB" for name, value in rows.items()]
    lines.append(f"  (layer inputs are what remat={config.numerics.remat!r} keeps at least; temporaries come on top)")
    return lines
