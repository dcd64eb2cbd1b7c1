"""What the operation computes, all logits at once, in float32 and the highest precision.

Legend: B rows, T tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp


def token_scores(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the targets, log-normalizers, and 1 where no token is likelier than the target; [B, T]."""
    hidden_BTD, kernel_DV = hidden_BTD.astype(jnp.float32), kernel_DV.astype(jnp.float32)
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, kernel_DV, precision=jax.lax.Precision.HIGHEST)
    log_normalizers_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    likeliest_BT = target_logits_BT >= jnp.max(logits_BTV, axis=-1)
    return target_logits_BT - log_normalizers_BT, log_normalizers_BT, likeliest_BT.astype(jnp.float32)
