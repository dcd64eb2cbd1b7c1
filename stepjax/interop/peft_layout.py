"""The adapters of a run as PEFT stores them: adapter_config.json and adapter_model.safetensors.

    ours    decoder/blocks/attention/q_kernel/a   [L, D, R]      decoder/blocks/attention/q_kernel/b   [L, R, N, H]
    PEFT's  base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight [R, D], and .lora_B.weight [N * H, R]

for every layer. The module paths are those of the exported model's PyTorch code, and of Transformers' Qwen3 and Llama,
so one file serves the whole model and, unless it adapts the projector, its decoder alone. A wrong prefix would make
PEFT and servers answer with the base silently: tests/parity has PEFT read what this writes.

Legend: L layers, D width, N heads, H head dim, R rank.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from stepjax.config import LoraConfig
from stepjax.errors import CheckpointError
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.interop.partial import partial
from stepjax.interop.safetensors_file import create, make_header, parse_header, write_tensor
from stepjax.models import lora
from stepjax.sharding import named_leaves
from stepjax.training.checkpoint import restore_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def write_adapters(source: OrbaxDirectory, destination: Path, *, overwrite: bool = False) -> str:
    """Writes the adapters of a run; returns a description of them.

    Raises:
        CheckpointError: the run trains no adapters, its checkpoint is damaged, or the destination is unusable.
    """
    if source.run is None or source.run.adapters is None:
        raise CheckpointError(f"{source.path} has no adapters: leave out --adapters to convert its model")
    config = source.run.adapters
    model = source.spec.abstract(source.run.numerics)
    like = jax.eval_shape(lambda: lora.init_adapters(config, model, 0))
    adapters = {name: np.asarray(leaf[...]) for name, leaf in restore_model(source.step, like).items()}
    axes = {name: leaf.get_metadata()["axes"] for name, leaf in named_leaves(model).items()}
    tensors = dict(_tensors(source, adapters, axes))
    conversion = {"to": "peft", "source": str(source.step)}
    with partial(destination, conversion, overwrite=overwrite) as work:
        path = work.directory / WEIGHTS
        header = make_header((key, value.dtype, value.shape) for key, value in tensors.items())
        create(path, header)
        for key, entry in parse_header(path, header).items():
            write_tensor(entry, tensors[key])
        modules = sorted({key.split(".")[-3] for key in tensors})
        base = source.run.init_from.sources["decoder"]
        (work.directory / CONFIG).write_text(json.dumps(_config(config, modules, base), indent=2) + "\n")
    return f"{sum(value.size for value in tensors.values()):,} parameters of rank {config.rank} on {', '.join(modules)}"


def _tensors(
    source: OrbaxDirectory, adapters: dict[str, np.ndarray], axes: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in source.spec.tensors():
        if f"{tensor.name}/a" not in adapters:
            continue
        a, b = adapters[f"{tensor.name}/a"], adapters[f"{tensor.name}/b"]
        inputs = lora.num_inputs(axes[tensor.name])
        layers = range(len(a)) if tensor.stacked else [None]
        for layer in layers:
            a_layer, b_layer = (a, b) if layer is None else (a[layer], b[layer])
            module = _PREFIX + tensor.key.format(layer=layer).removesuffix(".weight")
            fan_in, rank = math.prod(a_layer.shape[:inputs]), a_layer.shape[-1]
            yield f"{module}.lora_A.weight", a_layer.reshape(fan_in, rank).T
            yield f"{module}.lora_B.weight", b_layer.reshape(rank, -1).T


def _config(config: LoraConfig, modules: list[str], base: str | None) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
