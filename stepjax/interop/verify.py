"""A model against recorded inputs and activations: is what was converted still the model that it was?

Legend: B rows, T tokens, M views, P patches, E encoder width, Q features a view, D decoder width, V vocabulary.

The file is safetensors, with any of

    pixel_values [M,3,S,S], patch_pixel_values [M,3,C,C], num_patches [images]   normalised views, and crops an image
    trunk_global, trunk_crop [M,P,E]                                             the encoder's outputs
    features_global, features_crop [M,Q,D]                                       the projector's
    input_ids [1,T], logits [1,T,V], greedy_tokens [N]                           text with images, its greedy end
    text_ids [B,T], text_logits [B,T,V]                                          text alone
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from stepjax.config import ImageConfig, NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_directory import CONFIG, HFDirectory, read_json
from stepjax.interop.load import load_model, open_checkpoint
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import NO_FEATURE, StepVL
from stepjax.processing.tokenizer import load_tokenizer

FLOAT32 = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none")
_NEEDS = {
    "trunk_global": ("pixel_values",),
    "trunk_crop": ("patch_pixel_values",),
    "features_global": ("pixel_values",),
    "features_crop": ("patch_pixel_values",),
    "logits": ("input_ids", "pixel_values", "patch_pixel_values", "num_patches"),
    "greedy_tokens": ("input_ids", "pixel_values", "patch_pixel_values", "num_patches"),
    "text_logits": ("text_ids",),
}
_TEXT = ("text_logits",)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between a recorded tensor and the model's; for tokens, the number that differ."""

    name: str
    largest: float
    scale: float  # the largest recorded magnitude


def verify(path: str | Path, golden: str | Path) -> tuple[list[Difference], list[str]]:
    """Computes in float32 every recorded tensor that the model has. Returns the differences, and what was left out.

    Raises:
        CheckpointError: the model or the file cannot be read, nothing in it can be compared, or an input is missing.
    """
    recorded = _read(Path(golden))
    source = open_checkpoint(path)
    model = load_model(source, numerics=FLOAT32)
    known = _TEXT if isinstance(model, Qwen3) else tuple(_NEEDS)
    names = [name for name in known if name in recorded]
    if not names:
        raise CheckpointError(f"{golden} records none of {', '.join(known)}: there is nothing to compare")
    lacking = [f"{name} needs {key}" for name in names for key in _NEEDS[name] if key not in recorded]
    if lacking:
        raise CheckpointError(f"{golden} lacks inputs: {'; '.join(lacking)}")
    if isinstance(model, Qwen3):
        computed = _text(model, recorded)
    else:
        assert source.spec.images is not None
        computed = _all(model, recorded, source.spec.images, _image_token(source))
    inputs = {key for name in _NEEDS for key in _NEEDS[name]}
    return [_difference(name, computed[name](), recorded[name]) for name in names], sorted(
        recorded.keys() - set(names) - inputs
    )


def _difference(name: str, ours: np.ndarray, recorded: np.ndarray) -> Difference:
    if ours.shape != recorded.shape:
        raise CheckpointError(f"{name} is recorded as {recorded.shape}, and the model makes {ours.shape}")
    if name == "greedy_tokens":
        return Difference(name, float(np.sum(ours != recorded)), float(recorded.size))
    distance = np.abs(ours.astype(np.float64) - recorded)
    return Difference(name, float(distance.max()), float(np.abs(recorded).max()))


