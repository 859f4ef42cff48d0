"""Which sequences have pages, and which of their tokens go into the next pass.

Sequences wait in the order of their priority and arrival, and are admitted while there is room for their tokens so far.
They get further pages as they grow. When none are free, the last in that order loses all of its own and waits again: it
computes its keys and values anew when it goes on (Kwon et al., "PagedAttention", arXiv:2309.06180, section 4.5,
"recomputation"). So the first always gets what it needs, and nothing that fits alone is refused because of others.

It computes nothing, and knows no device.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable, Iterator

from ..models.rope import Rope
from .kv_cache import PagedCache, pages_for
from .prefix_cache import PrefixCache
from .sequence import SequenceState
from .state_cache import PADDING_SLOT

__all__ = ["Scheduler"]

_SPARE = 100  # of so many pages one stays free when a sequence is admitted beside others: for the growth of those


def _order(s: SequenceState) -> tuple[int, int]:
    return s.order


class Scheduler:
    """waiting, running: the sequences without and with pages, and a slot for their state, in their order.

    context: tokens a sequence may have; max_running: sequences that may have pages at a time; ropes: of the model's
    layers; prefix_cache: whether beginnings are shared. preemptions: how often a sequence has lost its pages.
    """

    def __init__(
        self, cache: PagedCache, context: int, max_running: int, ropes: Iterable[Rope] = (), prefix_cache: bool = True
    ) -> None:
        self.cache, self.context, self.max_running = cache, context, max_running
        self._ropes = list(ropes)
        self.prefixes = PrefixCache(cache, self._ropes, prefix_cache)
        self.waiting, self.running = list[SequenceState](), list[SequenceState]()
        self.preemptions = 0

    # -- who has pages

    def measure(self, s: SequenceState) -> None:
        """Set how long a sequence may become. One that has that length already ends here, if nothing is to be read."""
        most = 0 if s.every_logit else s.params.max_tokens
        s.limit = self.context if most is None else min(self.context, len(s.prompt) + most)
        if len(s.prompt) >= s.limit and not s.asks_for_prompt:
            s.finish_reason = "length"

    def add(self, s: SequenceState) -> None:
        """Let a sequence wait. Its order and limit are set."""
        insort(self.waiting, s, key=_order)

    def admit(self) -> bool:
        """Give pages to those that wait, in their order, while there is room; whether one got them.

        One whose beginning another is about to read waits for that, and lets others pass.
        """
        if not self.waiting:
            return False
        before, coming, promised = len(self.running), self._coming(), self._promised()
        for s in self.waiting[:]:
            if len(self.running) >= self.max_running:
                break
            found, missing = self.prefixes.find(s)
            if not coming.isdisjoint(missing):
                continue
            taken = pages_for(len(s.tokens)) - len(found)
            needed = promised + taken + self.cache.needs(found) + self.cache.pages // _SPARE
            if self.running and needed > self.cache.free:
                break
            promised += taken
            self.waiting.remove(s)
            insort(self.running, s, key=_order)
            self.prefixes.take(s, found)
            s.admitted = s.admitted or time.perf_counter()
            coming.update(self.prefixes.coming(s))
        return len(self.running) > before

    def _coming(self) -> set[bytes]:
        """The keys of what running sequences have not been queued to write yet."""
        return {key for s in self.running for key in self.prefixes.coming(s)}

    def _promised(self) -> int:
        """Free pages that running sequences were admitted for, and have not got yet."""
        return sum(max(0, pages_for(len(s.tokens)) - len(s.pages)) for s in self.running)

    def remove(self, s: SequenceState) -> None:
        """A sequence has ended, or is not wanted any more. Its full pages can be found until others need them."""
        if s in self.running:
            self.running.remove(s)
            self._leave(s)
        elif s in self.waiting:
            self.waiting.remove(s)

    def make_room(self, s: SequenceState, tokens: int) -> bool:
        """Give a running sequence the pages for so many tokens in all. Others may lose theirs; False if it lost its
        own, because it is the last."""
        while not self.cache.extend(s.pages, tokens):
            last = self.running[-1]
            self.preempt(last)
            if last is s:
                return False
        return True

    def preempt(self, s: SequenceState) -> None:
        """Take the pages of a running sequence, and let it wait in its old place."""
        self.running.remove(s)
        self._leave(s)
        s.cached, s.ahead, s.row = 0, 0, None
        s.life += 1
        self.preemptions += 1
        insort(self.waiting, s, key=_order)

    def _leave(self, s: SequenceState) -> None:
        if s.error is None:
            self.prefixes.keep(s)
        self.cache.release(s.pages)
        s.slot = self.cache.states.release(s.slot)

    def start_again(self, dropped: Iterable[SequenceState] = ()) -> None:
        """Nothing that was queued counts any more, and no page holds anything: all that run wait again, but those that
        are dropped."""
        gone, everyone = set(map(id, dropped)), (*self.running, *self.waiting)
        self.waiting, self.running = sorted((s for s in everyone if id(s) not in gone), key=_order), []
        self.cache.clear()
        for s in everyone:
            if s.pages:
                s.life += 1
            s.pages, s.cached, s.ahead, s.row, s.slot = [], 0, 0, None, PADDING_SLOT

    # -- what goes into a pass

    def next_parts(self, rows: int, logits: int, decodes: bool) -> list[tuple[SequenceState, int]]:
        """The next tokens that a pass takes: (sequence, count) pairs, in order; their pages are there.

        rows: tokens of the pass at most, unless more sequences than that have one token each; logits: those of a
        sequence at most where the logits of all are asked for, which has a pass of its own. decodes: whether captured
        steps draw the tokens after the first.
        """
        parts, left = list[tuple[SequenceState, int]](), rows
        for s, life in [(s, s.life) for s in self.reading(decodes)]:
            if s.life != life:
                continue  # it has just lost its pages
            room = max(left, int(s.cached == len(s.tokens) - 1))
            border = next((at for at in s.borders if at > s.cached), len(s.tokens))
            count = min(room, border - s.cached, logits if s.asks_for_prompt else room)
            if not count or (parts and s.asks_for_prompt) or not self.make_room(s, s.cached + count):
                continue
            parts.append((s, count))
            left -= count
            if s.asks_for_prompt:
                break
        return [(s, count) for s, count in parts if s.pages]

    def reading(self, decodes: bool) -> list[SequenceState]:
        """The running sequences with tokens to be fed by a pass; those that captured steps feed are not among them."""
        found = []
        for s in self.running:
            if s.row is None and not s.ahead and s.cached < len(s.tokens) and not (decodes and self.may_decode(s)):
                if s.regime != self.prefixes.regime(s):
                    # The keys were rotated by other frequencies: compute the sequence again, and on other pages, for
                    # these may be shared, or be found by what they hold.
                    self.cache.release(s.pages)
                    s.cached, s.keys, s.regime = 0, [], self.prefixes.regime(s)
                found.append(s)
        return found

    def queued(self, parts: Iterable[tuple[SequenceState, int]]) -> Iterator[SequenceState]:
        """A pass with these parts has been queued; the sequences whose last token it feeds."""
        for s, count in parts:
            s.cached += count
            if s.cached == len(s.tokens):
                yield s
            self.prefixes.keep(s)
            self.prefixes.keep_state(s)

    def may_decode(self, s: SequenceState) -> bool:
        """Whether a captured step can draw the next token: the last one was drawn and not fed, and all before it are
        cached and keep their rotation."""
        return s.cached == len(s.tokens) - 1 and s.generated > 0 and not s.ahead and self.steps_left(s) > 0

    def steps_left(self, s: SequenceState) -> int:
        """Captured steps that can be queued for a sequence, beside those that are: to its end, or to where its rotation
        changes."""
        stable = min((rope.stable_steps(len(s.tokens)) for rope in self._ropes), default=s.limit)
        return min(s.limit - len(s.tokens), stable) - s.ahead
