"""Adapters as PEFT stores them, adapter_config.json and adapter_model.safetensors: those of a run, and other people's.

    ours    decoder/blocks/attention/q_kernel/a   [L, D, R]      decoder/blocks/attention/q_kernel/b   [L, R, N, H]
    PEFT's  base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight [R, D], and .lora_B.weight [N * H, R]

for every layer. The module paths are those of the exported model's PyTorch code, and of Transformers' Qwen3 and Llama,
so one file serves the whole model and, unless it adapts the projector, its decoder alone. A wrong prefix would make
PEFT and servers answer with the base silently: tests/parity has PEFT read what this writes.

`Merged` goes the other way: a Hugging Face directory with an adapter added to its tensors, all in PyTorch's layout.

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
from stepjax.interop.bounds import read_json
from stepjax.interop.hf_directory import HFDirectory
from stepjax.interop.hf_layout import disk_key
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.interop.partial import partial
from stepjax.interop.safetensors_file import (
    check_size,
    create,
    make_header,
    parse_header,
    read_header,
    read_tensor,
    write_tensor,
)
from stepjax.models import lora
from stepjax.sharding import named_leaves
from stepjax.training.checkpoint import restore_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


# A run's adapters ----------------------------------------------------------------------------------------------------


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


# Other people's ------------------------------------------------------------------------------------------------------

# What we do not merge, by its field in the configuration, and the value that means that it is not used.
_UNUSED = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None, "bias": "none"}
_UNUSED |= {"rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}


class Merged(HFDirectory):
    """A Hugging Face directory whose tensors have an adapter of PEFT's added as they are read, in their own dtype.

    Raises:
        CheckpointError: the adapter is unusable, is of a kind that we do not merge, or belongs to another model.
    """

    def __init__(self, path: str | Path, adapter: str | Path):
        super().__init__(path)
        file, config = Path(adapter) / WEIGHTS, read_json(Path(adapter) / CONFIG)
        used = [name for name, unused in _UNUSED.items() if config.get(name) and config[name] != unused]
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if config.get("peft_type") != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float) or used:
            kind = f"{config.get('peft_type')!r} of r={rank!r}, lora_alpha={alpha!r}"
            raise CheckpointError(f"{adapter}: only plain LoRA is merged; this is {', '.join([kind, *used])}")
        self._scale = alpha / rank
        self._adapter = parse_header(file, read_header(file))
        check_size(file, self._adapter)
        self.origin = f"{self.origin} with {Path(adapter).absolute()} of {file.stat().st_mtime_ns}"
        self._parts = {key: self._parts_of(key) for key in self.entries}
        found = [part for parts in self._parts.values() for part in parts]
        if others := sorted(self._adapter.keys() - set(found)):
            raise CheckpointError(
                f"{adapter} does not belong to {path}, which has no place for {', '.join(others[:10])}"
            )
        for key, parts in self._parts.items():
            if parts and self._shape_of(parts) != self.entries[key].shape:
                raise CheckpointError(f"{adapter} does not belong to {path}: {', '.join(parts)} do not fit {key}")

    def read(self, key: str) -> np.ndarray:
        values, parts = super().read(key), self._parts[key]
        if not parts:
            return values
        a, b = (read_tensor(part, self._adapter[part]).astype(np.float32) for part in parts)
        return (values.astype(np.float32) + self._scale * (b @ a)).astype(values.dtype)

    def _parts_of(self, key: str) -> list[str]:
        """The keys of a tensor's A and B; none if it has no adapter. The adapter may name either public layout."""
        for path in (key, disk_key(key)):
            names = [f"{_PREFIX}{path.removesuffix('.weight')}.lora_{side}.weight" for side in "AB"]
            if any(name in self._adapter for name in names):
                return names
        return []

    def _shape_of(self, parts: list[str]) -> tuple[int, ...]:
        """Of the product; empty if a part is missing or misshapen."""
        shapes = [self._adapter[part].shape for part in parts if part in self._adapter]
        is_product = len(shapes) == 2 and all(len(shape) == 2 for shape in shapes) and shapes[0][0] == shapes[1][1]
        return (shapes[1][0], shapes[0][1]) if is_product else ()
