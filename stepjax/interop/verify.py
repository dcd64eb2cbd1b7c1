"""Compares a model with recorded inputs and activations: did the conversion preserve the model?

Legend: B rows, T tokens, M views, P patches, E encoder width, Q features per view, F features of all views, D decoder
width, V vocabulary.

The recording is a safetensors file with any of

    pixel_values [M,3,S,S], patch_pixel_values [M,3,C,C], num_patches [images]   normalised views, crops per image
    trunk_global, trunk_crop [M,P,E]                                             encoder outputs
    features_global, features_crop [M,Q,D]                                       projector outputs
    input_ids [1,T], logits [1,T,V], greedy_tokens [N]                           text with images, greedy continuation
    text_ids [B,T], text_logits [B,T,V]                                          text only
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from stepjax.config import ImageConfig, NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop.hf_directory import CONFIG, HFDirectory
from stepjax.interop.load import load_model, open_checkpoint
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import NO_FEATURE, StepVL
from stepjax.processing.tokenizer import load_tokenizer

FLOAT32 = NumericsConfig(param_dtype="float32", compute_dtype="float32", remat="none")
_WITH_IMAGES = ("input_ids", "pixel_values", "patch_pixel_values", "num_patches")
_NEEDS = {
    "trunk_global": ("pixel_values",),
    "trunk_crop": ("patch_pixel_values",),
    "features_global": ("pixel_values",),
    "features_crop": ("patch_pixel_values",),
    "logits": _WITH_IMAGES,
    "greedy_tokens": _WITH_IMAGES,
    "text_logits": ("text_ids",),
}

Recorded = dict[str, np.ndarray]
Computations = dict[str, Callable[[], jax.Array | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference between a recorded tensor and the model's; for tokens, how many differ."""

    name: str
    largest: float
    scale: float  # the largest recorded magnitude


def verify(path: str | Path, golden: str | Path) -> tuple[list[Difference], list[str]]:
    """Computes every comparable recorded tensor in float32. Returns the differences and the names left out.

    Raises:
        CheckpointError: the model or the file cannot be read, nothing is comparable, or an input is missing.
    """
    try:
        recorded = load_file(golden)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{golden} cannot be read as safetensors: {error}") from error
    source = open_checkpoint(path)
    model = load_model(source, numerics=FLOAT32)
    known = ["text_logits"] if isinstance(model, Qwen3) else list(_NEEDS)
    names = [name for name in known if name in recorded]
    if not names:
        raise CheckpointError(f"{golden} has nothing to compare; it may record {', '.join(known)}")
    lacking = [f"{name} needs {key}" for name in names for key in _NEEDS[name] if key not in recorded]
    if lacking:
        raise CheckpointError(f"{golden} lacks inputs: {'; '.join(lacking)}")
    decoder = model if isinstance(model, Qwen3) else model.decoder
    computed: Computations = {"text_logits": lambda: _logits(decoder, decoder.embed(jnp.asarray(recorded["text_ids"])))}
    if isinstance(model, StepVL):
        computed |= _with_images(model, recorded, source)
    inputs = {key for keys in _NEEDS.values() for key in keys}
    left_out = sorted(recorded.keys() - set(names) - inputs)
    return [_difference(name, np.asarray(computed[name]()), recorded[name]) for name in names], left_out


def _difference(name: str, ours: np.ndarray, recorded: np.ndarray) -> Difference:
    if ours.shape != recorded.shape:
        raise CheckpointError(f"{name} is recorded as {recorded.shape}, but the model computes {ours.shape}")
    if name == "greedy_tokens":
        return Difference(name, float(np.sum(ours != recorded)), float(recorded.size))
    distance = np.abs(ours.astype(np.float64) - recorded)
    return Difference(name, float(distance.max()), float(np.abs(recorded).max()))


@jax.jit
def _logits(decoder: Qwen3, embedded_BTD: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(embedded_BTD.shape[1]), embedded_BTD.shape[:2])
    hidden_BTD, _ = decoder(embedded_BTD, positions_BT)
    return decoder.logits(hidden_BTD)


def _with_images(model: StepVL, recorded: Recorded, source: HFDirectory | OrbaxDirectory) -> Computations:
    images = source.spec.images
    assert images is not None
    image_token = _image_token(source)
    views = {
        kind: recorded[key].transpose(0, 2, 3, 1)  # PyTorch images are channels-first
        for kind, key in (("global", "pixel_values"), ("crop", "patch_pixel_values"))
        if key in recorded
    }
    encode = jax.jit(lambda model, views_MHWC: model.vision(views_MHWC))
    embed = jax.jit(lambda model, *inputs: model.embed(*inputs))
    project = jax.jit(lambda model, patches_MPE: model.projector(patches_MPE))

    @cache
    def trunk(kind: str) -> jax.Array:
        return encode(model, views[kind])

    @cache
    def features(kind: str) -> jax.Array:
        return project(model, trunk(kind))

    @cache
    def features_1FD() -> jax.Array:
        tables = [features(kind) for kind in ("crop", "global") if len(views[kind])]
        return jnp.concatenate([table_MQD.reshape(1, -1, table_MQD.shape[-1]) for table_MQD in tables], axis=1)

    def logits(tokens_1T: np.ndarray) -> jax.Array:
        index_T = _feature_index(tokens_1T[0], recorded["num_patches"], images, image_token)
        return _logits(model.decoder, embed(model, tokens_1T, features_1FD(), index_T[None]))

    def greedy() -> np.ndarray:
        prompt_T, count = recorded["input_ids"][0], recorded["greedy_tokens"].size
        # One shape for all steps: later tokens do not affect earlier ones.
        tokens_1T = np.concatenate([prompt_T, np.zeros(count, prompt_T.dtype)])[None]
        for position in range(len(prompt_T), len(prompt_T) + count):
            tokens_1T[0, position] = int(jnp.argmax(logits(tokens_1T)[0, position - 1]))
        return tokens_1T[0, len(prompt_T) :]

    return {
        "trunk_global": lambda: trunk("global"),
        "trunk_crop": lambda: trunk("crop"),
        "features_global": lambda: features("global"),
        "features_crop": lambda: features("crop"),
        "logits": lambda: logits(recorded["input_ids"]),
        "greedy_tokens": greedy,
    }


def _feature_index(tokens_T: np.ndarray, num_crops: np.ndarray, images: ImageConfig, image_token: int) -> np.ndarray:
    """Maps tokens (per image: crops, then global view) to feature table rows (all crops, then all global views)."""
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
            f"input_ids has {len(places)} image tokens (id {image_token}), but the views have {len(order)} features"
        )
    index_T[places] = order
    return index_T


def _image_token(source: HFDirectory | OrbaxDirectory) -> int:
    if isinstance(source, OrbaxDirectory) and source.run is not None:
        return load_tokenizer(source.run.tokenizer).special_tokens.image_patch
    fields = source.config if isinstance(source, HFDirectory) else source.kept_config() or {}
    token = fields.get("image_token_id")
    if not isinstance(token, int):
        raise CheckpointError(f"the {CONFIG} of {source.path} lacks image_token_id")
    return token
