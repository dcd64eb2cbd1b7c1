"""Which stored tensor goes where; whatever is missing, unexpected or misshapen is named, all at once."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Protocol

from stepjax.errors import CheckpointError
from stepjax.interop.hf_layout import Tensor, disk_key

_NAMED = 100  # of each kind of misfit; a model of another size has thousands


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """A public tensor and the parameter, or the layer of a stacked one, that it fills."""

    key: str  # on disk
    tensor: Tensor
    layer: int | None
    shape: tuple[int, ...]  # of the public tensor


def places(tensors: Iterable[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """Every public tensor of a model whose parameters have these shapes; a parameter's layers follow each other."""
    found = []
    for tensor in tensors:
        shape = shapes[tensor.name]
        if tensor.stacked:
            public = tensor.hf_shape(shape[1:])
            found += [Place(tensor.key.format(layer=i), tensor, i, public) for i in range(shape[0])]
        else:
            found.append(Place(tensor.key, tensor, None, tensor.hf_shape(shape)))
    return found


def match(wanted: Iterable[Place], stored: Mapping[str, Shaped]) -> list[tuple[Place, str]]:
    """The places that a checkpoint fills, each with the key under which it has the tensor.

    `stored` may have the keys of either public layout. Copies (`Tensor.is_copy`) may be absent, and the tables of
    rotary angles that old Llama checkpoints store are passed over.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or given twice; all of them are named.
    """
    keys = [key for key in stored if not key.endswith("rotary_emb.inv_freq")]
    by_disk_key = {disk_key(key): key for key in keys}
    repeated = [key for key in keys if by_disk_key[disk_key(key)] != key]
    missing, misshapen, found = [], [], []
    unexpected = dict.fromkeys(sorted(by_disk_key))
    for place in wanted:
        unexpected.pop(place.key, None)
        if place.key not in by_disk_key:
            missing += [] if place.tensor.is_copy else [place.key]
            continue
        key = by_disk_key[place.key]
        shape = tuple(stored[key].shape)
        if shape != place.shape:
            misshapen.append(f"{place.key} {shape} (expected {place.shape})")
        found.append((place, key))
    problems = [
        f"{label}: {_listed(entries)}"
        for label, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("in both public layouts", repeated),
        )
        if entries
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model; " + "; ".join(problems))
    return found


def _listed(entries: Collection[str]) -> str:
    more = len(entries) - _NAMED
    return ", ".join(islice(entries, _NAMED)) + (f" and {more:,} more" if more > 0 else "")
