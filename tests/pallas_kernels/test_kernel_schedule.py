"""The instrument: a product's schedule against what is known of it, and what it says when it cannot compile."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.checks import ArgumentError
from tests.pallas_kernels.aot import benchmark_module, needs_libtpu

schedule = benchmark_module("kernel_schedule")
SIZE, STEPS = 512, 4
TARGET = "tests.pallas_kernels.test_kernel_schedule:product"


def product(steps=STEPS, size=SIZE):
    """A matrix product over a grid, with a second matrix unit user in a branch that few steps take."""

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(0) == 2)
        def _():
            out_ref[...] += jnp.dot(b_ref[...], b_ref[...], preferred_element_type=jnp.float32)

    def f(a, b):
        return pl.pallas_call(
            kernel,
            grid=(steps,),
            in_specs=[pl.BlockSpec((size, size), lambda i: (i, 0)), pl.BlockSpec((size, size), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((size, size), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((size * steps, size), jnp.float32),
            name="product",
        )(a, b)

    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return f, (jax.ShapeDtypeStruct((size * steps, size), jnp.bfloat16), x)


def broken():
    def f(x):
        return pl.pallas_call(lambda x_ref, o_ref: None, out_shape=x, name="broken")(x, x)

    return f, (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_product_fills_the_matrix_unit(chip):
    (found,) = schedule.compile_target(TARGET, chip, {"steps": 3})
    assert found.kernel == "product" and found.chip == chip
    first, second = found.bodies
    flops = 2 * SIZE**3
    # At least the cycles that the peak needs, and not many more, filling and draining the unit included.
    assert 0.6 * schedule.ceiling(chip) < flops / first.bundles < 1.02 * schedule.ceiling(chip)
    assert 0.6 < found.use(first, "MATMUL") <= 1.0
    assert second.depth > first.depth or second.number != first.number
    assert 2 * 3 * SIZE * SIZE * 2 <= found.vmem_bytes < 64 * 2**20
    text = schedule.table([found], flops)
    assert "product" in text and f"{first.bundles:,d}" in text


@needs_libtpu
def test_what_does_not_compile_is_said_with_the_compilers_words():
    with pytest.raises(ArgumentError, match=r"broken does not compile for v5e:\n.*"):
        schedule.compile_target("tests.pallas_kernels.test_kernel_schedule:broken", "v5e")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_such_module:f"], "No module named"),
        (["kernel_schedule:missing"], "has no attribute"),
        (["kernel_schedule"], "module:function"),
        ([TARGET, "--chip", "v3"], "choose one of v5e"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments, words, capsys):
    assert schedule.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error


def test_a_pair_without_equals_is_refused(capsys):
    with pytest.raises(SystemExit):
        schedule.main([TARGET, "steps"])
    assert "is not of the form name=value" in capsys.readouterr().err


def test_a_dump_in_an_unknown_format_is_not_misread(tmp_path):
    stem = tmp_path / "1-k.1"
    analysis = 'custom-call(), custom_call_target="tpu_custom_call"'
    (tmp_path / "1-k.1-00-schedule-analysis_packed-bundles-post-ra.txt").write_text(analysis)
    (tmp_path / "1-k.1-01-packed-bundles-post-ra.txt").write_text("     0   :  { a } /* Start region 0 */\n")
    table = "== CAPACTIY:\nMATMUL, VALU\n 4 4\n== UTILIZATION:\n0 0\n0 1\n"
    (tmp_path / "1-k.1-02-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(table)
    (tmp_path / "1-k.1-03-post-delay-converter.txt").write_text("")
    assert stem.parent.exists()
    with pytest.raises(RuntimeError, match="1 bundles and its utilization table 2"):
        schedule.read(tmp_path, "v5e")
