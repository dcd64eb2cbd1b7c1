"""The arithmetic of benchmarks/plan_vs_maxtext.py: what its table and its ratio make of results."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

from stepjax.planning.estimate import Cost
from stepjax.planning.hlo import Operation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
benchmark = importlib.import_module("plan_vs_maxtext")

RESULT = benchmark.Result(
    side="stepjax",
    topology="v5p-128",
    label="a",
    is_recipe=False,
    chips=64,
    tokens=64 * 4096,
    model_flops=64 * 459e12,
    peak_flops=459e12,
    seconds=2.0,
    hbm_gib=10.0,
    exposed_seconds=0.5,
    attention_flop_per_bundle={},
    seconds_by_part={},
    not_understood={},
)


def test_rates_of_a_result():
    assert RESULT.tokens_per_second_per_chip == 2048
    assert RESULT.mfu == pytest.approx(0.5)
    assert "2,048" in benchmark.line(RESULT) and "50.0%" in benchmark.line(RESULT)
    assert benchmark.to_json(RESULT)["tokens_per_second_per_chip"] == 2048


def test_each_side_counts_with_its_best():
    slow, fast = (dataclasses.replace(RESULT, side="maxtext", label=str(s), seconds=s) for s in (8.0, 4.0))
    assert benchmark.best([slow, RESULT, fast], "maxtext") is fast
    assert benchmark.ratio([slow, RESULT, fast]) == pytest.approx(2.0)
    recipe = dataclasses.replace(slow, is_recipe=True)
    assert benchmark.ratio([recipe, RESULT, fast], recipes=True) == pytest.approx(4.0)
    assert benchmark.ratio([RESULT]) is None and benchmark.ratio([RESULT, fast], recipes=True) is None


def test_a_program_is_cached_under_all_that_it_depends_on():
    setting = benchmark.Setting("a", {"remat_policy": "full"})
    name = benchmark.cache_name("maxtext", "v5p-128", setting, {})
    others = [
        benchmark.cache_name("maxtext", "v6e-256", setting, {}),
        benchmark.cache_name("maxtext", "v5p-128", setting, {"flag": "true"}),
        benchmark.cache_name("maxtext", "v5p-128", benchmark.Setting("a", {"remat_policy": "minimal"}), {}),
    ]
    assert len({name, *others}) == 4
    assert benchmark.cache_name("maxtext", "v5p-128", benchmark.Setting("b", setting.values), {}) == name


@pytest.mark.parametrize(
    ("block_q", "block_kv", "expected"), [(1024, 1024, (10, 4)), (1024, 4096, (4, 4)), (512, 1024, (20, 8))]
)
def test_tiles_of_causal_attention(block_q, block_kv, expected):
    assert benchmark.packed_attention_rates.visited(4096, block_q, block_kv) == expected


def test_parts_are_told_by_the_sizes_of_arrays():
    def part(shape, operands=(), kind="cycles", times=36, scope="jit(step)/dot_general"):
        operation = Operation("fusion.1", "fusion", shape, (), "")
        return benchmark.part_by_shape(Cost(operation, kind, "", "forward", scope, 1.0, times), list(operands))

    assert part("bf16[4,4096,12288]{2,1,0}") == part("bf16[4,4096,4096]", ["bf16[4096,12288]{1,0}"]) == "MLP"
    assert part("bf16[4,4096,151936]", times=1) == "embedding, output projection, loss"
    assert part("f32[4096]", times=1) == "optimizer and the rest"
    assert part("bf16[4,4096,4096]") == "attention projections"
    assert part("bf16[4,32,4096,128]", scope="jit(_splash_attention)/reduce_sum") == "around the attention kernel"
    assert part("bf16[4,32,4096,128]", kind="attention kernel") == "attention kernel"


def test_every_setting_of_a_side_differs_from_its_others():
    for settings in benchmark.SETTINGS.values():
        assert len({str(setting.values) for setting in settings}) == len(settings)
