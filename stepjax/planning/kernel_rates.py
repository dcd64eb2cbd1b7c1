"""How fast the attention kernels are, by their static schedules: the compiler gives Mosaic calls no cycle estimate.

Useful floating-point operations a bundle (an instruction word, one a cycle and core), from
benchmarks/results/attention_schedules.json, which `python benchmarks/attention_schedules.py` writes (libtpu 0.0.52;
Python 3.12 with tokamax for the second column). Useful means of the pairs that are attended to: causal ones are the
triangle. Sequences without segments; stalls on memory are not in it.
"""

import dataclasses
import math
from typing import Literal

Pass = Literal["forward", "backward"]
Kernel = Literal["ours", "tokamax", "jax_splash"]


@dataclasses.dataclass(frozen=True)
class Rate:
    chip: str
    direction: Pass
    head_dim: int
    length: int
    ours: int  # useful FLOP a bundle
    tokamax: int
    jax_splash: int


RATES = (
    Rate("v5e", "forward", 96, 1296, 83_795, 66_767, 59_036),
    Rate("v5e", "backward", 96, 1296, 83_360, 80_783, 78_701),
    Rate("v5e", "forward", 96, 2704, 94_591, 65_128, 67_713),
    Rate("v5e", "backward", 96, 2704, 94_058, 88_253, 87_309),
    Rate("v5e", "forward", 128, 4096, 107_519, 81_098, 72_947),
    Rate("v5e", "backward", 128, 4096, 112_793, 101_083, 99_273),
    Rate("v5e", "forward", 128, 8192, 115_608, 90_261, 83_633),
    Rate("v5e", "backward", 128, 8192, 119_872, 112_448, 111_366),
    Rate("v5e", "forward", 128, 32768, 122_522, 98_617, 93_956),
    Rate("v5e", "backward", 128, 32768, 125_793, 122_803, 122_562),
    Rate("v5p", "forward", 96, 1296, 83_546, 65_686, 58_179),
    Rate("v5p", "backward", 96, 1296, 82_825, 80_324, 77_971),
    Rate("v5p", "forward", 96, 2704, 92_963, 64_284, 66_482),
    Rate("v5p", "backward", 96, 2704, 92_870, 87_707, 86_551),
    Rate("v5p", "forward", 128, 4096, 105_530, 80_629, 72_325),
    Rate("v5p", "backward", 128, 4096, 109_557, 100_705, 98_393),
    Rate("v5p", "forward", 128, 8192, 114_507, 90_500, 83_307),
    Rate("v5p", "backward", 128, 8192, 117_874, 112_425, 110_983),
    Rate("v5p", "forward", 128, 32768, 122_309, 99_650, 94_013),
    Rate("v5p", "backward", 128, 32768, 124_992, 123_177, 122_765),
    Rate("v6e", "forward", 96, 1296, 169_819, 116_211, 105_733),
    Rate("v6e", "backward", 96, 1296, 166_815, 153_902, 151_388),
    Rate("v6e", "forward", 96, 2704, 203_660, 121_407, 118_367),
    Rate("v6e", "backward", 96, 2704, 196_395, 168_851, 167_258),
    Rate("v6e", "forward", 128, 4096, 231_447, 138_538, 108_530),
    Rate("v6e", "backward", 128, 4096, 247_954, 186_161, 175_168),
    Rate("v6e", "forward", 128, 8192, 268_645, 154_980, 123_507),
    Rate("v6e", "backward", 128, 8192, 277_238, 207_852, 196_667),
    Rate("v6e", "forward", 128, 32768, 305_466, 173_667, 141_911),
    Rate("v6e", "backward", 128, 32768, 304_180, 233_280, 225_096),
    Rate("tpu7x", "forward", 96, 1296, 160_003, 78_103, 72_323),
    Rate("tpu7x", "backward", 96, 1296, 144_704, 149_743, 147_267),
    Rate("tpu7x", "forward", 96, 2704, 195_220, 82_153, 80_237),
    Rate("tpu7x", "backward", 96, 2704, 172_190, 163_716, 162_646),
    Rate("tpu7x", "forward", 128, 4096, 229_371, 136_331, 111_211),
    Rate("tpu7x", "backward", 128, 4096, 243_838, 189_821, 175_248),
    Rate("tpu7x", "forward", 128, 8192, 269_861, 151_231, 125_591),
    Rate("tpu7x", "backward", 128, 8192, 274_288, 213_319, 197_180),
    Rate("tpu7x", "forward", 128, 32768, 311_041, 174_491, 143_388),
    Rate("tpu7x", "backward", 128, 32768, 302_632, 240_250, 217_604),
)


# Ours at D=128 with segment ids, by the tokens of a segment, with a whole row in it: smaller tiles, and masks on the
# diagonal (benchmarks/packed_attention_rates.py).
PACKED: dict[tuple[str, Pass], dict[int, int]] = {
    ("v5e", "forward"): {4096: 93_568, 32768: 114_800},
    ("v5e", "backward"): {4096: 109_313, 32768: 123_890},
    ("v5p", "forward"): {4096: 91_761, 32768: 115_566},
    ("v5p", "backward"): {4096: 106_968, 32768: 124_149},
    ("v6e", "forward"): {4096: 157_152, 32768: 241_162},
    ("v6e", "backward"): {4096: 210_595, 32768: 271_346},
    ("tpu7x", "forward"): {4096: 161_041, 32768: 248_494},
    ("tpu7x", "backward"): {4096: 196_074, 32768: 264_835},
}


def flop_per_bundle(chip: str, direction: Pass, head_dim: int, length: int, kernel: Kernel = "ours") -> float:
    """Of the entry with the nearest head size, and of those the nearest length; tiny sequences are slower than that."""
    rows = [rate for rate in RATES if rate.chip == chip and rate.direction == direction]
    nearest = min(
        rows,
        key=lambda rate: (abs(math.log(rate.head_dim / head_dim)), abs(math.log(rate.length / max(length, 1)))),
    )
    return float(getattr(nearest, kernel))


def packed_flop_per_bundle(chip: str, direction: Pass, segment: int) -> float:
    """Of our kernel over rows of segments of this many tokens: of the nearest length."""
    rates = PACKED[chip, direction]
    return float(rates[min(rates, key=lambda length: abs(math.log(length / segment)))])
