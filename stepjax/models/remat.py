"""Rematerialisation policies by name: what a layer saves for the backward pass, and what is recomputed.

full        save only the input of every layer
attention   also save the attention kernel's results (output, log-sum-exp), so the kernel runs only once
qkv         also save the attention kernel's inputs, so their projections run only once
dots        save the results of all projections and of the attention kernel: only norms, rotary positions and activation
            functions are recomputed
none        save everything
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.flash_attention import RESIDUAL_NAMES
from stepjax.config import RematPolicy
from stepjax.models.attention import INPUT_NAME
from stepjax.sharding import target_platform

_FEW_LAYERS = 8


def run_layers(layer: Callable[[jax.Array, Any], Any], x: jax.Array, blocks: Any, policy: RematPolicy) -> jax.Array:
    """x after all layers: x = layer(x, block) for every block of the stack, under the policy of this name.

    A scan: compilation time and, with rematerialisation, memory do not grow with depth. XLA's CPU backend pays for a
    loop: it copies every layer's weights out of the stack and what the backward pass needs into it, and cannot fuse
    across iterations. A few layers that save everything are therefore unrolled there.
    """

    def step(x, block):
        return layer(x, block), None

    num_layers = len(jax.tree.leaves(blocks)[0])
    unroll = target_platform() == "cpu" and policy == "none" and num_layers <= _FEW_LAYERS
    return jax.lax.scan(_remat(step, policy), x, blocks, unroll=unroll)[0]


def _remat(layer: Callable, policy: RematPolicy) -> Callable:
    if policy == "none":
        return layer
    known, of_attention = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    policies = {
        "full": known.nothing_saveable,
        "attention": of_attention,
        "qkv": known.save_only_these_names(*RESIDUAL_NAMES, INPUT_NAME),
        # Attention scores computed by XLA are products with a batch dimension.
        "dots": known.save_from_both_policies(known.dots_with_no_batch_dims_saveable, of_attention),
    }
    # Inside a scan, the loop already keeps XLA from merging the two computations; a barrier would only add cost.
    return jax.checkpoint(layer, policy=policies[policy], prevent_cse=False)
