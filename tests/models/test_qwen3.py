"""The decoder against a straight-line float64 reading of its definition, with its cache, packing and rematerialisation.

Legend: B rows, T tokens, D width, N query heads, K key-value heads, H head dim, V vocabulary.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.config import DecoderConfig, NumericsConfig
from stepjax.models.layers import RMSNorm, rotary_1d, rotate_halves
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import abstract_model

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
QWEN = DecoderConfig(
    vocab_size=50, width=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, max_positions=64
)
LLAMA = dataclasses.replace(QWEN, qk_norm=False, tie_embeddings=True, num_kv_heads=1, rope_theta=10_000.0)
TOKENS_BT = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module", params=[QWEN, LLAMA], ids=["qwen3", "llama"])
def decoder(request, small_config, randomized):
    config = dataclasses.replace(small_config, decoder=request.param)
    return randomized(abstract_model(config, FLOAT32).decoder)


def positions_of(tokens_BT):
    return np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)


@jax.jit
def logits(decoder: Qwen3, tokens_BT, positions_BT, segment_ids_BT=None):
    hidden_BTD, _ = decoder(decoder.embed(tokens_BT), positions_BT, segment_ids_BT)
    return decoder.logits(hidden_BTD)


def with_numerics(decoder: Qwen3, numerics: NumericsConfig) -> Qwen3:
    decoder = jax.tree.map(lambda leaf: leaf, decoder)
    decoder.numerics = numerics
    return decoder


# References: loops over elements, in the words of the specification
# -----------------------------------------------------


def rotate_reference(x_TNH, theta):
    """The pair (x[i], x[i + H/2]) turns by position * theta^(-2i/H)."""
    out, half = np.array(x_TNH, np.float64), x_TNH.shape[-1] // 2
    for position, head, i in np.ndindex(x_TNH.shape[0], x_TNH.shape[1], half):
        angle = position * theta ** (-2 * i / x_TNH.shape[-1])
        low, high = float(x_TNH[position, head, i]), float(x_TNH[position, head, i + half])
        out[position, head, i] = low * math.cos(angle) - high * math.sin(angle)
        out[position, head, i + half] = high * math.cos(angle) + low * math.sin(angle)
    return out


def decoder_reference(decoder, tokens_T):
    """Logits [T, V] of one sequence in float64."""
    config, blocks = decoder.config, decoder.blocks
    attention, mlp = blocks.attention, blocks.mlp

    def norm(x, module, layer=...):
        scale = np.asarray(module.scale[...], np.float64)[layer]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def times(x, kernel, layer, axes=1):
        return np.tensordot(x, np.asarray(kernel[...], np.float64)[layer], axes)

    x_TD = np.asarray(decoder.embedding[...], np.float64)[tokens_T]
    for layer in range(config.num_layers):
        normed = norm(x_TD, blocks.norm1, layer)
        q_TNH, k_TKH = times(normed, attention.q_kernel, layer), times(normed, attention.k_kernel, layer)
        v_TKH = times(normed, attention.v_kernel, layer)
        if config.qk_norm:
            q_TNH, k_TKH = norm(q_TNH, attention.q_norm, layer), norm(k_TKH, attention.k_norm, layer)
        q_TNH, k_TKH = rotate_reference(q_TNH, config.rope_theta), rotate_reference(k_TKH, config.rope_theta)
        attended_TNH = np.zeros_like(q_TNH)
        for t, n in np.ndindex(q_TNH.shape[:2]):
            group = n // (config.num_heads // config.num_kv_heads)
            scores = k_TKH[: t + 1, group] @ q_TNH[t, n] / math.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            attended_TNH[t, n] = weights @ v_TKH[: t + 1, group] / weights.sum()
        x_TD = x_TD + times(attended_TNH, attention.out_kernel, layer, 2)
        normed = norm(x_TD, blocks.norm2, layer)
        gate = times(normed, mlp.gate_kernel, layer)
        x_TD = x_TD + times(gate / (1 + np.exp(-gate)) * times(normed, mlp.up_kernel, layer), mlp.down_kernel, layer)
    head = decoder.embedding[...].T if config.tie_embeddings else decoder.head_kernel[...]
    return norm(x_TD, decoder.norm) @ np.asarray(head, np.float64)


# Claims
# -----------------------------------------------------------------------------------------------------------------


def test_rotary_rotates_the_two_halves():
    x_TNH = np.random.default_rng(0).standard_normal((9, 2, 8)).astype(np.float32)
    cos_BTH, sin_BTH = rotary_1d(jnp.arange(9)[None], dataclasses.replace(QWEN, head_dim=8, rope_theta=1e4))
    rotated = rotate_halves(jnp.asarray(x_TNH)[None], cos_BTH, sin_BTH)[0]
    np.testing.assert_allclose(rotated, rotate_reference(x_TNH, 1e4), atol=2e-6)


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(64, 1e-6)
    x = jnp.asarray(200 + np.random.default_rng(0).standard_normal((3, 64)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), jnp.asarray(exact, jnp.bfloat16))


def test_logits_equal_the_reference(decoder):
    out = logits(decoder, TOKENS_BT, positions_of(TOKENS_BT))
    assert out.dtype == jnp.float32
    for row, tokens_T in zip(out, TOKENS_BT, strict=True):
        np.testing.assert_allclose(row, decoder_reference(decoder, tokens_T), rtol=0, atol=2e-5)


def test_a_token_changes_no_logits_before_it(decoder):
    for t in (3, 11):
        changed_BT = TOKENS_BT.copy()
        changed_BT[:, t] = (changed_BT[:, t] + 7) % 50
        before = np.asarray(logits(decoder, TOKENS_BT, positions_of(TOKENS_BT)))
        after = np.asarray(logits(decoder, changed_BT, positions_of(TOKENS_BT)))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (np.abs(before[:, t:] - after[:, t:]).max(axis=-1) > 1e-4).all()


def test_packed_sequences_do_not_see_each_other(decoder):
    lengths = (5, 4, 3)
    segment_ids_BT = np.tile(np.repeat([1, 2, 3], lengths), (2, 1))
    positions_BT = np.tile(np.concatenate([np.arange(n) for n in lengths]), (2, 1))
    packed_BTV = np.asarray(logits(decoder, TOKENS_BT, positions_BT, segment_ids_BT))
    for end, n in zip(np.cumsum(lengths), lengths, strict=True):
        alone_BT = np.roll(TOKENS_BT, n - end, axis=1)  # what follows it is invisible to it
        alone_BTV = logits(decoder, alone_BT, positions_of(alone_BT))
        np.testing.assert_allclose(packed_BTV[:, end - n : end], alone_BTV[:, :n], rtol=0, atol=1e-5)


def test_yarn_is_the_published_interpolation():
    """Against Transformers' formulas, written out: short waves stay, long ones are slowed by the factor."""
    config = dataclasses.replace(QWEN, head_dim=64, rope_theta=1e6, yarn_factor=2.0, yarn_trained_positions=65_536)
    cos_BTH, sin_BTH = rotary_1d(jnp.array([[1]]), config)
    angles_H = np.arctan2(np.asarray(sin_BTH[0, 0], np.float64), np.asarray(cos_BTH[0, 0], np.float64))
    plain_H = 1e6 ** (-np.arange(0, 64, 2) / 64)
    low, high = (64 * np.log(65_536 / (turns * 2 * np.pi)) / (2 * np.log(1e6)) for turns in (32, 1))
    ramp_H = np.clip((np.arange(32) - np.floor(low)) / (np.ceil(high) - np.floor(low)), 0, 1)
    np.testing.assert_allclose(angles_H, plain_H / 2 * ramp_H + plain_H * (1 - ramp_H), rtol=1e-4)
    assert angles_H[0] == pytest.approx(1.0, rel=1e-6) and angles_H[-1] == pytest.approx(plain_H[-1] / 2, rel=1e-4)


