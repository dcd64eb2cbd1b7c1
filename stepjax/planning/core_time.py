"""How long one operation occupies the core: the compiler's cycles, or a substitute if it gives none.

The compiler does not estimate Mosaic kernels. For attention kernels we divide their useful FLOPs by the rate of their
static schedule; for other kernels we use their author's cost estimate. Everything else takes the time to move its bytes
through HBM.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

from stepjax.chips import DeviceFacts
from stepjax.config import PretrainConfig
from stepjax.planning.hlo import Array, Operation, Program, arrays
from stepjax.post_training.config import RLConfig

CostKind = Literal["cycles", "attention kernel", "kernel", "bytes", "collective", "copy", "sparsecore"]
Pass = Literal["forward", "backward"]
AttentionRate = Callable[[str, Pass, int, int], float]  # useful FLOPs a bundle: chip, pass, head size, keys

# Custom calls that only rename or reserve memory.
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
_FREE_CALLS |= {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "PinVmem", "LayoutConstraint", "ZeroCrop"}
_FREE_CALLS |= {"SliceId"}
_SHARE_OF_PEAK = 0.5  # assumed for kernels whose schedule we have not read

# Useful floating-point operations of our kernel per bundle (an instruction word; a core issues one per cycle), for
# these (head size, sequence length). Only attended pairs are useful: the triangle if causal. No segments; memory stalls
# not included. From benchmarks/results/attention_schedules.json (libtpu 0.0.52), which
# `python benchmarks/attention_schedules.py` writes.
_SHAPES = ((96, 1296), (96, 2704), (128, 4096), (128, 8192), (128, 32768))
_RATES: dict[tuple[str, Pass], tuple[int, ...]] = {
    ("v5e", "forward"): (83_795, 94_591, 107_519, 115_608, 122_522),
    ("v5e", "backward"): (83_360, 94_058, 112_793, 119_872, 125_793),
    ("v5p", "forward"): (83_546, 92_963, 105_530, 114_507, 122_309),
    ("v5p", "backward"): (82_825, 92_870, 109_557, 117_874, 124_992),
    ("v6e", "forward"): (169_819, 203_660, 231_447, 268_645, 305_466),
    ("v6e", "backward"): (166_815, 196_395, 247_954, 277_238, 304_180),
    ("tpu7x", "forward"): (160_003, 195_220, 229_371, 269_861, 311_041),
    ("tpu7x", "backward"): (144_704, 172_190, 243_838, 274_288, 302_632),
}
# The same with segment ids at head size 128, for these segment lengths: smaller tiles, and masks on the diagonal
# (benchmarks/packed_attention_rates.py).
_SEGMENTS = (4096, 32768)
_PACKED_RATES: dict[tuple[str, Pass], tuple[int, ...]] = {
    ("v5e", "forward"): (93_568, 114_800),
    ("v5e", "backward"): (109_313, 123_890),
    ("v5p", "forward"): (91_761, 115_566),
    ("v5p", "backward"): (106_968, 124_149),
    ("v6e", "forward"): (157_152, 241_162),
    ("v6e", "backward"): (210_595, 271_346),
    ("tpu7x", "forward"): (161_041, 248_494),
    ("tpu7x", "backward"): (196_074, 264_835),
}


def flop_per_bundle(chip: str, direction: Pass, head_dim: int, length: int) -> float:
    """The rate at the nearest head size and then the nearest length; tiny sequences are slower."""

    def distance(shape: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log(shape[0] / head_dim)), abs(math.log(shape[1] / max(length, 1)))

    return float(_RATES[chip, direction][_SHAPES.index(min(_SHAPES, key=distance))])


def attention_rate(config: PretrainConfig) -> AttentionRate:
    """The rate of this job's kernels: rows full of the longest examples."""
    batch = config.batch
    share = batch.attention_pairs / (batch.tokens * (batch.tokens + 1) / 2)
    return packed_rate(config, share, batch.example_tokens or batch.tokens)


def packed_rate(config: PretrainConfig | RLConfig, share: float, segment: int) -> AttentionRate:
    """The rate of decoder kernels that take segment ids and skip pairs across segments, and of the encoder's.

    Args:
        share: of the pairs in the FLOPs that the kernels state, which are for whole rows.
        segment: length of the segments in tokens.
    """
    batch = config.batch
    nearest = min(range(len(_SEGMENTS)), key=lambda i: abs(math.log(_SEGMENTS[i] / segment)))

    def rate(chip: str, direction: Pass, head_dim: int, length: int) -> float:
        if head_dim != config.model.decoder.head_dim or length != batch.tokens:
            return flop_per_bundle(chip, direction, head_dim, length)
        return _PACKED_RATES[chip, direction][nearest] / share

    return rate


