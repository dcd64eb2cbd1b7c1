"""Starting from what timm and Transformers save: the same features, and the same logits, in float32."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_recipe import config as tiny

from stepjax.config import DecoderConfig, ImageConfig, InitConfig, MeshConfig, ModelConfig, NumericsConfig, VisionConfig
from stepjax.interop.init_from import initial_model
from stepjax.sharding import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

TOLERANCE = 1e-4
FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
GRID, PATCH, WIDTH, LAYERS, HEADS = 4, 14, 32, 3, 2


@pytest.fixture(scope="module")
def encoder():
    """A tiny Perception Encoder of timm's, and the grid to which it is resized if asked."""

    def make(grid=GRID):
        # On a grid of its own the rotary positions are the patches' columns and rows, as in STEP3-VL.
        model = timm.create_model(
            "vit_pe_lang_gigantic_patch14_448",
            embed_dim=WIDTH,
            depth=LAYERS,
            num_heads=HEADS,
            mlp_ratio=1.5,
            img_size=grid * PATCH,
            ref_feat_shape=(grid, grid),
        )
        return model.float().eval()

    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model, make


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pe")
    timm.models.save_for_hf(encoder[0], directory, safe_serialization=True)
    assert (directory / "model.safetensors").exists()
    return directory


def started(model, **sources):
    grid = model.vision.position_grid
    config = dataclasses.replace(
        tiny,
        model=model,
        images=ImageConfig(global_size=grid * PATCH, crop_size=PATCH, patch_size=PATCH),
        numerics=FLOAT32,
        init_from=InitConfig(**sources),
    )
    return initial_model(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def vision(grid=GRID, activation="gelu"):
    return VisionConfig(
        width=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        mlp_dim=48,
        patch_size=PATCH,
        position_grid=grid,
        activation=activation,
    )


def close(ours, theirs):
    assert np.abs(theirs).max() > 1, "values of a size that the tolerance means something for"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def features(model, grid=GRID):
    pixels_MCHW = torch.randn((2, 3, grid * PATCH, grid * PATCH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pixels_MCHW.permute(0, 2, 3, 1).numpy(), model.forward_features(pixels_MCHW).numpy()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_of_a_perception_encoder(encoder, saved, activation):
    reference, make = encoder
    if activation == "quick_gelu":
        state, reference = reference.state_dict(), make()
        reference.load_state_dict(state)
        for block in reference.blocks:
            block.mlp.act = timm.layers.QuickGELU()
    pixels_MHWC, theirs = features(reference)
    config = ModelConfig(vision=vision(activation=activation), decoder=tiny.model.decoder)
    model, starts = started(config, vision=str(saved))
    close(model.vision(pixels_MHWC), theirs)
    differing = [note for note in starts[0].notes if "activation" in note]
    assert bool(differing) == (activation == "quick_gelu")


@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize(("resize", "antialias"), [("bilinear", False), ("bicubic", True)])
def test_features_with_a_resized_table(encoder, saved, side, resize, antialias):
    """Bicubic with antialiasing is timm's own way; torch's bicubic without it has another kernel than ours."""
    state = dict(encoder[0].state_dict())
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], (side, side), (GRID, GRID), num_prefix_tokens=0, interpolation=resize, antialias=antialias
    )
    reference = encoder[1](side)
    reference.load_state_dict(state)
    pixels_MHWC, theirs = features(reference, side)
    model, _ = started(
        ModelConfig(vision=vision(side), decoder=tiny.model.decoder),
        vision=str(saved),
        resize=resize,
        resize_antialias=antialias,
    )
    close(model.vision(pixels_MHWC), theirs)


def test_logits_of_qwen3(tmp_path):
    sizes = {"vocab_size": 97, "head_dim": 16}
    config = transformers.Qwen3Config(
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_theta=1e6,
        attn_implementation="eager",
        **sizes,
    )
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    decoder = DecoderConfig(width=48, mlp_dim=112, num_layers=3, num_heads=8, num_kv_heads=2, **sizes)
    model, _ = started(ModelConfig(vision=vision(), decoder=decoder), decoder=str(tmp_path))
    tokens_BT = np.random.default_rng(0).integers(0, 97, (2, 19))
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens_BT)).logits.numpy()
    positions_BT = np.broadcast_to(np.arange(19), tokens_BT.shape)
    hidden_BTD, _ = model.decoder(model.decoder.embed(tokens_BT), positions_BT)
    close(model.decoder.logits(hidden_BTD), theirs)