def test_scanned_layers_equal_a_python_loop(decoder):
    positions_BT = positions_of(TOKENS_BT)
    config = decoder.config
    rotary = rotary_1d(positions_BT, config)

    @jax.jit
    def looped(decoder):
        x_BTD = decoder.embed(TOKENS_BT)
        for layer in range(config.num_layers):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], decoder.blocks)
            x_BTD, _ = block(x_BTD, rotary, (None, None), None, decoder.numerics)
        return decoder.logits(decoder.norm(x_BTD))

    np.testing.assert_allclose(looped(decoder), logits(decoder, TOKENS_BT, positions_BT), rtol=0, atol=2e-6)


def test_rematerialisation_does_not_change_the_result(small_config, randomized):
    decoder = randomized(abstract_model(dataclasses.replace(small_config, decoder=QWEN), FLOAT32).decoder)

    @partial(jax.jit, static_argnames="remat")
    def value_and_grad(decoder, remat):
        def loss(decoder):
            decoder = with_numerics(decoder, dataclasses.replace(FLOAT32, remat=remat))
            hidden_BTD, _ = decoder(decoder.embed(TOKENS_BT), positions_of(TOKENS_BT))
            log_probs = jax.nn.log_softmax(decoder.logits(hidden_BTD)[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_probs, TOKENS_BT[:, 1:, None], axis=-1))

        return jax.value_and_grad(loss)(decoder)

    loss, grads = value_and_grad(decoder, "none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads)), "every parameter takes part"
    for remat in ("full", "dots", "attention"):
        other_loss, other_grads = value_and_grad(decoder, remat)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())


def test_rematerialisation_keeps_what_its_policy_says(small_config):
    """Numbers kept from the forward for the backward pass: what the vector-Jacobian product closes over."""
    decoder = abstract_model(dataclasses.replace(small_config, decoder=QWEN), FLOAT32).decoder

    def kept(remat):
        def residuals(decoder):
            def hidden(x_BTD):
                return with_numerics(decoder, dataclasses.replace(FLOAT32, remat=remat))(x_BTD, positions_of(TOKENS_BT))

            return jax.vjp(lambda x_BTD: hidden(x_BTD)[0], decoder.embed(TOKENS_BT))[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, decoder)))

    layers, heads, head_dim = QWEN.num_layers, QWEN.num_heads, QWEN.head_dim
    assert kept("none") > kept("dots") > kept("attention") > kept("full")
    assert kept("attention") - kept("full") == layers * TOKENS_BT.size * heads * head_dim


def test_tied_embeddings_have_no_head_and_are_the_head(decoder):
    tied = decoder.config.tie_embeddings
    assert (decoder.head_kernel is None) == tied
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(decoder)}
    assert any("head_kernel" in name for name in names) != tied
    assert any("q_norm" in name for name in names) == decoder.config.qk_norm
    if tied:
        np.testing.assert_array_equal(decoder.head(), decoder.embedding[...].T)


def test_bfloat16_compute_keeps_float32_logits_close(decoder):
    numerics = NumericsConfig(compute_dtype="bfloat16", remat="none")
    decoder = jax.tree.map(lambda leaf: np.asarray(leaf) / 3, decoder)  # smaller, so that rounding is not amplified
    exact = np.asarray(logits(decoder, TOKENS_BT, positions_of(TOKENS_BT)))
    rounded = logits(with_numerics(decoder, numerics), TOKENS_BT, positions_of(TOKENS_BT))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.02 * np.abs(exact).max())
