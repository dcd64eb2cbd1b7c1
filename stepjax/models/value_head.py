"""The critic of actor-critic training: a value for every token, from a trunk of its own or from the policy's.

Legend: B rows, T tokens, D decoder width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stepjax.models.layers import constant, matrix
from stepjax.models.step_vl import StepVL


class ValueHead(nnx.Module):
    """A linear map to one number. Its values start near zero: the standard deviation of the kernel is 1 / (D + 1), as
    in Open-Reasoner-Zero and OpenRLHF.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (width,), ("norm",), fan_in=1, scale=1 / (width + 1))
        self.bias = constant(0.0, (1,), ("norm",))

    def __call__(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Float32 values. Entry t is the value of the state in which token t + 1 is chosen."""
        values_BT = jnp.einsum("BTD,D->BT", hidden_BTD.astype(jnp.float32), self.kernel[...].astype(jnp.float32))
        return values_BT + self.bias[...].astype(jnp.float32)


class Critic(nnx.Module):
    """A value head, on a trunk of its own, or on hidden states of the policy (`trunk` is None)."""

    def __init__(self, policy: StepVL, *, shares_trunk: bool, rngs: nnx.Rngs):
        trunk: Any = None
        if not shares_trunk:
            trunk = jax.tree.map(lambda leaf: leaf, policy)  # it starts as a copy of the policy
            trunk.decoder.head_kernel = nnx.data(None)  # and predicts no tokens
        self.trunk = nnx.data(trunk)
        self.head = ValueHead(policy.config.decoder.width, rngs=rngs)
