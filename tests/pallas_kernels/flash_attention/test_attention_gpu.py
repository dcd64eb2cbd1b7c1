"""The GPU form without a GPU: JAX accepts its calls and lowers them for CUDA to cuDNN's custom calls.

The values are tested in the matrix. What cuDNN answers is not tested here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels.checks import ArgumentError
from pallas_kernels.flash_attention import RESIDUAL_NAMES, flash_attention
from tests.pallas_kernels import cudnn

IDS = jnp.zeros((2, 130), jnp.int32)


@pytest.fixture
def cudnn_present(monkeypatch):
    cudnn.present(monkeypatch)


def qkv(T=130, S=130, H=64):
    shapes = (2, T, 4, H), (2, S, 2, H), (2, S, 2, H)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


def cudnn_calls(f, *args) -> list[tuple[str, str]]:
    """Name and mask type of every call of cuDNN in the program that is lowered for CUDA."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"@__cudnn\$(\w+).*?mask_type\\22: \\22(\w+)\\22", text)


@pytest.mark.parametrize(
    "T, S, options, call, mask",
    [
        (130, 130, {}, "fmhaSoftmax", "NO_MASK"),
        (131, 130, {}, "fmhaSoftmax", "NO_MASK"),
        (130, 131, {}, "fmhaScaleBiasSoftmax", "NO_MASK"),
        (131, 131, {"causal": True}, "fmhaSoftmax", "CAUSAL"),
        (130, 130, {"causal": True, "q_segment_ids_BT": IDS}, "fmhaScaleBiasSoftmax", "CAUSAL"),
        (7, 131, {"causal": True, "q_offset": 124}, "fmhaScaleBiasSoftmax", "NO_MASK"),
    ],
)
def test_calls_lower_to_cudnn_forward_and_backward(cudnn_present, T, S, options, call, mask):
    """With a dense mask (a bias to cuDNN) only where it must be; for odd lengths too, which JAX refuses in training."""

    def out(q, k, v):
        return flash_attention(q, k, v, implementation="gpu", **options)

    def value_and_gradients(q, k, v):
        return jax.value_and_grad(lambda *qkv: jnp.sum(out(*qkv).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    assert cudnn_calls(out, *qkv(T, S)) == [(call, mask)]
    assert cudnn_calls(value_and_gradients, *qkv(T, S)) == [(call, mask), (f"{call}Backward", mask)]


def test_without_a_mask_the_call_is_the_one_of_jax(cudnn_present):
    """The same program, so the same speed."""

    def ours(q, k, v):
        return flash_attention(q, k, v, causal=True, scale=0.5, implementation="gpu")

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.5, implementation="cudnn")

    def program(f):
        text = jax.jit(lambda *qkv: f(*qkv)).trace(*qkv()).lower(lowering_platforms=("cuda",)).as_text()
        return [re.sub(r"%\w+", "%", line) for line in text.splitlines() if "stablehlo" in line]

    assert program(ours) == program(theirs)


def test_policy_that_keeps_the_residuals_runs_the_forward_once(cudnn_present):
    def calls_and_kept(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(q, k, v):
            return jnp.sin(flash_attention(jnp.sin(q), k, v, implementation="gpu"))

        value_and_grad = jax.value_and_grad(lambda *qkv: jnp.sum(layer(*qkv).astype(jnp.float32)))
        residuals = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(layer, *qkv)[1], *qkv()))
        return sorted(name for name, _ in cudnn_calls(value_and_grad, *qkv())), sum(x.size for x in residuals)

    policies = jax.checkpoint_policies
    calls_of_none, kept_of_none = calls_and_kept(policies.nothing_saveable)
    calls, kept = calls_and_kept(policies.save_only_these_names(*RESIDUAL_NAMES))
    assert calls_of_none == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert calls == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    B, T, N, H = qkv()[0].shape
    assert kept - kept_of_none == B * T * N * H + B * T * N, "the output and the softmax statistics, once each"


@pytest.mark.parametrize("H", [20, 264])
def test_head_dims_that_no_gpu_takes_are_refused(H):
    with pytest.raises(ArgumentError, match=f"H is {H}; cuDNN takes multiples of 8 up to 256"):
        jax.eval_shape(lambda *qkv: flash_attention(*qkv, implementation="gpu"), *qkv(H=H))


def test_head_dim_that_this_gpu_does_not_take_is_refused(cudnn_present):
    """JAX takes a device that it does not know for one older than Hopper."""
    with pytest.raises(ArgumentError, match="use 'xla'.*<= 128"):
        jax.eval_shape(lambda *qkv: flash_attention(*qkv, implementation="gpu"), *qkv(H=256))


def test_absence_of_cudnn_is_told(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    with pytest.raises(ArgumentError, match="use 'xla': cuDNN is not detected"):
        jax.eval_shape(lambda *qkv: flash_attention(*qkv, implementation="gpu"), *qkv())
