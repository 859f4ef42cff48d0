"""The prefix cache: a prompt that begins like a sequence before it finds the pages of that beginning.

A full page is found by a hash of its tokens and of the key of the page before it, so that a key stands for all tokens
up to there (Kwon et al., "PagedAttention", arXiv:2309.06180, section 4.4; the chain of hashes is vLLM's). The first
page of a chain hashes what else its content depends on: the frequencies of the rotation. Weights, adapter and dtypes
are the same for all sequences of an engine.

Of a model whose layers have states a beginning is found only as far as the state behind it was kept, too. States are
large, so a sequence leaves few: behind the last full page of its prompt, from where a prompt that goes on can go on,
and where the pages that it shares with others end (Pan et al., "Marconi", arXiv:2411.19379). Its passes end there.
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

    def find(self, s: SequenceState) -> tuple[list[int], list[bytes]]:
        """The pages that hold the first tokens of a sequence, at least one token left out, for that has to be fed; and
        the keys of full pages that would have been the next ones, any of which it could go on from."""
        s.borders = ()
        if not self.enabled or s.asks_for_prompt:  # the logits of its first tokens would be missing
            return [], []
        keys = self._keys(s, (len(s.tokens) - 1) // PAGE)
        pages = list[int]()
        for page in map(self.cache.find, keys):
            if page is None:
                break
            pages.append(page)
        if not self.cache.states.arrays:
            return pages, keys[len(pages) :][:1]
        count = self.cache.states.kept(keys[: len(pages)])
        s.borders = tuple(PAGE * n for n in sorted({len(pages), len(keys)}) if n > count)
        return pages[:count], keys[count:]

    def take(self, s: SequenceState, pages: Sequence[int]) -> None:
        """Begin a sequence with pages that were found, and the state behind them."""
        s.slot = self.cache.states.begin(self._keys(s, len(pages))[-1] if pages else None)
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

    def keep_state(self, s: SequenceState) -> None:
        """Keep the state of a sequence if it has come to one of its borders; all before is queued, and nothing else."""
        if s.cached in s.borders and s.regime == self.regime(s):
            self.cache.states.keep(self._keys(s, s.cached // PAGE)[-1], s.slot)

    def coming(self, s: SequenceState) -> list[bytes]:
        """The keys that others will find when a running sequence has been read."""
        if not self.cache.states.arrays:
            return s.keys[s.cached // PAGE :]
        return [s.keys[at // PAGE - 1] for at in s.borders if s.cached < at <= len(s.keys) * PAGE]

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
