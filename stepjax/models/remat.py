"""Rematerialisation policies by name: what the backward pass keeps of a layer, and what it computes again.

full        keep the input of every layer only
attention   keep what the attention kernel computed of every layer (output, log-sum-exp), so that it runs only once
qkv         keep what enters the attention kernel besides, so that its projections run only once
dots        keep the results of all projections and of the attention kernel: only norms, rotary positions and activation
            functions are computed again
none        keep everything
"""

from collections.abc import Callable

import jax

from pallas_kernels.flash_attention import RESIDUAL_NAMES
from stepjax.config import RematPolicy
from stepjax.models.attention import INPUT_NAME


def remat(layer: Callable, policy: RematPolicy) -> Callable:
    """`layer` under the policy of this name."""
    if policy == "none":
        return layer
    known, of_attention = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    policies = {
        "full": known.nothing_saveable,
        "attention": of_attention,
        "qkv": known.save_only_these_names(*RESIDUAL_NAMES, INPUT_NAME),
        # Scores, where XLA makes them, are products with a batch dimension.
        "dots": known.save_from_both_policies(known.dots_with_no_batch_dims_saveable, of_attention),
    }
    # Inside a scan the loop itself keeps XLA from merging the two computations; the barrier would only cost.
    return jax.checkpoint(layer, policy=policies[policy], prevent_cse=False)
