"""Ahead-of-time compilation for TPUs: the half of a kernel's test that interpret mode cannot give."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels import chips

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is published for 64-bit x86 Linux only"
)
every_chip = pytest.mark.parametrize("chip", tuple(chips.CHIPS))


def compile_for(chip: str, f: Callable[..., Any], *args: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """`f` compiled by the real TPU compiler for `chip`, on arguments given as anything with a shape and a dtype."""
    mesh = mesh or chips.compile_only_mesh(chip)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args)
    # libtpu reads XLA_FLAGS when it first compiles, and aborts on a flag that it does not know, conftest's for the CPU.
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        with jax.set_mesh(mesh):
            return jax.jit(f).lower(*specs).compile()
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def benchmark_module(name: str) -> Any:
    """A module of the benchmarks, which lie beside the package and import each other by name."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
