"""From encoder patches to decoder embeddings: two stride-2 convolutions (16 x fewer tokens) and one linear layer.

Legend: M views, P patches, E encoder width, Q tokens of a view after the convolutions, D decoder width, O channels out.

No activation or norm in between. 52 x 52 patches become 13 x 13 = 169 tokens, 36 x 36 become 81.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stepjax.config import ModelConfig, NumericsConfig, down_sampled
from stepjax.models.layers import constant, matrix, project
from stepjax.sharding import constrain


class DownSampler(nnx.Module):
    """Convolution of kernel 3, stride 2 and padding 1 on every side, with bias."""

    def __init__(self, dim_in: int, dim_out: int, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (3, 3, dim_in, dim_out), ("pixels", "pixels", "mlp", "embed"), fan_in=9 * dim_in)
        self.bias = constant(0.0, (dim_out,), ("norm",))

    def __call__(self, x_MHWE: jax.Array) -> jax.Array:
        """[M, h, w, E] to [M, (h - 1) // 2 + 1, (w - 1) // 2 + 1, O]."""
        num_views, height, width, channels = x_MHWE.shape
        rows, columns = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        # Pad one on both sides, like PyTorch; "SAME" would pad only the far side. The nine taps form one matrix
        # product: five times faster than XLA's convolution gradient on CPU, the same operation on TPU.
        padded = jnp.pad(x_MHWE, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [padded[:, y : y + 2 * rows - 1 : 2, x : x + 2 * columns - 1 : 2] for y in range(3) for x in range(3)]
        kernel = self.kernel.astype(x_MHWE.dtype).reshape(9 * channels, -1)
        # Without this constraint, the partitioner gathers all taps for the kernel's gradient.
        taps_MHWT = constrain(jnp.concatenate(taps, axis=-1), "views", None, None, None)
        y_MHWO = project("MHWT,TO->MHWO", taps_MHWT, kernel) + self.bias.astype(x_MHWE.dtype)
        return constrain(y_MHWO, "views", None, None, None)


class Projector(nnx.Module):
    """Compress the features of a view 16-fold and map them into the decoder's embedding space."""

    def __init__(self, config: ModelConfig, numerics: NumericsConfig, *, rngs: nnx.Rngs):
        E, D = config.vision.width, config.decoder.width
        self.numerics = numerics
        self.down1 = DownSampler(E, 2 * E, rngs=rngs)
        self.down2 = DownSampler(2 * E, 4 * E, rngs=rngs)
        self.kernel = matrix(rngs, (4 * E, D), ("mlp", "embed"), fan_in=4 * E)
        self.bias = constant(0.0, (D,), ("norm",)) if config.projector_bias else None

    def __call__(self, x_MPE: Float[Array, "M P E"]) -> Float[Array, "M Q D"]:
        """Encoder features [M, grid^2, E] to decoder embeddings [M, Q, D], both row-major."""
        return constrain(self.projected(self.downsampled(x_MPE)), "views", None, "act_embed")

    def downsampled(self, x_MPE: Float[Array, "M P E"]) -> Float[Array, "M Q O"]:
        """The convolutions: [M, grid^2, E] to [M, Q, 4 E]."""
        num_views, patches, width = x_MPE.shape
        grid = int(patches**0.5)
        assert grid * grid == patches, patches
        x = self.down2(self.down1(x_MPE.reshape(num_views, grid, grid, width)))
        return x.reshape(num_views, down_sampled(grid) ** 2, 4 * width)

    def projected(self, x_MQO: Float[Array, "M Q O"]) -> Float[Array, "M Q D"]:
        """The linear layer: [M, Q, 4 E] to [M, Q, D]."""
        y_MQD = project("MQO,OD->MQD", x_MQO, self.kernel.astype(x_MQO.dtype))
        return y_MQD if self.bias is None else y_MQD + self.bias.astype(y_MQD.dtype)
