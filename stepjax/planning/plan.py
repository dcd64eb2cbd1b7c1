"""A plan: memory and time of one step of a configuration on a topology."""

import dataclasses
from pathlib import Path

from stepjax.config import PretrainConfig
from stepjax.models.serving_decoder import Weights
from stepjax.planning import StepKind, hlo
from stepjax.planning.core_time import attention_rate
from stepjax.planning.estimate import Estimate, estimate
from stepjax.planning.network import Network
from stepjax.planning.steps import CompiledStep, compile_step, model_flops, rows_at_once, tokens_at_once
from stepjax.planning.topologies import Topology
from stepjax.sharding import MESH_AXES
from stepjax.training.footprint import GIB, Memory, predict_memory
from stepjax.xla_flags import compiler_options


@dataclasses.dataclass(frozen=True)
class StepPlan:
    config: PretrainConfig
    topology: Topology
    step: CompiledStep
    memory: Memory  # by arithmetic if the step does not fit
    estimate: Estimate | None  # None if the step does not fit
    kind: StepKind = "train"

    @property
    def fits(self) -> bool:
        return self.step.fits

    @property
    def mesh(self) -> dict[str, int]:
        return dict(zip(MESH_AXES, self.config.mesh.shape(self.topology.num_devices), strict=True))

    @property
    def limit_gib(self) -> float:
        stated = self.step.shortage and self.step.shortage.limit_gib
        return stated or self.topology.facts.hbm_limit_gib

    @property
    def hbm_gib(self) -> float:
        """Memory needed per device: the compiler's figure, else by arithmetic."""
        if self.step.shortage is None:
            return self.step.total_bytes / GIB
        return self.step.shortage.needed_gib or self.memory.total

    @property
    def flops(self) -> float:
        return model_flops(self.kind, self.config)

    @property
    def tokens_per_step(self) -> int:
        return tokens_at_once(self.kind, self.config)

    @property
    def mfu(self) -> float | None:
        if self.estimate is None:
            return None
        return self.flops / self.estimate.seconds / (self.topology.facts.peak_flops * self.topology.num_devices)

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.estimate is None else self.tokens_per_step / self.estimate.seconds

    @property
    def images_per_second(self) -> float | None:
        if self.estimate is None or self.kind in ("prefill", "decode"):
            return None
        return rows_at_once(self.kind, self.config) * self.config.batch.global_views / self.estimate.seconds


def make_plan(
    config: PretrainConfig,
    topology: Topology,
    *,
    kind: StepKind = "train",
    weights: Weights = None,
    keep_text: Path | None = None,
) -> StepPlan:
    """Compile a step once with the chip's flags (stepjax.xla_flags), and estimate it.

    Args:
        kind: the kind of step; see steps.py.
        weights: `EngineConfig.weights`, for the steps of the engine.
        keep_text: write the compiled program's text to this file.

    Raises:
        ConfigError: the configuration cannot run on this topology, regardless of memory.
    """
    step = compile_step(
        config, topology, kind=kind, weights=weights, compiler_options=compiler_options(topology.facts.chip)
    )
    if not step.fits:
        # For steps other than training only the arguments are certain.
        arguments = (x / GIB for x in (step.parameter_bytes, step.optimizer_bytes, step.batch_bytes))
        memory = predict_memory(config, topology.num_devices) if kind == "train" else Memory(*arguments)
        return StepPlan(config, topology, step, memory, None, kind)
    if keep_text is not None:
        keep_text.write_text(step.text)
    program = hlo.read(step.text)
    network = Network(topology, list(step.mesh.devices.flat))
    estimated = estimate(program, network, attention_rate=attention_rate(config))
    return StepPlan(config, topology, step, memory_of(step, program), estimated, kind)


def memory_of(step: CompiledStep, program: hlo.Program) -> Memory:
    """Memory of a compiled step. `temporaries` is the compiler's total minus the parts we recognise."""
    kept, gradients = _stacks(program)
    # Padding of small dimensions makes the arguments larger than their shapes imply.
    padding = step.argument_bytes - step.parameter_bytes - step.optimizer_bytes - step.batch_bytes
    rest = step.total_bytes - step.argument_bytes - kept - gradients + max(padding, 0)
    if rest < 0:  # stacks that are never live at the same time share memory
        kept, gradients, rest = kept + rest, gradients, 0
    parts = (step.parameter_bytes, step.optimizer_bytes, step.batch_bytes, kept, gradients, rest)
    return Memory(*(part / GIB for part in parts))


def _stacks(program: hlo.Program) -> tuple[int, int]:
    """Bytes that loops fill, one entry per layer: activations in forward loops, gradients in backward loops."""
    kept = gradients = 0
    for computation, operations in program.computations.items():
        for loop in operations:
            trips = program.trips(loop) if loop.opcode == "while" and loop.operands else None
            initial = None if trips is None else program.operation(computation, loop.operands[0])
            if initial is None or initial.opcode != "tuple":
                continue
            size = 0
            for name, array in zip(initial.operands, hlo.arrays(loop.shape), strict=True):
                source = program.operation(computation, name)
                is_new = source and (source.custom_call_target == "AllocateBuffer" or source.opcode == "broadcast")
                if is_new and array.dims[:1] == (trips,) and len(array.dims) > 1:
                    size += array.bytes
            if "transpose(" in loop.op_name:
                gradients += size
            else:
                kept += size
    return kept, gradients
