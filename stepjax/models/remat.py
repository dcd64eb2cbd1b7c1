"""Rematerialisation policies by name: what the backward pass keeps of a layer, and what it computes again.

none        keep everything
full        keep the input of every layer only
dots        keep the results of matrix products that have no batch dimension (projections, not attention scores)
attention   keep what the attention kernel computed of every layer (output, log-sum-exp), so that it runs only once
"""

from collections.abc import Callable

import jax

from pallas_kernels.flash_attention import RESIDUAL_NAMES
from stepjax.config import RematPolicy


def remat(layer: Callable, policy: RematPolicy) -> Callable:
    """`layer` under the policy of this name."""
    if policy == "none":
        return layer
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "attention": jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES),
    }
    # Inside a scan the loop itself keeps XLA from merging the two computations; the barrier would only cost.
    return jax.checkpoint(layer, policy=policies[policy], prevent_cse=False)