def _text(model: Qwen3, recorded: dict[str, np.ndarray]) -> dict[str, Any]:
    @jax.jit
    def logits(model: Qwen3, tokens_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD, _ = model(model.embed(tokens_BT), positions_BT)
        return model.logits(hidden_BTD)

    return {"text_logits": lambda: np.asarray(logits(model, recorded["text_ids"]))}


def _all(model: StepVL, recorded: dict[str, np.ndarray], images: ImageConfig, image_token: int) -> dict[str, Any]:
    views = {
        kind: recorded[key].transpose(0, 2, 3, 1)  # PyTorch's images are channels first
        for kind, key in (("global", "pixel_values"), ("crop", "patch_pixel_values"))
        if key in recorded
    }
    encode = jax.jit(lambda model, views_MHWC: model.vision(views_MHWC))
    project = jax.jit(lambda model, views_BMHWC: model.encode_views(views_BMHWC))

    table = jax.jit(lambda model, *views: model.feature_table(*views))

    @jax.jit
    def logits(model: StepVL, tokens_BT, feature_index_BT, features_BFD):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD, _ = model.decoder(model.embed(tokens_BT, features_BFD, feature_index_BT), positions_BT)
        return model.decoder.logits(hidden_BTD)

    @functools.cache
    def features_1FD() -> jax.Array:
        return table(model, views["global"][None], views["crop"][None])

    def features(kind: str) -> np.ndarray:
        per_view = recorded[f"features_{kind}"].shape[1:]
        return np.asarray(project(model, views[kind][None])).reshape(-1, *per_view)

    def with_images(tokens_1T: np.ndarray) -> np.ndarray:
        index_T = _feature_index(tokens_1T[0], recorded["num_patches"], images, image_token)
        return np.asarray(logits(model, tokens_1T, index_T[None], features_1FD()))

    def text_alone() -> np.ndarray:
        tokens_BT = recorded["text_ids"]
        none_BFD = np.zeros((tokens_BT.shape[0], 0, model.config.decoder.width), np.float32)
        return np.asarray(logits(model, tokens_BT, np.full(tokens_BT.shape, NO_FEATURE), none_BFD))

    def greedy() -> np.ndarray:
        prompt_T, count = recorded["input_ids"][0], recorded["greedy_tokens"].size
        # One shape for all steps; what stands behind a token does not change it.
        tokens_1T = np.concatenate([prompt_T, np.zeros(count, prompt_T.dtype)])[None]
        index_T = _feature_index(tokens_1T[0], recorded["num_patches"], images, image_token)
        for position in range(len(prompt_T), len(prompt_T) + count):
            scores = logits(model, tokens_1T, index_T[None], features_1FD())
            tokens_1T[0, position] = int(np.argmax(np.asarray(scores)[0, position - 1]))
        return tokens_1T[0, len(prompt_T) :]

    return {
        "trunk_global": lambda: np.asarray(encode(model, views["global"])),
        "trunk_crop": lambda: np.asarray(encode(model, views["crop"])),
        "features_global": lambda: features("global"),
        "features_crop": lambda: features("crop"),
        "logits": lambda: with_images(recorded["input_ids"]),
        "text_logits": text_alone,
        "greedy_tokens": greedy,
    }


def _feature_index(tokens_T: np.ndarray, num_crops: np.ndarray, images: ImageConfig, image_token: int) -> np.ndarray:
    """Rows of the feature table (all crops, then all global views) in the order of the tokens: crops, then the view."""
    counts = [int(count) for count in num_crops]
    crops = np.arange(sum(counts) * images.crop_tokens).reshape(-1, images.crop_tokens)
    views = crops.size + np.arange(len(counts) * images.global_tokens).reshape(-1, images.global_tokens)
    order, first = [], 0
    for view, count in enumerate(counts):
        order += [*crops[first : first + count].ravel(), *views[view]]
        first += count
    index_T = np.full(len(tokens_T), NO_FEATURE, np.int32)
    places = np.flatnonzero(tokens_T == image_token)
    if len(places) != len(order):
        raise CheckpointError(
            f"input_ids has {len(places)} image tokens (id {image_token}), and the views make {len(order)} features"
        )
    index_T[places] = order
    return index_T


def _image_token(source: HFDirectory | OrbaxDirectory) -> int:
    if isinstance(source, OrbaxDirectory) and source.run is not None:
        return load_tokenizer(source.run.tokenizer).special_tokens.image_patch
    directory = source.path if isinstance(source, HFDirectory) else source.side_files
    assert directory is not None
    token = read_json(directory / CONFIG).get("image_token_id")
    if not isinstance(token, int):
        raise CheckpointError(f"{directory / CONFIG} lacks image_token_id")
    return token


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
