"""TPU slices by their usual names, as compile-only devices.

A name is a generation and a number: `v5p-128`. As on Google Cloud and in MaxText, the number counts chips for v5e and
v6e, and TensorCores (two per chip) for v5p and tpu7x. A JAX device is a chip, except on tpu7x, where it is one of the
chip's two cores. The shape is the usual one for that size; use libtpu's names for others, such as `v5p:4x4x8`.
"""

import dataclasses
import math
import re
from typing import Any

from pallas_kernels.chips import compile_only_environment
from stepjax.chips import TPUS, DeviceFacts
from stepjax.errors import ConfigError

# Chips along each torus axis: Google Cloud's usual shapes, whole cubes of 4 x 4 x 4 from 64 chips up.
_SHAPES_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_SHAPES_3D = (
    "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 4x4x44 8x8x12 4x4x52 "
    "4x8x28 4x12x20 8x8x16 4x4x68 8x12x12 8x8x20 4x12x28 4x8x44 4x4x92 8x12x16 4x20x20 4x8x52 12x12x12 8x8x28 4x4x116 "
    "8x12x20 4x4x124 8x16x16 4x12x44 4x8x68 4x20x28 12x12x16 4x4x148 4x8x76 4x12x52 8x16x20 4x4x164 8x12x28 4x4x172 "
    "8x8x44 12x12x20 4x8x92 4x4x188 12x16x16 4x28x28 8x20x20 4x12x68 8x8x52 4x4x212 12x12x24 4x20x44 8x16x28 4x12x76 "
    "4x8x116 4x4x236 12x16x20 4x4x244 4x8x124 12x12x28 16x16x16 4x20x52 8x12x44 8x8x68 4x12x92 8x20x28 12x16x24 "
    "4x8x148 12x20x20 8x8x76 4x28x44 8x12x52 16x16x20 12x12x36 4x8x164 12x16x28 4x20x68 4x8x172 4x12x116 8x16x44 "
    "12x20x24 4x28x52 8x8x92 4x12x124 4x8x188 4x20x76 16x16x24 12x24x24 16x16x32 16x20x28 16x24x24"
)
_THREE_AXES = ("v5p", "tpu7x")  # these generations also count TensorCores, two per chip
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v7x": "tpu7x", "tpu7": "tpu7x", "ironwood": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several joined by the data-centre network."""

    name: str  # as given by the user
    facts: DeviceFacts
    shape: tuple[int, ...]  # chips of one slice along each torus axis
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.chips * self.facts.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Whether each torus axis is closed: with whole cubes (v5p, tpu7x) or 16 chips along it (v5e, v6e)."""
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3

    @property
    def libtpu_name(self) -> str:
        return f"{self.facts.chip}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """Compile-only JAX devices.

        Raises:
            ConfigError: libtpu is not installed, or does not know this topology.
        """
        compile_only_environment()
        from jax.experimental import topologies

        options: dict[str, Any] = {
            "chips_per_host_bounds": (1, 1, 1) if math.prod(self.shape) == 1 else (2, 2, 1),
            "num_slices": self.slices,
            "wrap": (*self.wrap, False)[:3],
        }
        if self.facts.cores == 2:
            options["chip_config_name"] = "megacore"
        try:
            description: Any = topologies.get_topology_desc(platform="tpu", topology_name=self.libtpu_name, **options)
        except Exception as error:  # the plugin raises many types
            raise ConfigError(
                f"--topology {self.name}: libtpu cannot compile for {self.libtpu_name} ({error}). Install it with "
                f"`pip install libtpu` (64-bit x86 Linux only)"
            ) from error
        return list(description.devices)


def _sizes(chip: str) -> dict[int, tuple[int, ...]]:
    """A generation's usual shapes by the number in their names."""
    shapes = (_SHAPES_3D if chip in _THREE_AXES else _SHAPES_2D).split()
    found: dict[int, tuple[int, ...]] = {}
    for text in ["1x1x1", *shapes] if chip == "tpu7x" else shapes:
        shape = tuple(map(int, text.split("x")))
        found.setdefault(math.prod(shape) * (2 if chip in _THREE_AXES else 1), shape)
    return found


SIZES = {chip: _sizes(chip) for chip in TPUS}


def find(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as `v5p-128`, `v5litepod-256`, `tpu7x-128` or `v5p:4x4x8`.

    Raises:
        ConfigError: no topology has this name; lists the nearest ones.
    """
    if slices < 1:
        raise ConfigError(f"--slices {slices}: must be at least 1")
    generation, mark, size = name.strip().lower().partition(":" if ":" in name else "-")
    generation = _ALIASES.get(generation, generation)
    if generation not in TPUS:
        remedy = f"name one of {', '.join(TPUS)} with a size, such as v5p-128, v5e-256, v6e-256 or tpu7x-128"
        raise ConfigError(f"--topology {name!r}: no such TPU topology; {remedy}")
    number = int(size) if size.isdecimal() else 0
    shape = SIZES[generation].get(number) if mark == "-" else None
    if mark == ":" and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", size):
        shape = tuple(map(int, size.split("x")))
        shape = shape if len(shape) == (3 if generation in _THREE_AXES else 2) else None
    if shape is not None:
        return Topology(name, TPUS[generation], shape, slices)
    near = sorted(SIZES[generation], key=lambda known: abs(math.log(known / max(number, 1))))[:3]
    all_sizes = list(map(str, SIZES[generation]))
    known = ", ".join(all_sizes if len(all_sizes) < 12 else [*all_sizes[:10], "...", all_sizes[-1]])
    counted, own = ("TensorCores", "4x4x8") if generation in _THREE_AXES else ("chips", "4x8")
    raise ConfigError(
        f"--topology {name!r}: no such TPU topology; sizes of {generation} count {counted}; the nearest are "
        f"{', '.join(f'{generation}-{n}' for n in near)}; all are {known}; write any other shape as {generation}:{own}"
    )
