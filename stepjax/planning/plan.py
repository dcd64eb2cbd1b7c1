"""A plan: what one step of a configuration would need and take on a topology."""

import dataclasses
import os
from pathlib import Path

from stepjax.config import PretrainConfig
from stepjax.planning import hlo
from stepjax.planning.compile import CompiledStep, compile_step
from stepjax.planning.core_time import AttentionRate
from stepjax.planning.estimate import estimate
from stepjax.planning.kernel_rates import Kernel, Pass, flop_per_bundle, packed_flop_per_bundle
from stepjax.planning.kinds import Kind
from stepjax.planning.links import Network
from stepjax.planning.memory import Memory, of_arguments, of_program, parameter_count, predict
from stepjax.planning.topologies import Topology
from stepjax.planning.trace import Cost, Estimate
from stepjax.planning.work import model_flops, rows_at_once, tokens
from stepjax.sharding import MESH_AXES
from stepjax.xla_flags import compiler_options

REFERENCE_TOKENS = 1.2e12  # what STEP3-VL-10B was pretrained on


@dataclasses.dataclass(frozen=True)
class Item:
    """An entry of the list of the largest costs: the operations that one line of source made, in one part."""

    source: str  # "stepjax/models/qwen3.py:84", or the compiler's name where it tells no line
    part: str
    kind: str
    what: str  # the JAX primitive or the collective
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    config: PretrainConfig
    topology: Topology
    step: CompiledStep
    memory: Memory  # arithmetic where it does not fit
    estimate: Estimate | None  # None where it does not fit
    kind: Kind = "train"

    @property
    def fits(self) -> bool:
        return self.step.fits

    @property
    def mesh(self) -> dict[str, int]:
        return dict(zip(MESH_AXES, self.config.mesh.shape(self.topology.num_devices), strict=True))

    @property
    def limit_gib(self) -> float:
        shortage = self.step.shortage
        return self.topology.facts.hbm_limit_gib if shortage is None or not shortage.limit_gib else shortage.limit_gib

    @property
    def hbm_gib(self) -> float:
        """What a device needs: the compiler's figure, or the arithmetic's where the compiler gives none."""
        shortage = self.step.shortage
        if shortage is None:
            return self.step.total_bytes / 2**30
        return shortage.needed_gib or self.memory.total

    @property
    def parameters(self) -> int:
        return parameter_count(self.config.model)

    @property
    def flops(self) -> float:
        """Model FLOPs of a step whose slots are all full, by examples as long as they may be."""
        return model_flops(self.kind, self.config)

    @property
    def tokens_per_step(self) -> int:
        return tokens(self.kind, self.config)

    @property
    def mfu(self) -> float | None:
        if self.estimate is None:
            return None
        peak = self.topology.facts.peak_flops * self.topology.num_devices
        return self.flops / self.estimate.seconds / peak

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.estimate is None else self.tokens_per_step / self.estimate.seconds

    @property
    def images_per_second(self) -> float | None:
        if self.estimate is None or self.kind in ("prefill", "decode"):
            return None
        return rows_at_once(self.kind, self.config) * self.config.batch.global_views / self.estimate.seconds

    def largest_costs(self, count: int = 10) -> list[Item]:
        return [] if self.estimate is None else _largest(self.estimate, count)


def make_plan(
    config: PretrainConfig,
    topology: Topology,
    *,
    kind: Kind = "train",
    options: dict[str, str] | None = None,
    keep_text: Path | None = None,
) -> Plan:
    """Compile a step and estimate it; one compilation.

    Args:
        kind: of work; see work.py.
        options: compiler options; by default the chip's (stepjax.xla_flags).
        keep_text: leave the compiled program's text here.

    Raises:
        ConfigError: the configuration cannot run on this topology, whatever its memory.
    """
    options = compiler_options(topology.facts.chip) if options is None else options
    step = compile_step(config, topology, kind=kind, compiler_options=options)
    if not step.fits:
        memory = predict(config, topology.num_devices) if kind == "train" else of_arguments(step)
        return Plan(config, topology, step, memory, None, kind)
    if keep_text is not None:
        keep_text.write_text(step.text)
    program = hlo.read(step.text)
    network = Network(topology, list(step.mesh.devices.flat))
    return Plan(
        config,
        topology,
        step,
        of_program(step, program),
        estimate(program, network, attention_rate=attention_rate(config)),
        kind,
    )


def attention_rate(config: PretrainConfig) -> AttentionRate:
    """Of this job's kernels. The decoder's carry segment ids, and skip what lies between segments: rows are taken to be
    full of the longest examples, of which the kernel states the pairs of the whole row."""
    batch = config.batch
    share = batch.attention_pairs / (batch.tokens * (batch.tokens + 1) / 2)

    def rate(chip: str, direction: Pass, head_dim: int, length: int, kernel: Kernel) -> float:
        if kernel != "ours" or head_dim != config.model.decoder.head_dim or length != batch.tokens:
            return flop_per_bundle(chip, direction, head_dim, length, kernel)
        return packed_flop_per_bundle(chip, direction, batch.example_tokens or batch.tokens) / share

    return rate


def _largest(estimated: Estimate, count: int) -> list[Item]:
    operations: dict[tuple[str, str, str], dict[str, float]] = {}
    for cost in estimated.costs:
        names = operations.setdefault((_place(cost), cost.part, cost.kind), {})
        names[_what(cost)] = names.get(_what(cost), 0.0) + cost.seconds
    largest = sorted(operations.items(), key=lambda entry: -sum(entry[1].values()))[:count]
    return [Item(*key, max(names, key=lambda n: names[n]), sum(names.values())) for key, names in largest]


def _place(cost: Cost) -> str:
    source = cost.operation.source
    if source is None:
        return f"({cost.operation.name})"
    path = os.path.relpath(source.file)
    return f"{source.file if path.startswith('..') else path}:{source.line}"


def _what(cost: Cost) -> str:
    if cost.kind == "collective":
        return cost.operation.opcode.removesuffix("-done")
    return cost.scope.rpartition("/")[2] or cost.operation.opcode
