"""The benchmark counts what it says, and its three XLA methods compute the same thing."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        # By file: its name is that of the package's folder too.
        spec = importlib.util.spec_from_file_location(
            "benchmark_of_shared_prefix", BENCHMARKS / "shared_prefix_attention.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_work_list_reads_a_prefix_once(benchmark):
    """Copies agree with the formula, to the page; a prefix's are the same for 4 sequences and for 32."""
    sizes = [benchmark.Sizes(prefix=2048, suffix=1024, sequences=n) for n in (4, 32)]
    for s in sizes:
        figures = benchmark.read_bytes(s, "v5e")
        assert figures["shared_copied"] == figures["shared_formula"]
        assert figures["per_sequence_copied"] == figures["per_sequence_formula"]
        assert figures["ratio"] == pytest.approx(3 * s.sequences / (2 + s.sequences))
    ways = [benchmark.walk_step(s, "v5e", shared=True)[0] for s in sizes]
    assert ways[0].copies == ways[1].copies == 8 * 32
    assert [dict(way.chunks) for way in ways] == [{0: 8 * 4}, {2: 8 * 4}], "bodies for 4 and for 32 sequences"


def test_a_partly_filled_page_is_copied_whole(benchmark):
    s = benchmark.Sizes(groups=1, sequences=2, prefix=64, suffix=65)
    assert benchmark.read_bytes(s, "v5e")["shared_copied"] == (1 + 2 * 2) * 64 * s.token_bytes


def test_estimates_add_up(benchmark):
    s = benchmark.Sizes(groups=2, sequences=4, prefix=1024, suffix=512)
    figures = benchmark.estimate(s, "v5e", [1000, 2000, 3000, 4000], 500)
    assert figures["shared_bundles"] == 2 * 2 * 1000 + 8 * 500
    assert figures["per_sequence_bundles"] == 8 * 3 * 500
    copied = (2 * 1024 + 8 * 512) * s.token_bytes
    assert figures["shared_hbm_us"] == pytest.approx(copied / 0.82e12 * 1e6, abs=0.1)
    both_cores = benchmark.estimate(s, "v5p", [1000, 2000, 3000, 4000], 500)
    assert both_cores["shared_hbm_us"] == pytest.approx(copied / 2.46e12 * 1e6, abs=0.1)


def test_methods_agree_and_can_be_timed(benchmark):
    s = benchmark.Sizes(2, 3, prefix=64, suffix=33, page_size=16, num_heads=4, num_kv_heads=2, width=16)
    outputs = [f(*arguments) for f, arguments in benchmark.methods(s, jnp.float32).values()]
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-5, rtol=0)
    figures = benchmark.time_steps(s, jnp.float32, repeats=1, batches=1)
    assert len(figures) == 3 and all(row["tokens_per_second"] > 0 for row in figures.values())
    jax.block_until_ready(outputs)
