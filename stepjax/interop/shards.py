"""Which exported tensor goes into which file, named as on the hub: model-00001.safetensors, model-00002.safetensors."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stepjax.interop.safetensors_file import make_header, parse_header

SHARD_BYTES = 4_500_000_000

TensorFacts = tuple[str, np.dtype, tuple[int, ...]]


def plan_shards(tensors: Iterable[TensorFacts], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Headers by file name; tensors keep their order, and a file takes what fits. One file alone is unnumbered."""
    groups: list[list[TensorFacts]] = [[]]
    used = 0
    for key, dtype, shape in tensors:
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((key, dtype, shape))
        used += size
    if len(groups) == 1:
        return {"model.safetensors": make_header(groups[0])}
    return {f"model-{i:05d}.safetensors": make_header(group) for i, group in enumerate(groups, 1)}


def index_of(headers: dict[str, str]) -> str:
    """The text of model.safetensors.index.json."""
    where, total = {}, 0
    for name, header in headers.items():
        entries = parse_header(Path(name), header)
        where |= dict.fromkeys(entries, name)
        total += sum(entry.nbytes for entry in entries.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
