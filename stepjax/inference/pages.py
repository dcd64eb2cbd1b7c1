"""The pages of the key-value cache: which are in use, and what the free ones still cache.

Any number of sequences can hold a page. A full page's key covers everything its contents depend on: all tokens from the
start of the sequence to the end of the page. The page can be found by its key until it is overwritten. Free pages
without a key are reused first, then the least recently used.
"""

import hashlib
from collections import OrderedDict

import numpy as np

Key = bytes


class OutOfPages(Exception):
    """Not enough free pages. The scheduler handles it."""


class Pages:
    """Host-side bookkeeping for pages 0 to `count` - 1."""

    def __init__(self, count: int):
        self.count = count
        self._holders = [0] * count
        self._blank = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, with a key; oldest first
        self._key_of: dict[int, Key] = {}
        self._page_of: dict[Key, int] = {}

    @property
    def num_free(self) -> int:
        """Pages available to `take`."""
        return len(self._blank) + len(self._kept)

    @property
    def num_cached(self) -> int:
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Takes free pages; each is then held once.

        Raises:
            OutOfPages: too few pages are free; none was taken.
        """
        if count > self.num_free:
            raise OutOfPages
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, pages: list[int]) -> None:
        for page in pages:
            if self._holders[page] == 0:
                del self._kept[page]
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drops one hold on each page. A sequence's last pages are reused first: useless without the others."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was released more often than held"
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._blank.append(page)

    def publish(self, page: int, key: Key) -> None:
        """Makes a held, full page findable. If another page already has the key, that page keeps it."""
        assert self._holders[page] > 0
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: list[Key]) -> list[int]:
        """The pages of the longest cached prefix of `keys`. They are not held yet."""
        found = []
        for key in keys:
            if key not in self._page_of:
                break
            found.append(self._page_of[key])
        return found

    def forget_all(self) -> None:
        """Makes every page unfindable, e.g. after a weight update."""
        self._blank += list(self._kept)
        self._kept.clear()
        self._key_of.clear()
        self._page_of.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


def page_keys(contents_T: np.ndarray, page_size: int, parent: Key = b"") -> list[Key]:
    """Keys of the full pages of a stretch that starts at a page boundary.

    Args:
        contents_T: int64, content of each position: a token id or, for an image feature, a hash of its view.
        parent: key of the preceding page.
    """
    keys = []
    for end in range(page_size, len(contents_T) + 1, page_size):
        part = np.ascontiguousarray(contents_T[end - page_size : end], np.int64)
        parent = hashlib.blake2b(parent + part.tobytes(), digest_size=16).digest()
        keys.append(parent)
    return keys
