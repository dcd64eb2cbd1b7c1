"""Low-rank adapters (LoRA, arXiv 2106.09685): a kernel W acts as W + scale * A B, and only A and B are trained.

Adapters are a flat dict of parameters, named after the kernel they adapt, and stacked over layers like it:

    decoder/blocks/attention/q_kernel      [L, D, N, H]
    decoder/blocks/attention/q_kernel/a    [L, D, R]       uniform, as PEFT initialises it
    decoder/blocks/attention/q_kernel/b    [L, R, N, H]    zero, so that training starts from the model itself

They are float32, whatever the model's dtype. Training applies them beside the kernel (`adapted`), which needs neither
the product A B nor the kernel's gradient. Inference and export add the product to the kernel (`merged`).

Legend: L layers, D width, N heads, H head dim, R rank.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from stepjax.config import LoraConfig
from stepjax.sharding import is_param, matching, named_leaves, parameter_name

Adapters = dict[str, Any]  # nnx.Params by name
Model = TypeVar("Model")

# The kernels that `layers.project` takes as they are, and that PyTorch has as linear layers.
_ADAPTABLE = re.compile(r"decoder/blocks/(attention|mlp)/\w+_kernel|projector/kernel")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel with its adapter, in the kernel's place; `layers.project` applies it."""

    kernel: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})

    def astype(self, dtype: Any) -> "Adapted":
        return Adapted(self.kernel.astype(dtype), self.a.astype(dtype), self.b.astype(dtype), self.scale)


def targets(config: LoraConfig, model: Any) -> dict[str, nnx.Param]:
    """The kernels that the configuration selects, by name.

    Raises:
        ConfigError: a pattern is malformed, or matches no kernel that can have an adapter.
    """
    kernels = {name: leaf for name, leaf in named_leaves(model).items() if _ADAPTABLE.fullmatch(name)}
    chosen = {name for pattern in config.targets for name in matching(pattern, list(kernels), "lora.targets")}
    return {name: leaf for name, leaf in kernels.items() if name in chosen}


def init_adapters(config: LoraConfig, model: Any, seed: int) -> Adapters:
    """New adapters for a model, abstract or not; to be traced. Random values derive from the seed and the name."""
    adapters: Adapters = {}
    for name, kernel in targets(config, model).items():
        axes = kernel.get_metadata()["axes"]
        inputs = num_inputs(axes)
        stack, shape = kernel.shape[: -len(axes)], kernel.shape[-len(axes) :]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        bound = 1 / math.sqrt(math.prod(shape[:inputs]))
        a = jax.random.uniform(key, (*stack, *shape[:inputs], config.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, config.rank, *shape[inputs:]), jnp.float32)
        adapters[f"{name}/a"] = nnx.Param(a, axes=(*axes[:inputs], "rank"))
        adapters[f"{name}/b"] = nnx.Param(b, axes=("rank", *axes[inputs:]))
    return adapters


def num_inputs(axes: tuple[str, ...]) -> int:
    """How many of a kernel's dimensions are contracted: the width alone, or all but the width."""
    return 1 if axes[0] == "embed" else len(axes) - 1


def adapted(config: LoraConfig, model: Model, adapters: Adapters) -> Model:
    """The model with `Adapted` kernels: differentiate it with respect to the adapters."""
    return _replaced(model, adapters, lambda kernel, a, b: Adapted(kernel, a, b, config.scale))


@functools.partial(jax.jit, static_argnums=0)
def merged(config: LoraConfig, model: Model, adapters: Adapters) -> Model:
    """A plain model with the adapters added to its kernels, in the kernels' dtype. Sums are float32."""

    def merge(kernel: nnx.Param, a: nnx.Param, b: nnx.Param) -> nnx.Param:
        def one(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            update = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
            return (w.astype(jnp.float32) + config.scale * update).astype(w.dtype)

        axes = kernel.get_metadata()["axes"]
        add = jax.vmap(one) if len(kernel.shape) > len(axes) else one
        return jax.tree.map(lambda w: add(w, a[...], b[...]), kernel)

    return _replaced(model, adapters, merge)


def _replaced(model: Model, adapters: Adapters, replace: Callable[[Any, Any, Any], Any]) -> Model:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)
    named = [(parameter_name(path), leaf) for path, leaf in pairs]
    leaves = [
        replace(leaf, adapters[f"{n}/a"], adapters[f"{n}/b"]) if f"{n}/a" in adapters else leaf for n, leaf in named
    ]
    return jax.tree.unflatten(treedef, leaves)
