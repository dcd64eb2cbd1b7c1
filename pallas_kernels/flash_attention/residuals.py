"""Names of what the backward pass needs of the forward pass beside q, k and v, for rematerialisation policies.

`jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)` keeps them, and the attention is not computed again.
"""

OUT_NAME = "flash_attention_out"  # [B, T, N, H] in the input's dtype
LSE_NAME = (
    "flash_attention_lse"  # [B, T, N] float32; the XLA form has no need of it and keeps it only if it is asked for
)
RESIDUAL_NAMES = (OUT_NAME, LSE_NAME)
