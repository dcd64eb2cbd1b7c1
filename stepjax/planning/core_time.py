"""How long one operation keeps the core: the compiler's cycles, or what stands in for them where it gives none."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

from stepjax.chips import DeviceFacts
from stepjax.planning.hlo import Array, Operation, Program, arrays
from stepjax.planning.kernel_rates import Kernel, Pass, flop_per_bundle

Kind = Literal["cycles", "attention kernel", "kernel", "bytes", "collective", "copy", "sparsecore"]

_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
_FREE_CALLS |= {
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "PinVmem",
    "LayoutConstraint",
    "ZeroCrop",
    "SliceId",
}
# Useful FLOPs a bundle of an attention kernel: (chip, pass, head size, keys, kernel).
AttentionRate = Callable[[str, Pass, int, int, Kernel], float]
_SHARE_OF_PEAK = 0.5  # reached by kernels whose schedule we have not read


class CoreTime:
    def __init__(
        self,
        program: Program,
        facts: DeviceFacts,
        unknown: Counter[str],
        attention_rate: AttentionRate = flop_per_bundle,
    ):
        """`unknown` gathers what could not be read."""
        self.program, self.facts, self.unknown, self.attention_rate = program, facts, unknown, attention_rate

    def occupied(self, computation: str, operation: Operation) -> tuple[Kind, float]:
        if (cycles := operation.cycles) is not None:
            return "cycles", cycles / self.facts.clock_hz
        target = operation.custom_call_target
        if target == "tpu_custom_call":
            return self._kernel(computation, operation)
        if target in _FREE_CALLS:
            return "cycles", 0.0
        if target is not None:
            self.unknown[f"custom call {target}"] += 1
        read = [array for array in self.program.operand_arrays(computation, operation) if array.in_hbm]
        written = [array for array in arrays(operation.shape) if array.in_hbm]
        if operation.opcode in ("dynamic-update-slice", "dynamic-slice", "slice"):
            # In place, or a part only: what moves is the smaller side, in and out.
            moved = 2 * min((a.bytes for a in read + written if a.dims), default=0)
        elif self._does("gather", operation):  # of a table, the rows that are wanted
            result = sum(a.bytes for a in written)
            moved = result + sum(min(a.bytes, result) for a in read)
        elif self._does("scatter", operation) and written and any(a.dims == written[0].dims for a in read):
            # In place: rows are read, changed and written; the rest of the target stays where it is.
            moved = 3 * sum(a.bytes for a in read if a.dims != written[0].dims)
        else:
            moved = sum(a.bytes for a in read + written)
        return "bytes", moved / self.facts.hbm_bandwidth

    def _does(self, opcode: str, operation: Operation) -> bool:
        """Whether an operation, or a fusion's inside, is of a kind."""
        called = operation.called if operation.opcode == "fusion" else ()
        return operation.opcode == opcode or any(
            self.program.contains(name, lambda inner: inner.opcode == opcode) for name in called
        )

    def _kernel(self, computation: str, operation: Operation) -> tuple[Kind, float]:
        read = self.program.operand_arrays(computation, operation)
        stated = operation.cost_estimate
        if attention := attention_call(operation, read):
            direction, head_dim, length, flops, kernel = attention
            rate = self.attention_rate(self.facts.chip, direction, head_dim, length, kernel)
            return "attention kernel", flops / (rate * self.facts.clock_hz * self.facts.cores)
        if not stated:
            self.unknown[f"kernel without a cost estimate: {operation.name}"] += 1
        moved = stated.get("bytes_accessed") or sum(a.bytes for a in [*read, *arrays(operation.shape)])
        computed = stated.get("flops", 0) / (self.facts.peak_flops * _SHARE_OF_PEAK)
        return "kernel", max(computed, moved / self.facts.hbm_bandwidth)


def attention_call(operation: Operation, read: list[Array]) -> tuple[Pass, int, int, float, Kernel] | None:
    """Direction, head size, keys, useful FLOPs and maker of an attention kernel's call; None of any other kernel.

    Queries come first among the operands of rank 4, [B, N, T, H] or [B, N, H, T], keys after them. Our kernel states
    the FLOPs of the pairs it computes, with its padding of the queries; that padding is taken off. Splash attention
    states none (JAX's) or those of other pairs than it computes (tokamax's). It is taken to be causal, as in decoders.
    """
    names = f"{operation.name} {operation.op_name}"
    kernel: Kernel | None = "ours" if "flash_attention" in names else None
    if "splash" in names:
        # Only tokamax's states a cost; its name is in the path of the source at best.
        kernel = "tokamax" if "tokamax" in names or operation.cost_estimate.get("flops") else "jax_splash"
    operands = [array for array in read if len(array.dims) == 4 and array.dtype in ("bf16", "f32", "f16")]
    if kernel is None or len(operands) < 2 or (kernel == "ours" and not operation.cost_estimate.get("flops")):
        return None
    backward = any(word in operation.name for word in ("backward", "bwd", "dq", "dkv"))
    (rows, heads, *query), (_, _, *key) = operands[0].dims, operands[1].dims
    (head_dim, queries), keys = sorted(query), max(key)
    if kernel == "ours":
        padding = min(1.0, keys / queries) if queries < 2 * keys else 1.0
        flops = operation.cost_estimate["flops"] * padding
    else:
        flops = (10 if backward else 4) * rows * heads * head_dim * queries * keys / 2
    return "backward" if backward else "forward", head_dim, keys, flops, kernel
