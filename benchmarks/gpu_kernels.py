"""The kernels' stages of gpu.py: numerics of the GPU routes, and the speed of attention.

Legend: B rows, T query tokens, S key tokens, N query heads, K key-value heads, H head dim, D width, V vocabulary.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu import DRY, Figures, run_stage, tell

from pallas_kernels.checks import ArgumentError
from pallas_kernels.flash_attention import flash_attention, gpu_packed
from pallas_kernels.sampling import sample
from pallas_kernels.shared_prefix_attention import PageTables, shared_prefix_attention
from stepjax.training.linear_cross_entropy import token_scores

TOLERANCE = 0.03  # of the largest value, in bfloat16


def arrays(B: int, T: int, S: int, N: int, K: int, H: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(jnp.bfloat16) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def packed(*rows: tuple[int, ...]) -> np.ndarray:
    """Segment ids of rows with segments of these lengths, negative for padding."""
    ids = [np.repeat([i if n > 0 else -1 for i, n in enumerate(row)], np.abs(row)) for row in rows]
    return np.stack(ids).astype(np.int32)


def even(T: int, segments: int, rows: int) -> np.ndarray:
    return packed(*[(T // segments,) * segments] * rows)


# Numerics ------------------------------------------------------------------------------------------------------------


def attention_cases() -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    text = dict(B=2, T=256, S=256, N=8, K=2, H=128)
    uneven = packed((1, 100, 3, 120, -32), (7, 240, -9))
    yield "causal", text, dict(causal=True)
    yield "packed by 4, uneven, padding", text, dict(causal=True, ids=uneven)
    yield "packed by 1", text, dict(causal=True, ids=even(256, 1, 2))
    yield "packed by 16", text, dict(causal=True, ids=even(256, 16, 2))
    yield "packed by 64 and an empty row", text, dict(causal=True, ids=packed((4,) * 64, (-256,)))
    yield "packed, full", dict(B=2, T=256, S=256, N=4, K=4, H=64), dict(ids=uneven)
    yield "packed, odd length", dict(B=1, T=131, S=131, N=4, K=2, H=64), dict(causal=True, ids=packed((60, 50, -21)))
    yield "full, 96", dict(B=2, T=144, S=144, N=4, K=4, H=96), {}
    yield "odd length", dict(B=2, T=131, S=131, N=4, K=2, H=64), dict(causal=True)
    yield "odd length, full", dict(B=1, T=81, S=81, N=4, K=4, H=96), {}
    yield "offset", dict(B=1, T=64, S=256, N=8, K=2, H=128), dict(causal=True, q_offset=192)


def attention_results(implementation: str, dtype: Any, inputs: list[np.ndarray], ids: Any, **options: Any) -> list:
    """The output and the gradients of q, k and v."""

    def loss(q, k, v):
        out = flash_attention(q, k, v, q_segment_ids_BT=ids, implementation=implementation, **options)  # type: ignore
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*(jnp.asarray(x, dtype) for x in inputs))
    return [out, *gradients]


def decoding_results(dtype: Any) -> list[jax.Array]:
    """Four sequences, three of which share a prefix of 130 tokens."""
    rng = np.random.default_rng(1)
    tables = PageTables(
        prefix_pages_PM=np.array([[7, 8, 9]], np.int32),
        prefix_lengths_P=np.array([130], np.int32),
        group_of_B=np.array([0, -1, 0, 0], np.int32),
        suffix_pages_BM=np.array([[3, 4], [1, 2], [5, 0], [6, 0]], np.int32),
        suffix_lengths_B=np.array([70, 99, 12, 1], np.int32),
    )
    q, pool = rng.standard_normal((4, 8, 128)), rng.standard_normal((10, 2, 2, 64, 128))
    call = jax.jit(lambda q, pool: shared_prefix_attention(q, pool, tables, implementation="xla"))
    return [call(jnp.asarray(q, dtype), jnp.asarray(pool, dtype))]


def sampling_results() -> list[jax.Array]:
    rows, vocab = 16, 1000
    rng = np.random.default_rng(2)
    call = jax.jit(sample, static_argnames="implementation")
    drawn = call(
        jnp.asarray(3 * rng.standard_normal((rows, vocab)), jnp.float32),
        seeds_B2=jnp.asarray(rng.integers(0, 2**32, (rows, 2)), jnp.uint32),
        positions_B=jnp.arange(rows, dtype=jnp.int32),
        temperature_B=jnp.asarray([0.0, 0.7, 1.0, 1.3] * 4, jnp.float32),
        top_k_B=jnp.asarray([0] * 8 + [50] * 8, jnp.int32),
        top_p_B=jnp.asarray([1.0] * 4 + [0.9] * 12, jnp.float32),
        min_p_B=jnp.zeros(rows, jnp.float32),
        implementation="xla",
    )
    return list(drawn)


def loss_results(dtype: Any) -> list[jax.Array]:
    rng = np.random.default_rng(3)
    hidden, head = rng.standard_normal((2, 64, 128)), 0.1 * rng.standard_normal((128, 1000))
    targets = jnp.asarray(rng.integers(0, 1000, (2, 64)), jnp.int32)

    def loss(hidden, head):
        return -jnp.mean(token_scores(hidden, head, targets, chunk=32).log_probs_BT)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(hidden, dtype), jnp.asarray(head, dtype))
    return [value, *gradients]


def numerics() -> None:
    """Errors relative to the largest value, so that bfloat16 answers of any size compare."""
    found: Figures = {"packed layout": {}, "errors": {}}
    wrong = []
    cpu = jax.local_devices(backend="cpu")[0]

    def compare(name: str, parts: tuple[str, ...], run: Callable[[], list], exact: list[np.ndarray], limit: float):
        try:
            results = [np.asarray(x, np.float32) for x in run()]
        except ArgumentError as error:  # no cuDNN on the CPU
            found["errors"][name] = str(error)[:160]
            wrong.extend([] if DRY else [name])
            return
        errors = [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(results, exact, strict=True)]
        found["errors"][name] = dict(zip(parts, errors, strict=True))
        if not max(errors) <= limit:  # NaN included
            wrong.append(name)
        tell(found)

    def on_cpu(run: Callable[..., list], *args: Any, **options: Any) -> list[np.ndarray]:
        with jax.default_device(cpu), jax.default_matmul_precision("highest"):
            return [np.asarray(x, np.float32) for x in run(*args, **options)]

    parts = ("out", "dq", "dk", "dv")
    for name, shape, options in itertools.islice(attention_cases(), 2 if DRY else None):
        ids = options.pop("ids", None)
        inputs = arrays(**shape)
        exact = on_cpu(attention_results, "xla", jnp.float32, inputs, ids, **options)
        if ids is not None:
            q, k = (
                jax.ShapeDtypeStruct((*x.shape[:1], x.shape[1] + x.shape[1] % 2, *x.shape[2:]), x.dtype)
                for x in inputs[:2]
            )
            available: Any = gpu_packed.available
            found["packed layout"][name] = available(q, k, causal=options.get("causal", False))
        for route in ("gpu", "xla") if name == "causal" else ("gpu",):
            compare(
                f"attention, {name}: {route}",
                parts,
                lambda route=route, inputs=inputs, ids=ids, options=options: attention_results(
                    route, jnp.bfloat16, inputs, ids, **options
                ),
                exact,
                TOLERANCE,
            )
    exact = on_cpu(decoding_results, jnp.float32)
    compare("decoding attention", ("out",), lambda: decoding_results(jnp.bfloat16), exact, TOLERANCE)
    exact = on_cpu(loss_results, jnp.float32)
    compare("loss", ("loss", "d_hidden", "d_head"), lambda: loss_results(jnp.bfloat16), exact, TOLERANCE)
    exact = on_cpu(sampling_results)
    compare("sampling", ("tokens", "log_probs", "sampling_log_probs"), sampling_results, exact, 1e-4)
    assert not wrong, f"wrong: {wrong}"


# Speed of attention --------------------------------------------------------------------------------------------------


class Side:
    """One way to compute: a call that starts it, and one that waits for it."""

    def __init__(self, start: Callable[[], Any], wait: Callable[[Any], Any], temporary: int | None = None):
        self.start, self.wait, self.temporary = start, wait, temporary
        self.rates: list[float] = []
        for _ in range(2):
            wait(start())
        began = time.perf_counter()
        wait(start())
        once = time.perf_counter() - began
        self.calls = 1 if DRY else max(3, min(50, math.ceil(0.04 / once)))

    def measure(self, flops: float) -> None:
        """Calls are queued, so that the time is the device's and not that of starting one and waiting for it."""
        began, result = time.perf_counter(), None
        for _ in range(self.calls):
            result = self.start()
        self.wait(result)
        self.rates.append(flops * self.calls / (time.perf_counter() - began) / 1e12)


