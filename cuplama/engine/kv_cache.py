"""The paged KV cache: a pool of pages, and the pages that each sequence owns.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import DTYPES, Array
from ..models.config import ModelConfig

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
    """The pool. ``arrays``: "<layer>.cache.k" and ".v" [pages + 1, kv_heads, PAGE, head_dim] in ``dtype``.

    kv_cache_dtype: one of ``KV_CACHE_DTYPES``.
    """

    def __init__(self, backend: Backend, config: ModelConfig, pages: int, kv_cache_dtype: str = "auto") -> None:
        self.dtype = cache_dtype(kv_cache_dtype, backend.dtype)
        shape = (pages + 1, config.num_kv_heads, PAGE, config.head_dim)
        self.pages = pages
        self.padding_page = pages  # belongs to no sequence: the rows that pad a batch write there
        self.arrays: dict[str, Array] = {
            f"{i}.cache.{part}": backend.zeros(shape, self.dtype) for i in range(config.num_layers) for part in "kv"
        }
        self.free_all_but([])

    @property
    def free(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    def free_all_but(self, owned: list[list[int]]) -> None:
        """All pages are free but these. Low ones go first: memory that is never used is never touched."""
        used = set(itertools.chain.from_iterable(owned))
        self._free = [page for page in range(self.pages - 1, -1, -1) if page not in used]

    def extend(self, owned: list[int], tokens: int) -> None:
        """Give a sequence the pages it needs for ``tokens`` tokens in all. So many are free: see ``Sharing.take``."""
        while len(owned) < pages_for(tokens):
            owned.append(self._free.pop())

    def shrink(self, owned: list[int], tokens: int) -> None:
        """Take back the pages of a sequence that ``tokens`` tokens do not need."""
        keep = pages_for(tokens)
        self._free += reversed(owned[keep:])
        del owned[keep:]

    def release(self, owned: list[int]) -> None:
        """Take back all pages of a sequence."""
        self.shrink(owned, 0)


def page_table(sequences: list[list[int]], padding_page: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """The pages of each sequence as [b, M]; entries beyond a sequence's own are the padding page."""
    table = np.full((len(sequences), max(map(len, sequences))), padding_page, np.int32)
    for row, pages in zip(table, sequences, strict=True):
        row[: len(pages)] = pages
    return table
