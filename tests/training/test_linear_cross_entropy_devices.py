"""The vocabulary and the tokens spread over devices: same numbers, few exchanges; and compiled for TPUs.

Legend: B rows, T tokens, D width, V vocabulary.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pallas_kernels import chips
from pallas_kernels.checks import ArgumentError
from stepjax.config import MeshConfig
from stepjax.sharding import make_mesh, spec
from stepjax.training.linear_cross_entropy import token_loss_sum, token_scores
from tests.pallas_kernels.aot import compile_for, every_chip, needs_libtpu

B, T, D, V = 4, 6, 16, 48
MESHES = {
    "one device": {},
    "data": {"data": 2},
    "data and fsdp": {"data": 2, "fsdp": 2},
    "fsdp and context": {"fsdp": 2, "context": 2},
    "tensor": {"tensor": 4},
    "all but data": {"fsdp": 2, "context": 2, "tensor": 2},
}


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    config = MeshConfig(**{"fsdp": 1} | sizes)
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def weighted(log_probs, log_normalizers, weights):
    return weights * (0.1 * log_normalizers**2 - log_probs)


def case() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden_BTD, head_DV, weights_BT = (
        rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, V), (B, T))
    )
    return hidden_BTD, head_DV, rng.integers(0, V, size=(B, T)).astype(np.int32), weights_BT


def by_sum(hidden_BTD, head_DV, targets_BT, weights_BT, *, chunk: int):
    args = hidden_BTD, head_DV, targets_BT, weights_BT
    return token_loss_sum(weighted, *args, chunk=chunk)


def by_scores(hidden_BTD, head_DV, targets_BT, weights_BT, *, chunk: int):
    scores = token_scores(hidden_BTD, head_DV, targets_BT, chunk=chunk)
    return jnp.sum(weighted(scores.log_probs_BT, scores.log_normalizers_BT, weights_BT)), scores


def step(form: Callable[..., Any], chunk: int) -> Callable[..., Any]:
    """Loss, scores, and gradients by hidden states and kernel."""
    loss = lambda *args: form(*args, chunk=chunk)  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def compiled_for(mesh: jax.sharding.Mesh, form: Callable[..., Any], chunk: int, args: Any) -> Any:
    tokens = spec("batch", "length")
    specs = spec("batch", "length", None), spec("embed", "vocab"), tokens, tokens
    shardings = [NamedSharding(mesh, s) for s in specs]
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(args, shardings, strict=True)]
        out_shardings = (None, tuple(shardings[:2]))
        compiled = jax.jit(step(form, chunk), out_shardings=out_shardings).lower(*shapes).compile()
    return compiled, shardings


@pytest.fixture(scope="module")
def expected():
    """On one device, of each form."""
    return {form: jax.jit(step(form, 5))(*case()) for form in (by_sum, by_scores)}


@pytest.mark.parametrize("form", [by_sum, by_scores])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_every_mesh_gives_the_numbers_of_one_device(sizes, form, expected):
    args = case()
    compiled, shardings = compiled_for(mesh_of(**sizes), form, 5, args)
    actual = compiled(*[jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected[form]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max())


def collectives(compiled: Any) -> list[tuple[str, str, bool]]:
    """(operation, shape, whether inside a loop) of everything the devices exchange."""
    found = []
    computation, bodies = "", set(re.findall(r"body=%?([\w.\-]+)", compiled.as_text()))
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            computation = head[1]
        pattern = r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
        if match := re.search(pattern, line):  # several of one kind may be joined into one, with a tuple of shapes
            shapes = re.findall(r"\w+\[[\d,]*\]", match[1])
            found += [(match[2], shape, computation in bodies) for shape in shapes]
    return found


@pytest.mark.parametrize("form", [by_sum, by_scores])
def test_head_is_gathered_once_a_pass_and_its_gradient_exchanged_once(form):
    """And nothing else of size: in the loop over chunks, a few numbers a token where the vocabulary is spread."""
    compiled, _ = compiled_for(mesh_of(**MESHES["all but data"]), form, 4, case())
    found = collectives(compiled)
    in_loop = [shape for _, shape, looped in found if looped]
    assert in_loop and all(re.fullmatch(r"f32\[(2,)?3\]", shape) for shape in in_loop), found  # 6 tokens, two chunks
    whole, scattered = f"f32[{D},{V // 2}]", f"f32[{D // 2},{V // 2}]"
    gathers = [shape for operation, shape, _ in found if operation == "all-gather"]
    assert gathers in ([whole], [whole] * (1 if form is by_sum else 2))  # XLA may keep it for the backward pass
    assert [shape for operation, shape, _ in found if operation == "reduce-scatter"] == [scattered]
    reduced = {shape for operation, shape, looped in found if operation == "all-reduce" and not looped}
    assert whole not in reduced and scattered in reduced


def test_rows_alone_take_no_more_than_sums():
    compiled, _ = compiled_for(mesh_of(data=4), by_sum, 4, case())
    assert {operation for operation, _, _ in collectives(compiled)} == {"all-reduce"}


def test_sizes_that_do_not_divide_over_the_mesh_are_refused():
    hidden_BTD, head_DV, targets_BT, _ = case()
    with jax.set_mesh(mesh_of(data=8)), pytest.raises(ArgumentError, match="'batch' over 8 devices, and 4 is not"):
        token_scores(hidden_BTD, head_DV, targets_BT, chunk=4)


# TPU -----------------------------------------------------------------------------------------------------------------


def compiled_for_tpu(chip: str, tokens: int, width: int, vocab: int, chunk: int) -> Any:
    args = (
        jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocab), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.float32),
    )
    mesh = make_mesh(MeshConfig(fsdp=1), list(chips.compile_only_mesh(chip).devices.flat))
    return compile_for(chip, step(by_sum, chunk), *args, mesh=mesh)


def largest_array(compiled: Any) -> int:
    """Entries of the largest array in a program, those inside fusions, which never exist, included."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", compiled.as_text()))


@needs_libtpu
@every_chip
def test_step_compiles_for_tpu_and_never_holds_the_vocabulary_of_all_tokens(chip):
    tokens, width, vocab, chunk = 2048, 256, 4224, 512
    assert largest_array(compiled_for_tpu(chip, tokens, width, vocab, chunk)) == chunk * vocab


@needs_libtpu
def test_4096_tokens_of_the_public_vocabulary_take_the_memory_of_a_chunk():
    """The width is small, so that the kernel does not hide what the logits take."""
    tokens, width, vocab, chunk = 4096, 128, 151_936, 512
    compiled = compiled_for_tpu("v5e", tokens, width, vocab, chunk)
    assert largest_array(compiled) == chunk * vocab
    kernel_copy_and_grad = width * vocab * (2 + 4)
    chunk_of_logits = chunk * vocab * (4 + 2)  # float32, and their exponentials in bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < kernel_copy_and_grad + chunk_of_logits + 2**24
