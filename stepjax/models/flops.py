"""Model FLOPs: what the mathematics needs, not what the hardware does. One formula for progress lines, plans and tests.

A matrix product of [m, k] by [k, n] counts as 2 m k n; nothing else counts.

    per token     2 * (decoder matrices + output projection); the embedding is a look-up
    attention     4 * heads * head_dim * layers per visible (query, key) pair; a causal segment of n tokens has
                  n (n + 1) / 2
    per view      2 * patches * encoder matrices + 4 * width * layers * patches^2, plus the two convolutions and the
                  projector at their output positions

Training costs three forward passes (one forward, two for the gradients of inputs and weights). Rematerialisation,
padding and empty slots do not count: MFU measures useful work.
"""

from stepjax.config import DecoderConfig, ModelConfig, VisionConfig, down_sampled


def decoder_flops(config: DecoderConfig, tokens: float, attention_pairs: float) -> float:
    """Forward FLOPs of the decoder, output projection included."""
    D, H = config.width, config.head_dim
    projections = 2 * D * config.num_heads * H + 2 * D * config.num_kv_heads * H
    matrices = config.num_layers * (projections + 3 * D * config.mlp_dim) + D * config.vocab_size
    attention = 4 * config.num_heads * H * config.num_layers
    return 2.0 * matrices * tokens + attention * attention_pairs


def view_flops(config: VisionConfig, decoder_width: int, grid: int) -> float:
    """Forward FLOPs of one view of grid x grid patches, from pixels to decoder embeddings."""
    E, patches = config.width, grid * grid
    block = 4 * E * E + 2 * E * config.mlp_dim
    encoder = 2 * patches * (config.num_layers * block + 3 * config.patch_size**2 * E)
    attention = 4 * E * config.num_layers * patches**2
    half = (grid - 1) // 2 + 1
    tokens = down_sampled(grid) ** 2
    convolutions = 2 * half**2 * 9 * E * (2 * E) + 2 * tokens * 9 * (2 * E) * (4 * E)
    return float(encoder + attention + convolutions + 2 * tokens * 4 * E * decoder_width)


def training_flops(
    config: ModelConfig,
    *,
    tokens: float,
    attention_pairs: float,
    global_views: float,
    crops: float,
    global_grid: int,
    crop_grid: int,
) -> float:
    """FLOPs of one optimizer step on this much content."""
    width = config.decoder.width
    vision = global_views * view_flops(config.vision, width, global_grid)
    vision += crops * view_flops(config.vision, width, crop_grid)
    return 3 * (decoder_flops(config.decoder, tokens, attention_pairs) + vision)
