"""Image features on the device, encoded once per view and looked up by the view's pixels.

Legend: E views of a call, Q features of a view, R rows of the store, X any dimensions of a view.
"""

import dataclasses
import hashlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

import numpy as np

from stepjax.config import ImageConfig, ModelConfig
from stepjax.inference.buckets import bucket, sizes
from stepjax.inference.config import EngineConfig
from stepjax.models.flops import decoder_flops, view_flops
from stepjax.processing.tokens import Example

ViewKind = Literal["crop", "global", "coded crop", "coded global"]  # pixels, or features that were decoded
VIEW_KINDS: tuple[ViewKind, ...] = ("crop", "global", "coded crop", "coded global")


class ViewFeatures:
    """A view's place in the store."""

    def __init__(self, rows_Q: np.ndarray):
        self.rows_Q = rows_Q
        self.holders = 0
        self.encoded = False


# Cached: many requests may share one example, and hashing its views is slow.
_digests: weakref.WeakKeyDictionary[Example, list[bytes]] = weakref.WeakKeyDictionary()


def view_digests(example: Example) -> list[bytes]:
    """Digests of a prompt's views, in the order of its feature table: crops, then global views."""
    known = _digests.get(example)
    if known is None:
        known = _digests[example] = [
            hashlib.blake2b(np.ascontiguousarray(view).tobytes(), digest_size=16).digest()
            for views in (example.crops, example.global_views)
            for view in views
        ]
    return known


@dataclasses.dataclass(frozen=True)
class ViewShape:
    """The encoder calls for one kind of view."""

    shape: tuple[int, ...]  # of a view: its pixels, or features and channels
    features: int  # of a view
    batch_sizes: list[int]
    cost: float  # of a view, in prompt tokens of equal FLOPs

    @classmethod
    def of(cls, kind: ViewKind, model: ModelConfig, images: ImageConfig, config: EngineConfig) -> "ViewShape":
        """A full batch costs about as much as prefilling `prefill_tokens`, unless a single view costs more."""
        crop = kind.endswith("crop")
        grid, features = (images.crop_grid, images.crop_tokens) if crop else (images.global_grid, images.global_tokens)
        cost = view_flops(model.vision, model.decoder.width, grid) / decoder_flops(model.decoder, 1, 0)
        most = config.view_batch or 2 ** max(round(math.log2(config.prefill_tokens / cost)), 0)
        most = max(min(most, config.feature_cache_tokens // features), 1)  # more views never wait at a time
        side = images.crop_size if crop else images.global_size
        batch_sizes = sizes(1 if most <= 4 else 4, most, 4)
        if kind.startswith("coded"):
            assert model.tofc is not None
            cost = 2 * features * model.tofc.width * model.decoder.width / decoder_flops(model.decoder, 1, 0)
            return cls((features, model.tofc.channels), features, batch_sizes, cost)
        return cls((side, side, 3), features, batch_sizes, cost)

    def empty(self, size: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Views [E, ...] of a call without any, and the rows [E, Q] for their features, out of range."""
        views_EX = np.zeros((size, *self.shape), np.float32)
        return views_EX, np.full((size, self.features), num_rows, np.int32)

    def batch(self, views: list[tuple[ViewFeatures, np.ndarray]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The same with these views; `num_rows` is the size of the store."""
        views_EX, rows_EQ = self.empty(bucket(len(views), self.batch_sizes), num_rows)
        for i, (view, view_X) in enumerate(views):
            views_EX[i], rows_EQ[i] = view_X, view.rows_Q
        return views_EX, rows_EQ


class FeatureStore:
    """Host-side bookkeeping: which rows of the device array hold which view. Unused views stay cached until their rows
    are needed; the least recently used are evicted first.
    """

    def __init__(self, num_rows: int, images: ImageConfig):
        self.num_rows, self.images = num_rows, images
        self._free = list(range(num_rows - 1, -1, -1))
        self._views: OrderedDict[bytes, ViewFeatures] = OrderedDict()
        self._pending: dict[bytes, tuple[ViewKind, ViewFeatures, np.ndarray]] = {}  # with pixels; held, not yet encoded
        self.num_found = 0  # cache hits, in views

    def size_of(self, example: Example) -> int:
        """Rows needed by the views of a prompt."""
        return len(example.crops) * self.images.crop_tokens + len(example.global_views) * self.images.global_tokens

    def hold(self, example: Example, digests: list[bytes]) -> list[ViewFeatures] | None:
        """Allocates a prompt's views, held until `release`; those not `encoded` yet will be in a `next_batch`.
        Returns None if there is no room now.
        """
        crops, wholes = self.images.crop_tokens, self.images.global_tokens
        sizes: dict[ViewKind, int] = {"crop": crops, "global": wholes, "coded crop": crops, "coded global": wholes}
        kinds: list[ViewKind] = ["coded crop" if view.ndim == 2 else "crop" for view in example.crops]
        kinds.extend("coded global" if view.ndim == 2 else "global" for view in example.global_views)
        views = zip(kinds, (*example.crops, *example.global_views), strict=True)
        wanted = dict(zip(digests, views, strict=True))
        missing = {digest: view for digest, view in wanted.items() if digest not in self._views}
        needed = sum(sizes[kind] for kind, _ in missing.values())
        idle = [d for d, view in self._views.items() if view.holders == 0 and d not in wanted]
        if needed > len(self._free) + sum(len(self._views[digest].rows_Q) for digest in idle):
            return None
        for digest in idle:
            if len(self._free) >= needed:
                break
            self._free += self._views.pop(digest).rows_Q.tolist()
        self.num_found += len(wanted) - len(missing)
        for digest, (kind, view_X) in missing.items():
            rows_Q = np.array([self._free.pop() for _ in range(sizes[kind])], np.int32)
            self._views[digest] = ViewFeatures(rows_Q)
            self._pending[digest] = kind, self._views[digest], view_X
        for digest in wanted:
            self._views[digest].holders += 1
            self._views.move_to_end(digest)
        return [self._views[digest] for digest in digests]

    def next_batch(self, most: Mapping[ViewKind, int]) -> tuple[ViewKind, list[tuple[ViewFeatures, np.ndarray]]]:
        """Up to `most` views of the kind that has waited longest, with their pixels. They are marked as encoded; the
        caller must encode them.
        """
        kind = next(iter(self._pending.values()))[0]
        digests = [digest for digest, (other, _, _) in self._pending.items() if other == kind][: most[kind]]
        batch = [self._pending.pop(digest)[1:] for digest in digests]
        for view, _ in batch:
            view.encoded = True
        return kind, batch

    def release(self, digests: list[bytes]) -> None:
        for digest in set(digests):
            view = self._views[digest]
            view.holders -= 1
            if not (view.holders or view.encoded):
                del self._views[digest], self._pending[digest]
                self._free += view.rows_Q.tolist()

    def forget_all(self) -> None:
        """Drops all cached views, e.g. when the weights change. No view may be held."""
        assert not any(view.holders for view in self._views.values())
        self._views.clear()
        self._free = list(range(self.num_rows - 1, -1, -1))
