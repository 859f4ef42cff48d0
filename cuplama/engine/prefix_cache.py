"""The prefix cache: a prompt that begins like a sequence before it finds the pages of that beginning.

A full page is found by a hash of its tokens and of the key of the page before it, so that a key stands for all tokens
up to there (Kwon et al., "PagedAttention", arXiv:2309.06180, section 4.4; the chain of hashes is vLLM's). The first
page of a chain hashes what else its content depends on: the frequencies of the rotation. Weights, adapter and dtypes
are the same for all sequences of an engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from ..models.rope import Rope
from .kv_cache import PAGE, PagedCache
from .sequence import SequenceState

__all__ = ["PrefixCache", "extend_keys"]

_KEY_BYTES = 16  # of a hash: that two of 2^40 pages are taken for one another has a probability of 2^-49


def extend_keys(keys: list[bytes], tokens: Sequence[int], count: int, salt: str) -> None:
    """Append the keys of a sequence's full pages until there are ``count``, 16 bytes each.

    salt: what its pages depend on beside the tokens.
    """
    first = len(keys)
    content = np.array(tokens[first * PAGE : count * PAGE], np.int32).tobytes()
    before = keys[-1] if keys else salt.encode()
    for at in range(0, len(content), 4 * PAGE):
        before = hashlib.blake2b(before + content[at : at + 4 * PAGE], digest_size=_KEY_BYTES).digest()
        keys.append(before)


class PrefixCache:
    """Finds and names the full pages of ``cache``. ropes: of the model's layers; enabled: otherwise it finds nothing.

    queries, hits: tokens of prompts that were looked for, and those of them that were found.
    """

    def __init__(self, cache: PagedCache, ropes: Iterable[Rope], enabled: bool) -> None:
        self.cache, self.enabled = cache, enabled
        self._ropes = list(ropes)
        self.queries = self.hits = 0

    def find(self, s: SequenceState) -> tuple[list[int], bytes | None]:
        """The pages that hold the first tokens of a sequence, at least one token left out, for that has to be fed; and
        the key of its next full page, which was not found."""
        pages = list[int]()
        if self.enabled and not s.asks_for_prompt:  # the logits of its first tokens would be missing
            for key in self._keys(s, (len(s.tokens) - 1) // PAGE):
                page = self.cache.find(key)
                if page is None:
                    return pages, key
                pages.append(page)
        return pages, None

    def take(self, s: SequenceState, pages: Sequence[int]) -> None:
        """Begin a sequence with pages that were found."""
        s.pages = self.cache.share(pages)
        s.cached, s.regime = len(pages) * PAGE, self.regime(s)
        if not s.life:  # what it computes again, because it lost its pages, is no new question
            s.found = s.cached
            self.queries += len(s.prompt)
            self.hits += s.cached

    def keep(self, s: SequenceState) -> None:
        """Name the full pages of a sequence, so that others find them.

        Keys that were rotated by other frequencies than the sequence has at its length now are not among them.
        """
        if self.enabled and s.regime == self.regime(s):
            for page, key in zip(s.pages, self._keys(s, s.cached // PAGE), strict=False):
                self.cache.name(page, key)

    def _keys(self, s: SequenceState, count: int) -> list[bytes]:
        """The keys of the first full pages of a sequence."""
        salt = " ".join(rope.keys_depend_on(len(s.prompt), len(s.tokens)) for rope in self._ropes)
        if s.salt != salt:
            s.salt, s.keys = salt, []
        extend_keys(s.keys, s.tokens, count, salt)
        return s.keys[:count]

    def regime(self, s: SequenceState) -> tuple[int, ...]:
        """The regimes of rotation of a sequence of this length; see ``Rope.regime``."""
        return tuple(rope.regime(len(s.tokens)) for rope in self._ropes)
