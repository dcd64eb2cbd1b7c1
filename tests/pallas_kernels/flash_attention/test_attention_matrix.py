"""Every implementation of flash_attention against a softmax written out with einsum, in float64.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim.

Where there is no GPU, JAX's own XLA form stands in for cuDNN, so that what is done around it is tested everywhere. On a
machine with one: `python -m pytest --noconftest tests/pallas_kernels/flash_attention/test_attention_matrix.py -k gpu`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels.flash_attention import RESIDUAL_NAMES, flash_attention
from tests.pallas_kernels import cudnn

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


@pytest.fixture(autouse=True)
def cudnn_stand_in(monkeypatch):
    if jax.default_backend() == "gpu":
        return
    cudnn.stand_in(monkeypatch)


def options(implementation: str) -> dict[str, Any]:
    if implementation != "tpu":
        return {"implementation": implementation}
    from pallas_kernels.flash_attention.tpu import BlockSizes

    # Blocks that divide no length of the cases but one, and of two sizes, so that neither stands for the other.
    blocks = BlockSizes(q=128, kv=256, q_backward=256, kv_backward=128)
    return {"implementation": "tpu", "interpret": True, "block_sizes": blocks}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and masks of one call; `segments` are the lengths of the segments of each row, negative for padding."""

    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "float32"
    causal: bool = False
    q_offset: int = 0
    q_segments: tuple[tuple[int, ...], ...] = ()
    kv_segments: tuple[tuple[int, ...], ...] = ()
    B: int = 1
    scale: float | None = None


