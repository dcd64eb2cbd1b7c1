"""The real step, compiled for devices that are not here.

What is compiled is what `stepjax pretrain` would run: the same function, the same state and batch, the same shardings,
the state donated; or other work of the same model (work.py). Only shapes exist; the host needs memory for the compiler,
not for the model.
"""

import contextlib
import dataclasses
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from pallas_kernels.checks import ArgumentError
from stepjax.config import PretrainConfig
from stepjax.errors import ConfigError
from stepjax.planning.kinds import Kind
from stepjax.planning.printing import program_text
from stepjax.planning.topologies import Topology
from stepjax.planning.work import num_bytes, work
from stepjax.sharding import make_mesh, num_parts

GIB = 2**30
_UNITS = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}  # GiB


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What the compiler says of a program that does not fit."""

    needed_gib: float | None  # arguments included; None where the message names no figure
    limit_gib: float | None
    message: str


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step, or why there is none. Bytes are of one device."""

    mesh: Mesh
    parameter_bytes: int = 0
    optimizer_bytes: int = 0
    batch_bytes: int = 0
    argument_bytes: int = 0  # as the compiler lays them out
    output_bytes: int = 0
    alias_bytes: int = 0  # outputs that reuse donated arguments
    temporary_bytes: int = 0
    peak_bytes: int = 0
    text: str = ""  # the scheduled program
    shortage: Shortage | None = None
    seconds: float = 0.0  # tracing, lowering and compiling
    host_gib: float = 0.0  # largest memory of this process so far

    @property
    def fits(self) -> bool:
        return self.shortage is None

    @property
    def total_bytes(self) -> int:
        """What the device has to hold at once."""
        in_all = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes
        return max(self.peak_bytes, in_all)


def compile_step(
    config: PretrainConfig,
    topology: Topology,
    *,
    kind: Kind = "train",
    compiler_options: Mapping[str, str] | None = None,
) -> CompiledStep:
    """Compile one step of `config` for `topology`: of training, or another kind of work.

    Raises:
        ConfigError: the mesh, the batch or the parameters do not divide as the configuration asks, or libtpu refuses
            the topology or an option.
    """
    mesh = make_mesh(config.mesh, topology.devices())
    check_rows(config, mesh)
    began = time.monotonic()
    with jax.set_mesh(mesh), _without_flags():
        what = work(kind, config, mesh)
        step = CompiledStep(mesh, num_bytes(what.parameters), num_bytes(what.optimizer), num_bytes(what.batch))
        try:
            lowered = jax.jit(what.function, donate_argnums=what.donated).lower(*what.arguments)
        except ArgumentError as error:
            raise ConfigError(f"the step cannot be built for {topology.name}: {error}") from error
        try:
            compiled = lowered.compile(compiler_options={**(compiler_options or {})})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise ConfigError(f"the step does not compile for {topology.name}: {error}") from error
            shortage, seconds = read_shortage(str(error)), time.monotonic() - began
            return dataclasses.replace(step, shortage=shortage, seconds=seconds, host_gib=_host_gib())
        memory: Any = compiled.memory_analysis()
        seconds = time.monotonic() - began
        return dataclasses.replace(
            step,
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            peak_bytes=getattr(memory, "peak_memory_in_bytes", 0),
            text=program_text(compiled, f"jit_{what.function.__name__}"),
            seconds=seconds,
            host_gib=_host_gib(),
        )


def check_rows(config: PretrainConfig, mesh: Mesh) -> None:
    """
    Raises:
        ConfigError: the rows of a micro-batch do not divide over the devices that share the batch, or their tokens
            over those that share a row.
    """
    batch, parts = config.batch, num_parts("batch", mesh)
    if batch.rows // batch.accumulation % parts:
        raise ConfigError(
            f"batch.rows={batch.rows} with batch.accumulation={batch.accumulation}: each micro-batch of "
            f"{batch.rows // batch.accumulation} rows must divide over {parts} parts (mesh.slice x data x fsdp)"
        )
    if batch.tokens % num_parts("length", mesh):
        raise ConfigError(f"batch.tokens={batch.tokens}: must divide over mesh.context={num_parts('length', mesh)}")


def read_shortage(message: str) -> Shortage:
    """The figures in the compiler's refusal, of which it has more than one form."""
    size = r"([\d.]+)([KMGT])"
    for pattern in (rf"required for [^(]*\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if found := re.search(pattern, message):
            needed, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
            return Shortage(needed, limit, message)
    return Shortage(None, None, message)


@contextlib.contextmanager
def _without_flags() -> Iterator[None]:
    """libtpu reads XLA_FLAGS when it first compiles, and aborts on a flag that it does not know, as those of CPUs."""
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def _host_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
