"""What flash_attention refuses: at trace time, by name, with the remedy."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.checks import ArgumentError
from pallas_kernels.flash_attention import flash_attention

B, T, S, N, K, H = 2, 8, 12, 4, 2, 16
IDS_BT, IDS_BS = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)


def call(q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, H), dtypes=("float32",) * 3, **options):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip((q, k, v), dtypes, strict=True)]
    return jax.eval_shape(lambda q, k, v: flash_attention(q, k, v, **options), *arrays)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"q": (T, N, H)}, r"q_BTNH has shape \(8, 4, 16\); it must be \[B, T, N, H\]"),
        ({"k": (B, S, K, H + 1)}, r"k_BSKH has shape \(2, 12, 2, 17\); .* = \[2, any, any, 16\]"),
        ({"v": (B, S + 1, K, H)}, "v_BSKH has shape"),
        ({"k": (B, S, 3, H), "v": (B, S, 3, H)}, "q_BTNH has 4 heads and k_BSKH 3; .* multiple"),
        ({"k": (B, 0, K, H), "v": (B, 0, K, H)}, "S is 0"),
        ({"dtypes": ("float32", "bfloat16", "bfloat16")}, "k_BSKH is bfloat16; cast it to one of float32"),
        ({"dtypes": ("int32",) * 3}, "q_BTNH is int32; cast it to one of bfloat16, float16, float32"),
        ({"dtypes": ("float32",) * 3, "implementation": "gpu"}, "q_BTNH is float32; cast it .* bfloat16, float16"),
        ({"dtypes": ("float16",) * 3, "implementation": "tpu"}, "q_BTNH is float16; cast it .* bfloat16, float32"),
        ({"implementation": "triton"}, "implementation is 'triton'; choose one of 'xla', 'tpu', 'gpu'"),
        ({"interpret": True}, "interpret=True is only for the TPU kernel"),
        ({"block_sizes": object()}, "block_sizes are only for the TPU kernel"),
        ({"q_offset": 3}, "q_offset is 3, but has no meaning without causal=True"),
        ({"q_offset": jnp.int32(3)}, "q_offset is an array, but has no meaning without causal=True"),
        ({"q_offset": jnp.zeros(2, jnp.int32), "causal": True}, r"q_offset has shape \(2,\); it must be a scalar"),
        ({"q_offset": jnp.float32(3), "causal": True}, "q_offset is float32; cast it to one of int32"),
        ({"q_segment_ids_BT": IDS_BT}, "kv_segment_ids_BS is missing; .* 8 queries and 12 keys"),
        ({"kv_segment_ids_BS": IDS_BS}, "q_segment_ids_BT is missing"),
        ({"q_segment_ids_BT": IDS_BS, "kv_segment_ids_BS": IDS_BS}, r"q_segment_ids_BT has shape \(2, 12\)"),
        ({"q_segment_ids_BT": IDS_BT, "kv_segment_ids_BS": IDS_BS[:1]}, r"kv_segment_ids_BS has shape \(1, 12\)"),
        ({"q_segment_ids_BT": IDS_BT, "kv_segment_ids_BS": IDS_BS > 0}, "kv_segment_ids_BS is bool; cast .* int32"),
        ({"scale": float("nan")}, "scale is nan; it must be a finite Python number"),
        ({"scale": jnp.float32(1)}, "scale is .*; it must be a finite Python number"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, message):
    with pytest.raises(ArgumentError, match=message):
        call(**options)


def test_results_have_the_documented_shapes_and_dtypes():
    assert call() == jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    out, lse = call(dtypes=("bfloat16",) * 3, return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((B, T, N, H), jnp.bfloat16, (B, T, N), jnp.float32)


def test_segment_ids_of_either_side_alone_serve_for_both():
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, 2, H)) for i in range(3))
    ids_BT = jnp.arange(T)[None] // 3 + jnp.zeros((B, 1), jnp.int32)
    both = flash_attention(q, k, v, q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT)
    for name in ("q_segment_ids_BT", "kv_segment_ids_BS"):
        assert (flash_attention(q, k, v, **{name: ids_BT}) == both).all()
    assert (flash_attention(q, k, v) != both).any()
