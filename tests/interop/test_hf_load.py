"""Loading public checkpoints: both key layouts, several files, bfloat16, and errors that name everything at once."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepjax.config import NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.load import load_model, open_checkpoint

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")


def load_hf(directory, numerics):
    source = open_checkpoint(directory)
    return load_model(source, numerics=numerics), source.spec.images


@pytest.fixture(scope="module")
def public(tiny_dir):
    return load_file(tiny_dir / "model.safetensors")


@pytest.fixture
def checkpoint(tmp_path, tiny_dir):
    """A function that writes tensors (in several files, if told) beside the tiny config, and returns the directory."""

    def write(tensors, files=1):
        (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
        keys = list(tensors)
        for i in range(files):
            part = {key: np.ascontiguousarray(tensors[key]) for key in keys[i::files]}
            save_file(part, tmp_path / f"model-{i + 1:05d}.safetensors")
        return tmp_path

    return write


def resaved(key):
    """The key that Transformers gives a tensor when it saves the model again."""
    key = re.sub(r"^model\.", "model.language_model.", key)
    return re.sub(r"^(vision_model|vit_large_projector)\.", r"model.\1.", key)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


def test_both_key_layouts_load_to_the_same_model(tiny_vl, checkpoint, public):
    renamed = {resaved(key): value for key, value in public.items()}
    assert {"model.language_model.norm.weight", "model.vision_model.ln_pre.bias"} < renamed.keys()
    assert renamed.keys() & public.keys() == {"lm_head.weight"}
    model, images = load_hf(checkpoint(renamed), FLOAT32)
    assert_same(model, tiny_vl[0])
    assert images == tiny_vl[1]


def test_tensors_may_be_spread_over_files(tiny_vl, checkpoint, public):
    assert_same(load_hf(checkpoint(public, files=3), FLOAT32)[0], tiny_vl[0])


def test_bfloat16_tensors_keep_their_values(checkpoint, public):
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in public.items()}
    directory = checkpoint(half)
    wide, _ = load_hf(directory, FLOAT32)
    narrow, _ = load_hf(directory, NumericsConfig(param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(wide.decoder.embedding[...], half["model.embed_tokens.weight"].astype(np.float32))
    for short, long in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(short.astype(jnp.float32), long)


def test_all_problems_are_named_in_one_error(checkpoint, public):
    tensors = dict(public)
    missing = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "vision_model.ln_pre.bias"]
    for key in missing:
        del tensors[key]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((192, 64), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["vision_model.transformer.resblocks.1.attn.in_proj_bias"] = np.zeros(143, np.float32)
    with pytest.raises(CheckpointError) as error:
        load_hf(checkpoint(tensors), FLOAT32)
    message = str(error.value)
    groups = dict(part.split(": ", 1) for part in message.partition("; ")[2].split("; "))
    assert set(groups["missing"].split(", ")) == set(missing)
    assert set(groups["unexpected"].split(", ")) == {
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    }
    assert "lm_head.weight (319, 64) (expected (320, 64))" in groups["of another shape"]
    assert "resblocks.1.attn.in_proj_bias (143,) (expected (144,))" in groups["of another shape"]


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "vision_model.transformer.resblocks.0.attn.in_proj_weight",
        "vision_model.positional_embedding",
    ],
)
def test_transposed_tensor_is_refused_though_it_has_the_right_size(checkpoint, public, key):
    with pytest.raises(CheckpointError, match=rf"of another shape: {re.escape(key)}"):
        load_hf(checkpoint(public | {key: public[key].T}), FLOAT32)


def test_tensor_given_in_both_layouts_is_refused(checkpoint, public):
    key = "vision_model.ln_pre.weight"
    with pytest.raises(CheckpointError, match=rf"in both public layouts: .*{re.escape(key)}"):
        load_hf(checkpoint(public | {resaved(key): public[key]}), FLOAT32)


def test_tensor_given_in_two_files_is_refused(checkpoint, public):
    directory = checkpoint(public)
    save_file({"lm_head.weight": public["lm_head.weight"]}, directory / "model-00002.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight is in both model-00001.safetensors and model-00002"):
        load_hf(directory, FLOAT32)


def test_directories_that_hold_no_usable_checkpoint_are_refused(tmp_path, checkpoint, public):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        load_hf(tmp_path / "nowhere", FLOAT32)
    directory = checkpoint({}, files=0)
    with pytest.raises(CheckpointError, match="holds no .*safetensors"):
        load_hf(directory, FLOAT32)
    checkpoint(public)
    file = directory / "model-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_hf(directory, FLOAT32)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        load_hf(directory, FLOAT32)
    (directory / "config.json").write_text(json.dumps({"vision_config": {}}))
    with pytest.raises(CheckpointError, match="lacks the field"):
        load_hf(directory, FLOAT32)
