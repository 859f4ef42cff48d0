"""The paged KV cache: a pool of pages, and the pages that each sequence owns.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
Sequences that begin alike may share the pages of their beginnings: see ``prefix_cache.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array
from ..models.config import ModelConfig
from .state_cache import StateCache

__all__ = ["KV_CACHE_DTYPES", "MAX_TOKENS", "PAGE", "PagedCache", "cache_dtype", "page_table", "pages_for"]

# What a caller may ask for -> the short name of what keys and values are stored in; "T" is the model's dtype.
KV_CACHE_DTYPES: Mapping[str, str] = {"auto": "T", "fp8": "e4m3"}
PAGE = 64  # tokens per page: 16 KB of one bf16 head of 128, a good size for one bulk copy
MAX_TOKENS = 2**30  # of a sequence, and of the cache: positions and places are int32, with room for a page more


def pages_for(tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-tokens // PAGE)


def cache_dtype(asked: str, T: np.dtype[Any]) -> np.dtype[Any]:
    """What a cache holds in a model of dtype ``T``. asked: one of ``KV_CACHE_DTYPES``."""
    return DTYPES.get(KV_CACHE_DTYPES[asked], T)


class PagedCache:
    """The pool. ``arrays``: "<layer>.cache.k" and ".v" [pages + 1, kv_heads, PAGE, head_dim] in ``dtype``, for the
    layers that have keys and values of their own.

    A page belongs to nobody, to one sequence, or to several. One that has a key, by which its content can be found
    again, keeps it when the last of them has left, until the page is needed: those that were left first go first.

    kv_cache_dtype: one of ``KV_CACHE_DTYPES``; slots: of ``states``, for the layers that have a state of each sequence
    in place of keys and values. Their arrays are among ``arrays``.
    """

    def __init__(
        self, backend: Backend, config: ModelConfig, pages: int, kv_cache_dtype: str = "auto", slots: int = 1
    ) -> None:
        self.dtype = cache_dtype(kv_cache_dtype, backend.dtype)
        self.pages = pages
        self.padding_page = pages  # belongs to no sequence: the rows that pad a batch write there
        self.arrays: dict[str, Array] = {
            f"{i}.cache.{part}": backend.zeros((pages + 1, heads, PAGE, size), self.dtype)
            for i, (heads, size) in config.caches.items()
            for part in "kv"
        }
        self.states = StateCache(backend, config, slots)
        self.arrays |= self.states.arrays
        self.clear()

    @property
    def free(self) -> int:
        """Pages that no sequence owns."""
        return len(self._empty) + len(self._left)

    def clear(self) -> None:
        """All pages are free, and none has a key. Low ones go first: memory that is never used is never touched. So
        are all slots of states."""
        self.states.clear()
        self._empty = list(range(self.pages - 1, -1, -1))
        self._left: dict[int, None] = {}  # pages with a key that nobody owns, those that were left first in front
        self._owners = [0] * self.pages
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    def extend(self, owned: list[int], tokens: int) -> bool:
        """Give a sequence the pages it needs for ``tokens`` tokens in all; False, and none, if too few are free."""
        count = pages_for(tokens) - len(owned)
        if count > self.free:
            return False
        for _ in range(count):
            page = self._empty.pop() if self._empty else self._forget(next(iter(self._left)))
            self._owners[page] = 1
            owned.append(page)
        return True

    def release(self, owned: list[int]) -> None:
        """Take back the pages of a sequence. The last are the first to be given away: fewer begin like that."""
        while owned:
            page = owned.pop()
            self._owners[page] -= 1
            if not self._owners[page]:
                if page in self._keys:
                    self._left[page] = None
                else:
                    self._empty.append(page)

    def find(self, key: bytes) -> int | None:
        """The page that has this key."""
        return self._pages.get(key)

    def share(self, pages: Iterable[int]) -> list[int]:
        """The same pages, which belong to one more sequence from now on."""
        shared = list(pages)
        for page in shared:
            self._left.pop(page, None)
            self._owners[page] += 1
        return shared

    def needs(self, pages: Iterable[int]) -> int:
        """How many of these pages count as free now, and would not if they were shared."""
        return sum(page in self._left for page in pages)

    def name(self, page: int, key: bytes) -> None:
        """Give a page that somebody owns a key, unless it has one or another page has it."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def _forget(self, page: int) -> int:
        del self._left[page]
        del self._pages[self._keys.pop(page)]
        return page


def page_table(sequences: list[list[int]], padding_page: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """The pages of each sequence as [b, M]; entries beyond a sequence's own are the padding page."""
    table = np.full((len(sequences), max(map(len, sequences))), padding_page, np.int32)
    for row, pages in zip(table, sequences, strict=True):
        row[: len(pages)] = pages
    return table
