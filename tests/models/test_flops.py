"""The FLOPs formulas against XLA's own count of the unrolled computation, and against hand counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from stepjax.config import DecoderConfig, ModelConfig, NumericsConfig, VisionConfig
from stepjax.models.flops import decoder_flops, training_flops, view_flops
from stepjax.models.layers import rotary_1d, rotary_2d
from stepjax.models.step_vl import abstract_model

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
# Wide enough that what is not a matrix product stays small.
CONFIG = ModelConfig(
    vision=VisionConfig(width=256, num_layers=2, num_heads=4, mlp_dim=1024, patch_size=14, position_grid=8),
    decoder=DecoderConfig(
        vocab_size=2048, width=256, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=1024
    ),
)
ROWS, TOKENS = 2, 64


@pytest.fixture(scope="module")
def model():
    return abstract_model(CONFIG, FLOAT32)


def counted(f, *shapes):
    """What XLA counts; it counts the body of a loop once, so `f` must not have one."""
    return jax.jit(f).lower(*shapes).compile().cost_analysis()["flops"]


def layer_of(blocks, layer):
    return jax.tree.map(lambda leaf: leaf[layer], blocks)


def decoder_logits(decoder, tokens_BT):
    config = decoder.config
    positions_BT = jnp.broadcast_to(jnp.arange(TOKENS), (ROWS, TOKENS))
    x_BTD = decoder.embed(tokens_BT)
    rotary = rotary_1d(positions_BT, config)
    for layer in range(config.num_layers):
        x_BTD, _ = layer_of(decoder.blocks, layer)(x_BTD, rotary, (None, None), None, FLOAT32)
    return decoder.logits(decoder.norm(x_BTD))


def test_decoder_forward_and_training_are_what_xla_counts(model):
    tokens_BT = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    # XLA multiplies the masked pairs too, so they count here: TOKENS^2 a row, not the visible half.
    forward = decoder_flops(CONFIG.decoder, ROWS * TOKENS, ROWS * TOKENS**2)
    assert counted(decoder_logits, model.decoder, tokens_BT) == pytest.approx(forward, rel=0.03)

    def loss(decoder, tokens_BT):
        return jnp.sum(jnp.square(decoder_logits(decoder, tokens_BT)))

    assert counted(jax.grad(loss), model.decoder, tokens_BT) == pytest.approx(3 * forward, rel=0.05)


@pytest.mark.parametrize("grid", [8, 6])
def test_view_is_what_xla_counts(model, grid):
    def features(model, views_MHWC):
        vision, patches = model.vision, grid * grid
        x = views_MHWC.reshape(-1, grid, 14, grid, 14 * 3).transpose(0, 1, 3, 2, 4).reshape(-1, patches, 14 * 14 * 3)
        x_MPE = x @ vision.patch_kernel.reshape(14 * 14 * 3, -1)
        cos_PH, sin_PH = rotary_2d(grid, vision.config.head_dim, vision.config.rope_theta)
        for layer in range(vision.config.num_layers):
            x_MPE = layer_of(vision.blocks, layer)(x_MPE, cos_PH, sin_PH, FLOAT32)
        return model.projector(x_MPE)

    views_MHWC = jax.ShapeDtypeStruct((3, 14 * grid, 14 * grid, 3), jnp.float32)
    expected = 3 * view_flops(CONFIG.vision, CONFIG.decoder.width, grid)
    assert counted(features, model, views_MHWC) == pytest.approx(expected, rel=0.03)


def test_published_sizes_by_hand():
    """Two FLOPs a parameter a token, for the parameters that are multiplied by."""
    decoder = DecoderConfig()
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    multiplied = 8_190_735_360 - 151_936 * 4096 - norms
    assert decoder_flops(decoder, 1, 0) == 2 * multiplied
    assert decoder_flops(decoder, 0, 1) == 4 * 36 * 32 * 128

    block = 4 * 1536**2 + 2 * 1536 * 8960
    patches, half, tokens = 52 * 52, 26 * 26, 13 * 13
    by_hand = patches * 3 * 14 * 14 * 1536 + 47 * (patches * block + 2 * patches**2 * 1536)
    by_hand += half * 9 * 1536 * 3072 + tokens * 9 * 3072 * 6144 + tokens * 6144 * 4096
    assert view_flops(VisionConfig(), 4096, 52) == 2 * by_hand


def test_tying_the_embeddings_saves_parameters_and_no_flops():
    tied = dataclasses.replace(DecoderConfig(), tie_embeddings=True)
    assert decoder_flops(tied, 7, 11) == decoder_flops(DecoderConfig(), 7, 11)


def test_a_step_is_three_forward_passes_over_its_content():
    content = {"tokens": 100.0, "attention_pairs": 700.0, "global_views": 2.0, "crops": 5.0}
    total = training_flops(CONFIG, **content, global_grid=8, crop_grid=6)
    views = 2 * view_flops(CONFIG.vision, 256, 8) + 5 * view_flops(CONFIG.vision, 256, 6)
    assert math.isclose(total, 3 * (decoder_flops(CONFIG.decoder, 100, 700) + views))
