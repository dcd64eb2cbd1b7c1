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
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from stepjax.config import ImageConfig
from stepjax.errors import ContextLengthError
from stepjax.processing.images import CodedImage, ImageViews, UncutImage, ViewPlan
from stepjax.processing.tokenizer import SpecialTokens

Image = ImageViews | UncutImage | CodedImage


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A processed record. Prompts have zero `loss_weights`.

    Attributes:
        name: the source record.
        tokens: int32[T].
        loss_weights: float32[T], weight of predicting this token (not its successor). Zero for the first token, which
            nothing predicts, and for image tokens.
        feature_index: int32[T], row of the feature table, or -1 where the token itself is embedded.
        global_views: float32[G, S, S, 3], normalised. Of a prompt with coded images a list of views: pixels [S, S, 3],
            or features [Q, Z] (see `CodedImage`).
        crops: the same of all images in order, float32[N, C, C, 3] or a list.
    """

    name: str
    tokens: np.ndarray
    loss_weights: np.ndarray
    feature_index: np.ndarray
    global_views: np.ndarray | list[np.ndarray]
    crops: np.ndarray | list[np.ndarray]

    @property
    def num_views(self) -> tuple[int, int]:
        """Global views and crops."""
        return len(self.global_views), len(self.crops)

    def write_views(self, global_views_GSSC: np.ndarray, crops_NCCC: np.ndarray) -> None:
        global_views_GSSC[:], crops_NCCC[:] = self.global_views, self.crops


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """An `Example` before its views are cut: packing has them written straight into the row."""

    name: str
    tokens: np.ndarray
    loss_weights: np.ndarray
    feature_index: np.ndarray
    images: tuple[Image, ...]

    @property
    def num_views(self) -> tuple[int, int]:
        """Global views and crops."""
        return len(self.images), sum(image.plan.num_crops for image in self.images)

    def write_views(self, global_views_GSSC: np.ndarray, crops_NCCC: np.ndarray) -> None:
        """Writes the views, normalised, to contiguous arrays, in float32 or rounded to their dtype."""
        crop = 0
        for global_view_SSC, image in zip(global_views_GSSC, self.images, strict=True):
            assert not isinstance(image, CodedImage)
            image.write(global_view_SSC, crops_NCCC[crop : crop + image.plan.num_crops])
            crop += image.plan.num_crops

    def example(self, config: ImageConfig) -> Example:
        parts = self.name, self.tokens, self.loss_weights, self.feature_index
        if not any(isinstance(image, CodedImage) for image in self.images):
            return Example(*parts, *self._cut(self.images, config))
        global_views, crops = [], []
        for image in self.images:
            if isinstance(image, CodedImage):
                global_views.append(image.global_view_QZ)
                crops.extend(image.crops_NQZ)
            else:
                (global_view_SSC,), crops_NCCC = self._cut((image,), config)
                global_views.append(global_view_SSC)
                crops.extend(crops_NCCC)
        return Example(*parts, global_views, crops)

    def _cut(self, images: tuple[Image, ...], config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
        """Global views [G, S, S, 3] and crops [N, C, C, 3], normalised, of images that are not coded."""
        part = dataclasses.replace(self, images=images)
        views, crops = part.num_views
        global_views_GSSC = np.empty((views, config.global_size, config.global_size, 3), np.float32)
        crops_NCCC = np.empty((crops, config.crop_size, config.crop_size, 3), np.float32)
        part.write_views(global_views_GSSC, crops_NCCC)
        return global_views_GSSC, crops_NCCC


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
    return _layout(plan, config, special_tokens)[0].tolist()


def _layout(plan: ViewPlan, config: ImageConfig, special_tokens: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
    return _image_layout(plan.columns, plan.rows, config.crop_tokens, config.global_tokens, special_tokens)


@functools.lru_cache(maxsize=256)
def _image_layout(
    columns: int, rows: int, crop_tokens: int, global_tokens: int, special_tokens: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of an image, and which of them are features."""
    patch = special_tokens.image_patch
    row = [special_tokens.patch_start, *[patch] * crop_tokens, special_tokens.patch_end] * columns
    ids = ([*row, special_tokens.patch_newline] * rows)[:-1]
    ids += [special_tokens.image_start, *[patch] * global_tokens, special_tokens.image_end]
    ids_T = np.array(ids, np.int32)
    return ids_T, ids_T == patch


def lay_out(name: str, spans: Sequence[TextSpan | Image], config: ImageConfig, special_tokens: SpecialTokens) -> Draft:
    """Lays out text and images in the given order."""
    images = tuple(span for span in spans if not isinstance(span, TextSpan))
    layouts = [_layout(image.plan, config, special_tokens) for image in images]
    length = sum(len(span.ids) for span in spans if isinstance(span, TextSpan)) + sum(len(ids) for ids, _ in layouts)
    tokens_T = np.empty(length, np.int32)
    loss_weights_T = np.zeros(length, np.float32)
    feature_index_T = np.full(length, -1, np.int32)

    at = 0
    next_image, next_crop_feature = iter(layouts), 0
    next_global_feature = sum(image.plan.num_crops for image in images) * config.crop_tokens
    for span in spans:
        if isinstance(span, TextSpan):
            part = slice(at, at + len(span.ids))
            tokens_T[part] = span.ids
            loss_weights_T[part] = span.loss_weight
        else:
            ids_I, is_feature_I = next(next_image)
            part = slice(at, at + len(ids_I))
            tokens_T[part] = ids_I
            crop_end = next_crop_feature + span.plan.num_crops * config.crop_tokens
            global_end = next_global_feature + config.global_tokens
            features = *range(next_crop_feature, crop_end), *range(next_global_feature, global_end)
            feature_index_T[part][is_feature_I] = features
            next_crop_feature, next_global_feature = crop_end, global_end
        at = part.stop
    loss_weights_T[:1] = 0
    return Draft(name, tokens_T, loss_weights_T, feature_index_T, images)


def assemble(
    name: str, spans: Sequence[TextSpan | Image], config: ImageConfig, special_tokens: SpecialTokens
) -> Example:
    """Lays out text and images in the given order, and cuts the views."""
    return lay_out(name, spans, config, special_tokens).example(config)