PACKED = ((50, 40, 30, -10), (130,), (-130,))
CASES = {
    "vision": Case(T=300, S=300, N=2, K=2, H=96),
    "vision in bfloat16": Case(T=130, S=130, N=2, K=2, H=96, dtype="bfloat16"),
    "causal, grouped": Case(T=300, S=300, N=4, K=2, H=128, causal=True),
    "packed with padding": Case(T=130, S=130, N=4, K=2, H=64, causal=True, B=3, q_segments=PACKED),
    "packed in bfloat16": Case(T=130, S=130, N=2, K=1, H=128, causal=True, B=3, q_segments=PACKED, dtype="bfloat16"),
    "chunk of a prefill": Case(T=7, S=130, N=4, K=1, H=128, causal=True, q_offset=123),
    "chunk in bfloat16": Case(T=130, S=300, N=2, K=1, H=128, causal=True, q_offset=100, dtype="bfloat16"),
    "queries before every key": Case(T=130, S=130, N=2, K=1, H=64, causal=True, q_offset=-20),
    "more queries than keys, causal": Case(T=130, S=7, N=2, K=1, H=64, causal=True),
    "one query, one key": Case(T=1, S=1, N=2, K=2, H=64, causal=True),
    "cross attention": Case(
        T=130, S=300, N=2, K=2, H=96, B=2, q_segments=((60, -10, 60), (30, 100)), kv_segments=((100, 200), (-100, 200))
    ),
    "wide heads": Case(T=7, S=130, N=2, K=2, H=256, scale=0.02),
    "odd heads": Case(T=7, S=7, N=3, K=1, H=80, causal=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def on(implementation: str, case: Case) -> Case:
    """The case as the implementation can take it: cuDNN has no float32."""
    return dataclasses.replace(case, dtype="bfloat16") if implementation == "gpu" else case


def segment_ids(rows: tuple[tuple[int, ...], ...]) -> np.ndarray | None:
    """Ids from 0 in every row, -1 - i for padding."""
    if not rows:
        return None
    ids = [np.repeat([i if n > 0 else -1 - i for i, n in enumerate(row)], np.abs(row)) for row in rows]
    return np.stack(ids).astype(np.int32)


def make_inputs(case: Case, seed: int = 0):
    """q, k, v and the cotangents of output and log-sum-exp, NaN where there is padding; then the segment ids."""
    rng = np.random.default_rng([seed, case.T, case.S])
    q_ids, kv_ids = segment_ids(case.q_segments), segment_ids(case.kv_segments or case.q_segments)
    B, T, S, N, K, H = case.B, case.T, case.S, case.N, case.K, case.H

    def normal(*shape, ids):
        x = rng.standard_normal(shape).astype(np.float32)
        if ids is not None:
            x[ids < 0] = np.nan
        return x

    q, d_out, d_lse = (normal(*shape, ids=q_ids) for shape in ((B, T, N, H), (B, T, N, H), (B, T, N)))
    k, v = (normal(B, S, K, H, ids=kv_ids) for _ in range(2))
    dtype = jnp.dtype(case.dtype)
    arrays = tuple(jnp.asarray(x, dtype) for x in (q, k, v, d_out)) + (jnp.asarray(d_lse),)
    return arrays, q_ids, kv_ids


def visible(case: Case, q_ids: np.ndarray | None, kv_ids: np.ndarray | None) -> np.ndarray:
    seen = np.ones((case.B, case.T, case.S), bool)
    for b, t in np.ndindex(case.B, case.T):
        if case.causal:
            seen[b, t] &= np.arange(case.S) <= t + case.q_offset
        if q_ids is not None:
            assert kv_ids is not None
            seen[b, t] &= (kv_ids[b] == q_ids[b, t]) & (kv_ids[b] >= 0)
    return seen


def written_out(q, k, v, seen_BTS, scale, d_out, d_lse):
    """Output, log-sum-exp and the gradients of q, k and v, by the definition; a blind query has zero and -inf."""
    q, k, v, d_out, d_lse = (np.nan_to_num(np.asarray(x, np.float64)) for x in (q, k, v, d_out, d_lse))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = scale * np.einsum("BTNH,BSNH->BNTS", q, k, optimize=True)
    exps = np.where(seen_BTS[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    sums_BNT = exps.sum(-1)
    weights = exps / np.where(sums_BNT == 0, 1, sums_BNT)[..., None]
    out = np.einsum("BNTS,BSNH->BTNH", weights, v, optimize=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(sums_BNT) + scores.max(-1)).transpose(0, 2, 1)

    # The derivative of the softmax, and that of the log-sum-exp, which is the softmax.
    d_weights = np.einsum("BTNH,BSNH->BNTS", d_out, v, optimize=True)
    mean = np.sum(weights * d_weights, axis=-1, keepdims=True)
    d_scores = scale * weights * (d_weights - mean + d_lse.transpose(0, 2, 1)[..., None])
    d_q = np.einsum("BNTS,BSNH->BTNH", d_scores, k, optimize=True)
    d_k = np.einsum("BNTS,BTNH->BSNH", d_scores, q, optimize=True)
    d_v = np.einsum("BNTS,BTNH->BSNH", weights, d_out, optimize=True)
    d_k, d_v = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3) for x in (d_k, d_v))
    return out, lse, d_q, d_k, d_v


@functools.cache
def expected(case: Case):
    (q, k, v, d_out, d_lse), q_ids, kv_ids = make_inputs(case)
    scale = case.H**-0.5 if case.scale is None else case.scale
    return written_out(q, k, v, visible(case, q_ids, kv_ids), scale, d_out, d_lse)


def computed(case: Case, implementation: str):
    """A compiled function of the inputs, the offset and the segment ids, all of them traced."""

    @jax.jit
    def compute(q, k, v, d_out, d_lse, q_offset, q_ids, kv_ids):
        def call(q, k, v):
            return flash_attention(
                q,
                k,
                v,
                causal=case.causal,
                q_offset=q_offset if case.causal and case.q_offset else 0,
                q_segment_ids_BT=q_ids,
                kv_segment_ids_BS=kv_ids if case.kv_segments else None,
                scale=case.scale,
                return_lse=True,
                **options(implementation),
            )

        results, pullback = jax.vjp(call, q, k, v)
        return (*results, *pullback((d_out, d_lse)))

    return compute


@every_implementation
@every_case
def test_output_and_gradients_are_those_of_the_definition(implementation, case):
    """Of output and log-sum-exp, with NaN in the padding of inputs and cotangents; and twice the same bits."""
    case = on(implementation, case)
    arrays, q_ids, kv_ids = make_inputs(case)
    compute = computed(case, implementation)
    results = compute(*arrays, jnp.int32(case.q_offset), q_ids, kv_ids)
    again = compute(*arrays, jnp.int32(case.q_offset), q_ids, kv_ids)
    jax.tree.map(np.testing.assert_array_equal, results, again)

    blind_BT = ~visible(case, q_ids, kv_ids).any(-1)
    out, lse, dq, dk, dv = (np.asarray(x, np.float32) for x in results)
    assert not out[blind_BT].any() and not dq[blind_BT].any()
    assert np.isneginf(lse[blind_BT]).all() and np.isfinite(lse[~blind_BT]).all()
    if q_ids is not None and kv_ids is not None:
        assert not dk[kv_ids < 0].any() and not dv[kv_ids < 0].any()
    assert results[0].dtype == case.dtype and results[1].dtype == jnp.float32

    # Of the largest value. bfloat16 has 8 bits of mantissa: weights, output and gradients are rounded to it, and the
    # gradients of q and k are differences of rounded terms; scores and log-sum-exp are float32 always.
    rounding = 2**-8 if case.dtype == "bfloat16" else 4e-6
    tolerances = {"out": 2 * rounding, "lse": 4e-6, "dq": 4 * rounding, "dk": 4 * rounding, "dv": 4 * rounding}
    if implementation == "tpu" and case.dtype == "bfloat16":
        tolerances["lse"] = rounding  # the scale is folded into the queries, which rounds them once more
    for (name, tolerance), ours, wanted in zip(tolerances.items(), results, expected(case), strict=True):
        atol = tolerance * np.abs(wanted[np.isfinite(wanted)]).max(initial=1e-3)
        np.testing.assert_allclose(np.asarray(ours, np.float32), wanted, rtol=0, atol=atol, err_msg=name)


@every_implementation
def test_neither_a_new_offset_nor_new_segments_compile_anew(implementation):
    case = on(implementation, dataclasses.replace(CASES["packed with padding"], q_offset=1))
    arrays, q_ids, kv_ids = make_inputs(case)
    compute = computed(case, implementation)
    results = [
        compute(*arrays, jnp.int32(offset), ids, ids)[1] for offset in (1, -3) for ids in (q_ids, np.abs(q_ids) % 3)
    ]
    assert compute._cache_size() == 1
    assert len({np.asarray(lse).tobytes() for lse in results}) == len(results), "the arguments do take part"


@every_implementation
def test_results_over_parts_of_the_keys_merge_to_the_whole(implementation):
    """As ring attention does it; the first queries see nothing of the second part."""
    case = on(implementation, CASES["causal, grouped"])
    (q, k, v, d_out, _), _, _ = make_inputs(case)
    first = 180

    def part(q, k, v, q_offset):
        return flash_attention(q, k, v, causal=True, q_offset=q_offset, return_lse=True, **options(implementation))

    @jax.jit
    def merged_and_gradients(q, k, v):
        def merged(q, k, v):
            parts = part(q, k[:, :first], v[:, :first], 0), part(q, k[:, first:], v[:, first:], -first)
            lse = jnp.logaddexp(parts[0][1], parts[1][1])
            return sum(jnp.exp(part_lse - lse)[..., None] * out for out, part_lse in parts), lse

        (out, lse), pullback = jax.vjp(merged, q, k, v)
        return out, lse, *pullback((d_out.astype(out.dtype), jnp.zeros_like(lse)))

    whole = written_out(q, k, v, visible(case, None, None), case.H**-0.5, d_out, np.zeros(q.shape[:3]))
    rounding = 2**-7 if case.dtype == "bfloat16" else 1e-5
    for ours, wanted in zip(merged_and_gradients(q, k, v), whole, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), wanted, rtol=0, atol=2 * rounding * np.abs(np.asarray(wanted)).max()
        )


def primitives(jaxpr: Any) -> list[str]:
    """Names of all equations of a jaxpr and of those inside of them, but not of a kernel's body.

    A kernel whose results nothing uses is left out, as the compiler leaves it out: JAX's own pass keeps it.
    """
    names = []
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call" and not used & {id(v) for v in equation.outvars}:
            continue
        names.append(equation.primitive.name)
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                names += primitives(inner)
    return names


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "gpu"])
def test_policy_that_keeps_the_residuals_does_not_compute_the_output_again(implementation):
    """XLA: the scores are products once more in the backward pass, their product with the values is not."""
    case = CASES["packed with padding"]
    (q, k, v, d_out, _), q_ids, _ = make_inputs(case)
    counted = {"xla": "dot_general", "tpu": "pallas_call"}[implementation]

    def count_and_kept(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(q, k, v):
            return jnp.sin(
                flash_attention(jnp.sin(q), k, v, causal=True, q_segment_ids_BT=q_ids, **options(implementation))
            )

        def pullback(q, k, v):
            return jax.vjp(layer, q, k, v)[1]

        jaxpr = jax.make_jaxpr(lambda q, k, v: pullback(q, k, v)(d_out))(q, k, v)
        kept = jax.tree.leaves(jax.eval_shape(pullback, q, k, v))
        return primitives(jaxpr.jaxpr).count(counted), sum(x.size for x in kept)

    policies = jax.checkpoint_policies
    with_all_again, kept_least = count_and_kept(policies.nothing_saveable)
    with_residuals, kept = count_and_kept(policies.save_only_these_names(*RESIDUAL_NAMES))
    assert with_residuals == with_all_again - 1
    assert kept - kept_least in {q.size, q.size + q.size // case.H}, (
        "the output, and the log-sum-exp where it is needed"
    )
