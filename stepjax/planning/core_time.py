"""How long one operation occupies the core: the compiler's cycles, or a substitute where it gives none.

The compiler estimates no cycles for Mosaic kernels. Attention kernels take their useful FLOPs over the rate of their
static schedule, other kernels what their author stated. Everything else takes the time to move its bytes through HBM.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

from stepjax.chips import DeviceFacts
from stepjax.config import PretrainConfig
from stepjax.planning.hlo import Array, Operation, Program, arrays

CostKind = Literal["cycles", "attention kernel", "kernel", "bytes", "collective", "copy", "sparsecore"]
Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
Kernel = Literal["ours", "tokamax", "jax_splash"]
# Useful FLOPs a bundle of an attention kernel: (chip, pass, head size, keys, kernel).
AttentionRate = Callable[[str, Pass, int, int, Kernel], float]

# Custom calls that only rename or reserve memory.
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
_FREE_CALLS |= {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "PinVmem", "LayoutConstraint", "ZeroCrop"}
_FREE_CALLS |= {"SliceId"}
_SHARE_OF_PEAK = 0.5  # reached by kernels whose schedule we have not read

# Useful floating-point operations a bundle (an instruction word; a core issues one a cycle) of the forward and the
# backward pass, by (chip, head size, sequence length). Useful are pairs that are attended to: of causal ones the
# triangle. Sequences without segments; stalls on memory are not included. From
# benchmarks/results/attention_schedules.json (libtpu 0.0.52), which `python benchmarks/attention_schedules.py` writes.
_RATES: dict[tuple[str, int, int], dict[Kernel, tuple[int, int]]] = {
    ("v5e", 96, 1296): {"ours": (83795, 83360), "tokamax": (66767, 80783), "jax_splash": (59036, 78701)},
    ("v5e", 96, 2704): {"ours": (94591, 94058), "tokamax": (65128, 88253), "jax_splash": (67713, 87309)},
    ("v5e", 128, 4096): {"ours": (107519, 112793), "tokamax": (81098, 101083), "jax_splash": (72947, 99273)},
    ("v5e", 128, 8192): {"ours": (115608, 119872), "tokamax": (90261, 112448), "jax_splash": (83633, 111366)},
    ("v5e", 128, 32768): {"ours": (122522, 125793), "tokamax": (98617, 122803), "jax_splash": (93956, 122562)},
    ("v5p", 96, 1296): {"ours": (83546, 82825), "tokamax": (65686, 80324), "jax_splash": (58179, 77971)},
    ("v5p", 96, 2704): {"ours": (92963, 92870), "tokamax": (64284, 87707), "jax_splash": (66482, 86551)},
    ("v5p", 128, 4096): {"ours": (105530, 109557), "tokamax": (80629, 100705), "jax_splash": (72325, 98393)},
    ("v5p", 128, 8192): {"ours": (114507, 117874), "tokamax": (90500, 112425), "jax_splash": (83307, 110983)},
    ("v5p", 128, 32768): {"ours": (122309, 124992), "tokamax": (99650, 123177), "jax_splash": (94013, 122765)},
    ("v6e", 96, 1296): {"ours": (169819, 166815), "tokamax": (116211, 153902), "jax_splash": (105733, 151388)},
    ("v6e", 96, 2704): {"ours": (203660, 196395), "tokamax": (121407, 168851), "jax_splash": (118367, 167258)},
    ("v6e", 128, 4096): {"ours": (231447, 247954), "tokamax": (138538, 186161), "jax_splash": (108530, 175168)},
    ("v6e", 128, 8192): {"ours": (268645, 277238), "tokamax": (154980, 207852), "jax_splash": (123507, 196667)},
    ("v6e", 128, 32768): {"ours": (305466, 304180), "tokamax": (173667, 233280), "jax_splash": (141911, 225096)},
    ("tpu7x", 96, 1296): {"ours": (160003, 144704), "tokamax": (78103, 149743), "jax_splash": (72323, 147267)},
    ("tpu7x", 96, 2704): {"ours": (195220, 172190), "tokamax": (82153, 163716), "jax_splash": (80237, 162646)},
    ("tpu7x", 128, 4096): {"ours": (229371, 243838), "tokamax": (136331, 189821), "jax_splash": (111211, 175248)},
    ("tpu7x", 128, 8192): {"ours": (269861, 274288), "tokamax": (151231, 213319), "jax_splash": (125591, 197180)},
    ("tpu7x", 128, 32768): {"ours": (311041, 302632), "tokamax": (174491, 240250), "jax_splash": (143388, 217604)},
}
# The same of our kernel at head size 128 with segment ids, by tokens of a segment: smaller tiles, and masks on the
# diagonal (benchmarks/packed_attention_rates.py).
_PACKED_RATES: dict[str, dict[int, tuple[int, int]]] = {
    "v5e": {4096: (93_568, 109_313), 32768: (114_800, 123_890)},
    "v5p": {4096: (91_761, 106_968), 32768: (115_566, 124_149)},
    "v6e": {4096: (157_152, 210_595), 32768: (241_162, 271_346)},
    "tpu7x": {4096: (161_041, 196_074), 32768: (248_494, 264_835)},
}


def flop_per_bundle(chip: str, direction: Pass, head_dim: int, length: int, kernel: Kernel = "ours") -> float:
    """The rate at the nearest head size, and there the nearest length; tiny sequences are slower than that."""

    def distance(entry: tuple[str, int, int]) -> tuple[float, float]:
        return abs(math.log(entry[1] / head_dim)), abs(math.log(entry[2] / max(length, 1)))

    nearest = min((entry for entry in _RATES if entry[0] == chip), key=distance)
    return float(_RATES[nearest][kernel][PASSES.index(direction)])


def attention_rate(config: PretrainConfig) -> AttentionRate:
    """The rate of this job's kernels.

    The decoder's kernels take segment ids and skip what lies between segments. We assume rows full of the longest
    examples; the kernel states the FLOPs of whole rows.
    """
    batch = config.batch
    share = batch.attention_pairs / (batch.tokens * (batch.tokens + 1) / 2)
    segment = batch.example_tokens or batch.tokens

    def rate(chip: str, direction: Pass, head_dim: int, length: int, kernel: Kernel) -> float:
        if kernel != "ours" or head_dim != config.model.decoder.head_dim or length != batch.tokens:
            return flop_per_bundle(chip, direction, head_dim, length, kernel)
        rates = _PACKED_RATES[chip]
        nearest = min(rates, key=lambda tokens: abs(math.log(tokens / segment)))
        return float(rates[nearest][PASSES.index(direction)]) / share

    return rate


class CoreTime:
    def __init__(self, program: Program, facts: DeviceFacts, unknown: Counter[str], rate: AttentionRate):
        """`unknown` counts what could not be read."""
        self.program, self.facts, self.unknown, self.rate = program, facts, unknown, rate

    def occupied(self, computation: str, operation: Operation) -> tuple[CostKind, float]:
        """What the seconds rest on, and the seconds."""
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
            direction, head_dim, length, flops, kernel = attention
            rate = self.rate(self.facts.chip, direction, head_dim, length, kernel)
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
            # In place, or of a part only: the smaller side moves, in and out.
            return 2 * min((a.bytes for a in read + written if a.dims), default=0)
        if self._does("gather", operation):  # reads only the wanted rows of a table
            return result + sum(min(a.bytes, result) for a in read)
        if self._does("scatter", operation) and written and any(a.dims == written[0].dims for a in read):
            # In place: rows are read, changed and written back; the rest of the target does not move.
            return 3 * sum(a.bytes for a in read if a.dims != written[0].dims)
        return result + sum(a.bytes for a in read)

    def _does(self, opcode: str, operation: Operation) -> bool:
        """Whether an operation, or something fused into it, has this opcode."""
        fused = operation.opcode == "fusion" and self.program.inside(operation, lambda op: op.opcode == opcode)
        return operation.opcode == opcode or bool(fused)


def attention_call(operation: Operation, read: list[Array]) -> tuple[Pass, int, int, float, Kernel] | None:
    """Direction, head size, keys, useful FLOPs and kernel of an attention call; None for any other kernel.

    The first operands of rank 4 are the queries, [B, N, T, H] or [B, N, H, T], and the keys. Our kernel states the
    FLOPs of the pairs it computes, including the padding of the queries, which we take off. Splash attention states
    none (JAX's) or those of other pairs than it computes (tokamax's); we assume causal attention, as in decoders.
    """
    names = f"{operation.name} {operation.op_name}"
    stated = operation.cost_estimate.get("flops")
    kernel: Kernel | None = "ours" if "flash_attention" in names else None
    if "splash" in names:
        # Only tokamax's states a cost; the name of the package is at best in the path of the source.
        kernel = "tokamax" if "tokamax" in names or stated else "jax_splash"
    operands = [array for array in read if len(array.dims) == 4 and array.dtype in ("bf16", "f32", "f16")]
    if kernel is None or len(operands) < 2 or (kernel == "ours" and not stated):
        return None
    direction = "backward" if any(word in operation.name for word in ("backward", "bwd", "dq", "dkv")) else "forward"
    (rows, heads, *query), (_, _, *key) = operands[0].dims, operands[1].dims
    (head_dim, queries), keys = sorted(query), max(key)
    if kernel == "ours":
        assert stated is not None
        flops = stated * (min(1.0, keys / queries) if queries < 2 * keys else 1.0)
    else:
        flops = (10 if direction == "backward" else 4) * rows * heads * head_dim * queries * keys / 2
    return direction, head_dim, keys, flops, kernel
