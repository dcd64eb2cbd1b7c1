"""The whole model: its size, its feature table, and what may and may not influence a token.

Legend: B rows, T tokens, G global-view slots, C crop slots, F features of a row.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.config import ModelConfig, NumericsConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack
from stepjax.models.step_vl import NO_FEATURE, abstract_model, init_model, num_parameters


@pytest.fixture(scope="module")
def row_logits():
    """A function from a model and a packed row to logits [T, V]."""

    @jax.jit
    def logits_TV(model, row):
        hidden_BTD = model(
            tokens_BT=row["tokens_T"][None],
            positions_BT=row["positions_T"][None],
            segment_ids_BT=row["segment_ids_T"][None],
            feature_index_BT=row["feature_index_T"][None],
            global_views_BGHWC=row["global_views_GHWC"][None],
            crops_BCHWC=row["crops_CHWC"][None],
        )
        return model.decoder.logits(hidden_BTD)[0]

    return lambda model, row: np.asarray(logits_TV(model, row))


@pytest.fixture(scope="module")
def budget(small_images):
    return RowBudget(tokens=64, global_views=3, crops=4, images=small_images)


@pytest.fixture(scope="module")
def two_examples(make_example):
    """Two images with two crops and one, and one image without crops: 33 and 15 tokens."""
    return make_example(4, (1, 2), 3, (1, 1), 4, seed=1), make_example(3, (0, 0), 6, seed=2)


def packed(budget, *examples):
    return pack([Sample(example, domain=0) for example in examples], budget)


# Size ----------------------------------------------------------------------------------------------------------------


def test_the_public_model_has_exactly_its_parameters_and_takes_no_memory():
    before = {id(array) for array in jax.live_arrays()}
    model = abstract_model(ModelConfig())
    assert {id(array) for array in jax.live_arrays()} <= before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))

    assert num_parameters(model) == 10_171_750_144
    vision, projector, decoder = model.vision, model.projector, model.decoder
    parts = {
        "patches": (vision.patch_kernel, 903_168),
        "positions": (vision.positions, 4_153_344),
        "first norm": (vision.norm_pre, 3_072),
        "encoder blocks": (vision.blocks, 47 * 36_988_160),
        "encoder": (vision, 1_743_503_104),
        "first down-sampler": (projector.down1, 42_470_400),
        "second down-sampler": (projector.down2, 169_875_456),
        "projection": (projector.kernel, 25_165_824),
        "decoder": (decoder, 8_190_735_360),
    }
    assert {name: num_parameters(part) for name, (part, _) in parts.items()} == {
        name: expected for name, (_, expected) in parts.items()
    }
    assert vision.blocks.mlp.up_kernel.shape == (47, 1536, 8960)
    assert decoder.blocks.attention.k_kernel.shape == (36, 4096, 8, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_configured_dtype(small_config, dtype):
    model = abstract_model(small_config, NumericsConfig(param_dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}


# Initial values ------------------------------------------------------------------------------------------------------


def test_initial_values_are_those_of_the_table(initial_model, small_config):
    width, layers = 32, 2  # of both towers
    residual = 1 / math.sqrt(2 * layers)
    encoder, decoder, projector = initial_model.vision.blocks, initial_model.decoder.blocks, initial_model.projector
    expected = [
        (initial_model.vision.patch_kernel, 1 / math.sqrt(3 * 4 * 4)),
        (encoder.attention.qkv_kernel, 1 / math.sqrt(width)),
        (encoder.attention.out_kernel, residual / math.sqrt(width)),
        (encoder.mlp.down_kernel, residual / math.sqrt(48)),
        (projector.down1.kernel, 1 / math.sqrt(9 * width)),
        (projector.down2.kernel, 1 / math.sqrt(9 * 2 * width)),
        (projector.kernel, 1 / math.sqrt(4 * width)),
        (decoder.attention.q_kernel, 1 / math.sqrt(width)),
        (decoder.attention.out_kernel, residual / math.sqrt(width)),
        (decoder.mlp.gate_kernel, 1 / math.sqrt(width)),
        (decoder.mlp.down_kernel, residual / math.sqrt(48)),
        (initial_model.decoder.embedding, small_config.init_range),
        (initial_model.decoder.head_kernel, 1 / math.sqrt(width)),
    ]
    for param, std in expected:
        values = np.asarray(param[...])
        # Five standard errors of an estimated standard deviation and mean.
        assert values.std() == pytest.approx(std, rel=5 / math.sqrt(2 * values.size))
        assert abs(values.mean()) < 5 * std / math.sqrt(values.size)
    kernels_LDNH = np.asarray(decoder.attention.q_kernel[...])
    assert np.abs(kernels_LDNH[0] - kernels_LDNH[1]).max() > 0.1, "layers differ"
    for param, value in [
        (decoder.norm1.scale, 1),
        (encoder.norm2.scale, 1),
        (encoder.norm2.bias, 0),
        (encoder.attention.qkv_bias, 0),
        (encoder.scale1, small_config.vision.layer_scale_init),
    ]:
        np.testing.assert_array_equal(param[...], np.float32(value))


def test_another_seed_gives_other_values_everywhere(initial_model, small_config):
    """That the same seed gives the same values, tests/test_sharding.py shows."""
    other = init_model(small_config, NumericsConfig(), seed=jax.random.key(4))
    for (path, first), second in zip(
        jax.tree_util.tree_leaves_with_path(initial_model), jax.tree.leaves(other), strict=True
    ):
        drawn = np.ptp(first) > 0
        assert drawn == (not np.array_equal(first, second)), jax.tree_util.keystr(path)


# Features ------------------------------------------------------------------------------------------------------------


def test_feature_table_has_crops_first_and_views_in_order(small_model, two_examples):
    example, _ = two_examples
    table_BFD = jax.jit(lambda model, *views: model.feature_table(*views))(
        small_model, example.global_views[None], example.crops[None]
    )
    encode = jax.jit(lambda model, views_BMHWC: model.encode_views(views_BMHWC))
    parts = [encode(small_model, views[:, None]).reshape(-1, 32) for views in (example.crops, example.global_views)]
    assert table_BFD.shape == (1, 3 * 1 + 2 * 4, 32)
    expected_FD = np.concatenate(parts)
    np.testing.assert_allclose(table_BFD[0], expected_FD, rtol=0, atol=2e-6 * np.abs(expected_FD).max())


def test_features_replace_the_image_tokens_and_no_other_embedding(small_model, two_examples):
    example, _ = two_examples
    features_BFD = np.random.default_rng(0).standard_normal((1, 11, 32)).astype(np.float32)
    x_TD = small_model.embed(example.tokens[None], features_BFD, example.feature_index[None])[0]
    is_feature_T = example.feature_index != NO_FEATURE
    assert is_feature_T.sum() == 11
    embedding_VD = np.asarray(small_model.decoder.embedding[...])
    np.testing.assert_array_equal(x_TD[~is_feature_T], embedding_VD[example.tokens[~is_feature_T]])
    # In the order of the text: the two crops of image 0, its view, the crop of image 1, its view.
    order = [0, 1, 3, 4, 5, 6, 2, 7, 8, 9, 10]
    np.testing.assert_array_equal(x_TD[is_feature_T], features_BFD[0, order])


# Influence -----------------------------------------------------------------------------------------------------------


def test_packed_examples_equal_each_alone(small_model, two_examples, budget, row_logits):
    together = row_logits(small_model, packed(budget, *two_examples))
    start = 0
    for example in two_examples:
        length = len(example.tokens)
        alone = row_logits(small_model, packed(budget, example))
        np.testing.assert_allclose(together[start : start + length], alone[:length], rtol=0, atol=1e-5)
        start += length


def test_order_of_packing_changes_nothing(small_model, two_examples, budget, row_logits):
    first, second = two_examples
    forward = row_logits(small_model, packed(budget, first, second))
    backward = row_logits(small_model, packed(budget, second, first))
    n, m = len(first.tokens), len(second.tokens)
    np.testing.assert_allclose(backward[m : m + n], forward[:n], rtol=0, atol=1e-5)
    np.testing.assert_allclose(backward[:m], forward[n : n + m], rtol=0, atol=1e-5)


def test_empty_slots_and_padding_influence_nothing(small_model, two_examples, budget, row_logits):
    row = packed(budget, *two_examples)
    used = sum(len(example.tokens) for example in two_examples)
    noisy = {key: value.copy() for key, value in row.items()}
    noisy["crops_CHWC"][3:] = 100.0  # 3 of 4 crops are in use; all 3 global views are
    noisy["tokens_T"][used:] = 17
    before, after = row_logits(small_model, row), row_logits(small_model, noisy)
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(before[:used], after[:used])


def test_pixels_influence_their_image_and_what_follows_only(small_model, two_examples, budget, row_logits):
    row = packed(budget, *two_examples)
    before = row_logits(small_model, row)
    length = len(two_examples[0].tokens)
    for view, slot in (("crops_CHWC", 0), ("crops_CHWC", 2), ("global_views_GHWC", 1)):
        changed = {key: value.copy() for key, value in row.items()}
        changed[view][slot] += np.random.default_rng(1).standard_normal(changed[view][slot].shape)
        moved_T = np.abs(row_logits(small_model, changed) - before).max(axis=-1) > 1e-5
        feature = slot if view == "crops_CHWC" else 4 + 4 * slot
        first = int(np.flatnonzero(row["feature_index_T"] == feature)[0])
        assert not moved_T[:first].any(), "earlier tokens"
        assert moved_T[first:length].all(), "later tokens of the example"
        assert not moved_T[length:].any(), "the other example"


def test_text_without_images_needs_no_view_slots(small_model, make_example, small_images, row_logits):
    example = make_example(20, seed=5)
    without = row_logits(small_model, packed(RowBudget(64, 0, 0, small_images), example))
    with_slots = row_logits(small_model, packed(RowBudget(64, 1, 2, small_images), example))
    np.testing.assert_allclose(without[:20], with_slots[:20], rtol=0, atol=1e-5)
