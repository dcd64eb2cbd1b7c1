"""Image features on the device, encoded once per view and found again by the view's pixels."""

import hashlib
import weakref
from collections import OrderedDict

import numpy as np

from stepjax.config import ImageConfig
from stepjax.processing.tokens import Example


class ViewFeatures:
    """A view's place in the store."""

    def __init__(self, rows_Q: np.ndarray):
        self.rows_Q = rows_Q
        self.holders = 0
        self.encoded = False


# Many requests may come with one example, whose views take long to read.
_digests: weakref.WeakKeyDictionary[Example, list[bytes]] = weakref.WeakKeyDictionary()


def view_digests(example: Example) -> list[bytes]:
    """Of all views of a prompt in the order of its feature table: crops, then global views."""
    known = _digests.get(example)
    if known is None:
        known = _digests[example] = [
            hashlib.blake2b(np.ascontiguousarray(view).tobytes(), digest_size=16).digest()
            for views in (example.crops, example.global_views)
            for view in views
        ]
    return known


class FeatureStore:
    """Bookkeeping on the host: which rows of the device's array hold which view. Views that no prompt still needs are
    kept until their room is wanted, the least recently used going first.
    """

    def __init__(self, num_rows: int, images: ImageConfig):
        self.num_rows, self.images = num_rows, images
        self._free = list(range(num_rows - 1, -1, -1))
        self._views: OrderedDict[bytes, ViewFeatures] = OrderedDict()
        self.num_found = 0  # views that were there when a prompt asked for them

    def size_of(self, example: Example) -> int:
        """Rows that the views of a prompt take."""
        return len(example.crops) * self.images.crop_tokens + len(example.global_views) * self.images.global_tokens

    def hold(self, example: Example, digests: list[bytes]) -> list[ViewFeatures] | None:
        """The places of a prompt's views, held until `release`; those not `encoded` yet are for the caller to fill.
        None where there is no room now.
        """
        wanted: dict[bytes, int] = {}
        for index, digest in enumerate(digests):
            is_crop = index < len(example.crops)
            wanted[digest] = self.images.crop_tokens if is_crop else self.images.global_tokens
        found = sum(digest in self._views for digest in wanted)
        needed = sum(size for digest, size in wanted.items() if digest not in self._views)
        idle = [d for d, view in self._views.items() if view.holders == 0 and d not in wanted]
        room = len(self._free) + sum(len(self._views[digest].rows_Q) for digest in idle)
        if needed > room:
            return None
        for digest in idle:
            if len(self._free) >= needed:
                break
            self._free += self._views.pop(digest).rows_Q.tolist()
        self.num_found += found
        for digest, size in wanted.items():
            if digest not in self._views:
                rows_Q = np.array([self._free.pop() for _ in range(size)], np.int32)
                self._views[digest] = ViewFeatures(rows_Q)
            self._views[digest].holders += 1
            self._views.move_to_end(digest)
        return [self._views[digest] for digest in digests]

    def release(self, digests: list[bytes]) -> None:
        for digest in set(digests):
            self._views[digest].holders -= 1

    def forget_all(self) -> None:
        """Everything must be encoded again: the weights changed."""
        for view in self._views.values():
            view.encoded = False