def jax_side(call: Callable[..., Any], *args: jax.Array) -> Side:
    compiled = jax.jit(call).lower(*args).compile()
    memory = compiled.memory_analysis()
    temporary = None if memory is None else int(memory.temp_size_in_bytes)
    return Side(lambda: compiled(*args), jax.block_until_ready, temporary)


def with_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda *qkv: jnp.sum(forward(*qkv).astype(jnp.float32)), (0, 1, 2))


def torch_sides(shape: dict[str, int], causal: bool, segments: int | None) -> dict[str, Callable[[bool], Side]]:
    """PyTorch's kernels by name: cuDNN's, its flash attention, and that one over packed rows."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    device = "cpu" if DRY else "cuda"
    B, T, N, K, H = (shape[name] for name in "BTNKH")

    def side(backward: bool, shapes: list[tuple[int, ...]], attend: Callable[..., Any]) -> Side:
        q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=backward) for s in shapes)
        cotangent = torch.ones_like(q)

        def start() -> None:
            out = attend(q, k, v)
            if backward:
                torch.autograd.grad(out, (q, k, v), cotangent)

        return Side(start, lambda _: None if DRY else torch.cuda.synchronize())

    def unpacked(backend: Any) -> Callable[[bool], Side]:
        def attend(q, k, v):
            with sdpa_kernel([backend]):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=N != K)

        return lambda backward: side(backward, [(B, heads, T, H) for heads in (N, K, K)], attend)

    def packed_rows(backward: bool) -> Side:
        from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

        assert segments is not None
        length = T // segments
        ends = torch.arange(0, B * T + 1, length, device=device, dtype=torch.int32)

        def attend(q, k, v):
            # Older versions take no grouped queries.
            k, v = (x if N == K else x.repeat_interleave(N // K, 1) for x in (k, v))
            try:
                return varlen_attn(q, k, v, ends, ends, length, length, window_size=(-1, 0))
            except TypeError:
                return varlen_attn(q, k, v, ends, ends, length, length, is_causal=True)

        return side(backward, [(B * T, heads, H) for heads in (N, K, K)], attend)

    if segments is not None:
        return {"PyTorch, varlen_attn": packed_rows}
    return {
        "PyTorch, cuDNN": unpacked(SDPBackend.MATH if DRY else SDPBackend.CUDNN_ATTENTION),
        "PyTorch, flash": unpacked(SDPBackend.MATH if DRY else SDPBackend.FLASH_ATTENTION),
    }


def attention() -> None:
    text = dict(B=4, T=4096, S=4096, N=32, K=8, H=128)
    shapes = {
        "4,096 tokens, causal, D=128, 32/8 heads": (text, True, None),
        "4,096 tokens, packed by four": (text, True, 4),
        "2,704 patches, D=96": (dict(B=8, T=2704, S=2704, N=16, K=16, H=96), False, None),
        "4,096 tokens, packed by sixteen": (text, True, 16),
        "1,296 patches, D=96": (dict(B=32, T=1296, S=1296, N=16, K=16, H=96), False, None),
        "4,096 tokens, packed by one": (text, True, 1),
    }
    found: Figures = {"unit": "TFLOP/s of useful work; temporaries in MB", "shapes": {}}
    for i, (name, (shape, causal, segments)) in enumerate(itertools.islice(shapes.items(), 2 if DRY else None)):
        if DRY:
            shape = dict(B=1, T=64, S=64, N=4, K=2, H=16)
        found["shapes"][name] = rows = {}
        measure_shape(shape, causal, segments, with_xla=i == 0 or DRY, rows=rows, after=lambda: tell(found))


def measure_shape(
    shape: dict[str, int],
    causal: bool,
    segments: int | None,
    *,
    with_xla: bool,
    rows: dict[str, Figures],
    after: Callable[[], None],
) -> None:
    """Fills `rows`, calling `after` for each direction."""
    q, k, v = (jnp.asarray(x) for x in arrays(**shape))
    B, T, N, H = q.shape
    ids = None if segments is None else jnp.asarray(even(T, segments, B))
    length = T // (segments or 1)
    pairs = B * (segments or 1) * (length * (length + 1) / 2 if causal else length * length)

    def ours(which: Any) -> Callable[..., jax.Array]:
        return lambda q, k, v: flash_attention(q, k, v, causal=causal, q_segment_ids_BT=ids, implementation=which)

    def library(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=None if DRY else "cudnn")

    def maker(forward: Callable[..., jax.Array]) -> Callable[[bool], Side]:
        return lambda backward: jax_side(with_gradients(forward) if backward else forward, q, k, v)

    makers = {"ours, gpu": maker(ours("gpu"))}
    if segments is None:
        makers["cuDNN by JAX"] = maker(library)
    if with_xla:
        makers["ours, xla"] = maker(ours("xla"))
    makers |= torch_sides(shape, causal, segments)
    for direction, products in (("forward", 2), ("forward and backward", 7)):
        sides = {}
        for side, make in makers.items():
            row = rows.setdefault(side, {})
            try:
                sides[side] = make(direction != "forward")
            except Exception as error:  # noqa: BLE001 - such as out of memory; the others are to be measured
                row[direction] = f"{type(error).__name__}: {str(error)[:160]}"
        for _, (side, measured) in itertools.product(range(3), sides.items()):  # in turns
            measured.measure(2 * products * N * H * pairs)
            rows[side][direction] = round(statistics.median(measured.rates), 1)
            if measured.temporary is not None:
                rows[side][f"temporaries, {direction}"] = round(measured.temporary / 1e6)
        after()


if __name__ == "__main__":
    run_stage({"numerics": numerics, "attention": attention})
