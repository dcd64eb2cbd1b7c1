"""The layout of an example: where image features go among the tokens, and which tokens count in the loss.

An image is laid out as its crops followed by its global view:

    <patch_start> <im_patch> x crop_tokens <patch_end>  [<patch_newline> after the last crop of a row, but the last row]
    ...
    <im_start> <im_patch> x global_tokens <im_end>

Every `<im_patch>` stands for one feature; `feature_index` gives the row of the example's feature table to replace it.
The table groups views by the encoder's two static shapes, so its order differs from the token order as soon as two
images have crops:

    tokens         image 0: crop 0, crop 1, global    image 1: crop 2, global    (and text)
    feature table  crop 0, crop 1, crop 2, global of image 0, global of image 1

Shape suffixes: T tokens, G global views, N crops, S side of a global view and C side of a crop in pixels; the last axis
is 3 colours.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from stepjax.config import ImageConfig
from stepjax.errors import ContextLengthError
from stepjax.processing.images import ImageViews, ViewPlan
from stepjax.processing.tokenizer import SpecialTokens


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A processed record, ready for packing. Prompts have zero `loss_weights`.

    Attributes:
        name: the source record.
        tokens: int32[T].
        loss_weights: float32[T], weight of predicting this token (not its successor). Zero for the first token, which
            nothing predicts, and for image tokens.
        feature_index: int32[T], row of the feature table, or -1 where the token itself is embedded.
        global_views: float32[G, S, S, 3], normalised.
        crops: float32[N, C, C, 3], normalised, all images in order.
    """

    name: str
    tokens: np.ndarray
    loss_weights: np.ndarray
    feature_index: np.ndarray
    global_views: np.ndarray
    crops: np.ndarray


def text_example(tokens: Iterable[int], name: str = "prompt") -> Example:
    """A text-only prompt."""
    tokens_T = np.fromiter(tokens, np.int32)
    nothing = np.zeros((0, 0, 0, 3), np.float32)
    return Example(
        name, tokens_T, np.zeros(len(tokens_T), np.float32), np.full(len(tokens_T), -1, np.int32), nothing, nothing
    )


def check_length(count: int, most: int | None, name: str, *, at_least: bool = False) -> None:
    """
    Args:
        at_least: `count` is a lower bound.

    Raises:
        ContextLengthError: `count` exceeds `most`.
    """
    if most is not None and count > most:
        shown = f"at least {count}" if at_least else f"{count}"
        message = f"{name}: {shown} tokens are more than the limit of {most} for a prompt"
        raise ContextLengthError(message, excess=count - most)


def least_tokens(text: str, longest_token: int) -> int:
    """Lower bound on a text's tokens, from its length: normalizers leave at least 3 bytes per 4 characters."""
    return len(text) * 3 // (4 * longest_token)


@dataclasses.dataclass(frozen=True)
class TextSpan:
    """Ids of text and control tokens, and the loss weight of each."""

    ids: Sequence[int]
    loss_weight: float


def image_tokens(plan: ViewPlan, config: ImageConfig, special_tokens: SpecialTokens) -> list[int]:
    """An image's `plan.num_tokens(config)` token ids."""
    crop = [
        special_tokens.patch_start,
        *[special_tokens.image_patch] * config.crop_tokens,
        special_tokens.patch_end,
    ]
    ids: list[int] = []
    for ends_row in plan.newline_after:
        ids += crop
        if ends_row:
            ids.append(special_tokens.patch_newline)
    ids.append(special_tokens.image_start)
    ids += [special_tokens.image_patch] * config.global_tokens
    ids.append(special_tokens.image_end)
    return ids


def assemble(
    name: str,
    spans: Sequence[TextSpan | ImageViews],
    config: ImageConfig,
    special_tokens: SpecialTokens,
) -> Example:
    """Lays out text and images in the given order."""
    images = [span for span in spans if isinstance(span, ImageViews)]
    next_crop_feature = 0
    next_global_feature = sum(image.plan.num_crops for image in images) * config.crop_tokens

    tokens, loss_weights, feature_index = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [np.zeros(0, np.int32)]
    for span in spans:
        is_text = isinstance(span, TextSpan)
        tokens_T = np.asarray(span.ids if is_text else image_tokens(span.plan, config, special_tokens), np.int32)
        features_T = np.full(len(tokens_T), -1, np.int32)
        if not is_text:
            assert len(span.crops_NHWC) == span.plan.num_crops == len(span.plan.newline_after)
            crop_rows = next_crop_feature + np.arange(span.plan.num_crops * config.crop_tokens)
            global_rows = next_global_feature + np.arange(config.global_tokens)
            features_T[tokens_T == special_tokens.image_patch] = np.concatenate([crop_rows, global_rows])
            next_crop_feature += len(crop_rows)
            next_global_feature += len(global_rows)
        tokens.append(tokens_T)
        loss_weights.append(np.full(len(tokens_T), span.loss_weight if is_text else 0, np.float32))
        feature_index.append(features_T)

    weights_T = np.concatenate(loss_weights)
    weights_T[:1] = 0
    size, crop_size = config.global_size, config.crop_size
    views = np.asarray([image.global_view_HWC for image in images], np.float32)
    crops = np.zeros((0, crop_size, crop_size, 3), np.float32), *(image.crops_NHWC for image in images)
    return Example(
        name=name,
        tokens=np.concatenate(tokens),
        loss_weights=weights_T,
        feature_index=np.concatenate(feature_index),
        global_views=views.reshape(len(images), size, size, 3),
        crops=np.concatenate(crops),
    )