class CoreTime:
    def __init__(self, program: Program, facts: DeviceFacts, unknown: Counter[str], rate: AttentionRate):
        """`unknown` counts what we do not understand."""
        self.program, self.facts, self.unknown, self.rate = program, facts, unknown, rate

    def occupied(self, computation: str, operation: Operation) -> tuple[CostKind, float]:
        """The source of the estimate, and the seconds."""
        if (cycles := operation.cycles) is not None:
            return "cycles", cycles / self.facts.clock_hz
        target = operation.custom_call_target
        read = self.program.operand_arrays(computation, operation)
        if target == "tpu_custom_call":
            return self._kernel(operation, read)
        if target in _FREE_CALLS:
            return "cycles", 0.0
        if target is not None:
            self.unknown[f"custom call {target}"] += 1
        return "bytes", self._bytes_moved(operation, read) / self.facts.hbm_bandwidth

    def _kernel(self, operation: Operation, read: list[Array]) -> tuple[CostKind, float]:
        if attention := attention_call(operation, read):
            direction, head_dim, length, flops = attention
            rate = self.rate(self.facts.chip, direction, head_dim, length)
            return "attention kernel", flops / (rate * self.facts.clock_hz * self.facts.cores)
        stated = operation.cost_estimate
        if not stated:
            self.unknown[f"kernel without a cost estimate: {operation.name}"] += 1
        moved = stated.get("bytes_accessed") or sum(a.bytes for a in [*read, *arrays(operation.shape)])
        computed = stated.get("flops", 0) / (self.facts.peak_flops * _SHARE_OF_PEAK)
        return "kernel", max(computed, moved / self.facts.hbm_bandwidth)

    def _bytes_moved(self, operation: Operation, read: list[Array]) -> int:
        read = [array for array in read if array.in_hbm]
        written = [array for array in arrays(operation.shape) if array.in_hbm]
        result = sum(a.bytes for a in written)
        if operation.opcode in ("dynamic-update-slice", "dynamic-slice", "slice"):
            # In place, or only a part: the smaller side is read and written.
            return 2 * min((a.bytes for a in read + written if a.dims), default=0)
        if self._does("gather", operation):  # reads only the selected rows of a table
            return result + sum(min(a.bytes, result) for a in read)
        if self._does("scatter", operation) and written and any(a.dims == written[0].dims for a in read):
            # In place: only the updated rows are read and written back.
            return 3 * sum(a.bytes for a in read if a.dims != written[0].dims)
        return result + sum(a.bytes for a in read)

    def _does(self, opcode: str, operation: Operation) -> bool:
        """Whether an operation, or one fused into it, has this opcode."""
        fused = operation.opcode == "fusion" and self.program.inside(operation, lambda op: op.opcode == opcode)
        return operation.opcode == opcode or bool(fused)


def attention_call(operation: Operation, read: list[Array]) -> tuple[Pass, int, int, float] | None:
    """Direction, head size, keys and useful FLOPs of an attention kernel call; None for any other kernel.

    The first two operands of rank 4 are the queries, [B, N, T, H] or [B, N, H, T], and the keys. Our kernel states the
    FLOPs of the pairs it computes, including padded queries, which we subtract. Splash attention (in MaxText's
    programs: benchmarks/plan_vs_maxtext.py) states none, or not those of the pairs it computes; we assume causal
    attention, as in decoders.
    """
    names, stated = f"{operation.name} {operation.op_name}", operation.cost_estimate.get("flops")
    is_splash = "splash" in names
    operands = [array for array in read if len(array.dims) == 4 and array.dtype in ("bf16", "f32", "f16")]
    if not (is_splash or ("flash_attention" in names and stated)) or len(operands) < 2:
        return None
    direction = "backward" if any(word in operation.name for word in ("backward", "bwd", "dq", "dkv")) else "forward"
    (rows, heads, *query), (_, _, *key) = operands[0].dims, operands[1].dims
    (head_dim, queries), keys = sorted(query), max(key)
    if is_splash or not stated:
        flops = (10 if direction == "backward" else 4) * rows * heads * head_dim * queries * keys / 2
    else:
        flops = stated * (min(1.0, keys / queries) if queries < 2 * keys else 1.0)
    return direction, head_dim, keys, flops
