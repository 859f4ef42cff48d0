"""How runs share the pages of the cache: on demand, and so that nothing that fits alone is refused because of others.

A run takes pages as its sequences grow. When they are short, the others give up first what they do not need yet, and
then one of them loses all its pages: it is suspended, and computes its keys and values again when it goes on (Kwon et
al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, section 4.5,
"recomputation"). Who loses them is a matter of the queue, in which runs stand as they began:

- a run that is idle, because nobody asks for its next step, loses them to anybody, and goes to the end of the queue;
- one that moves loses them to a run before it in the queue alone. So two that move never take pages from each other in
  turn: the later one waits.

A run that waits holds no pages, so nobody waits for it; the first in the queue that moves always gets what it needs.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from ..errors import ClosedError, CuplamaError
from .kv_cache import PAGE, PagedCache, pages_for
from .sequence import SequenceState

__all__ = ["IDLE", "Run", "Sharing"]

# Seconds after which a run that nobody asks for a step is idle to other threads: longer than a reader of a stream
# spends on a token, and short enough to wait for when a stream was forgotten. To its own thread it is idle at once.
IDLE = 1.0
_MARGIN = 256  # tokens for which a sequence takes pages ahead while there are other runs


@dataclass(eq=False)
class Run:
    """What one call keeps in the cache.

    sequences: those whose pages it holds; most: pages that they may need at most, all together; suspensions: how often
    it has lost its pages; asked: whether somebody waits for its next step, and from which thread it was last asked for.
    """

    sequences: Sequence[SequenceState] = ()
    most: int = 0
    suspensions: int = 0
    asked: bool = False
    thread: int = 0
    moved: float = 0.0  # when its last step ended, by time.monotonic()
    place: int = 0  # in the queue: the lower goes first
    end_loop: Callable[[], None] | None = field(default=None, repr=False)  # gives its decode loop back

    @property
    def held(self) -> int:
        """Pages that it holds."""
        return sum(len(s.pages) for s in self.sequences)

    @property
    def spare(self) -> int:
        """Pages that it holds for tokens to come."""
        return sum(max(0, len(s.pages) - pages_for(len(s.tokens))) for s in self.sequences)

    def leave_loop(self) -> None:
        """Give the decode loop back, if there is one: steps of it that were queued and not read are drawn again."""
        if self.end_loop is not None:
            end, self.end_loop = self.end_loop, None
            end()


class Sharing:
    """Divides the pages of ``cache`` among runs. turn: held by the thread whose run makes a step, or that ends one.

    closed: makes the error of a run that asks for a step when none gets pages any more; None while they do.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.turn = threading.Condition(threading.RLock())
        self.closed: Callable[[], CuplamaError] | None = None
        self._runs: list[Run] = []
        self._left: deque[Run] = deque()  # runs that have ended and still stand in the queue
        self._places = itertools.count()

    @contextmanager
    def entered(self, run: Run) -> Iterator[None]:
        """While inside, the run stands in the queue; at the end its pages are free again.

        The end never waits for the turn: if another thread has it, that one frees the pages. For it may be the garbage
        collector that ends a run whose stream was forgotten, in any thread and between any two lines; the thread that
        has the turn might be waiting for what is locked there.
        """
        run.place = next(self._places)
        self._runs.append(run)
        try:
            yield
        finally:
            self._left.append(run)
            self.free_left()

    def free_left(self) -> None:
        """Free the pages of runs that have ended, unless another thread has the turn. Called behind every turn, too."""
        while self._left and self.turn.acquire(blocking=False):
            try:
                while self._left:
                    run = self._left.popleft()
                    self._runs.remove(run)
                    run.leave_loop()
                    self.release(run.sequences)
            finally:
                self.turn.release()

    def release(self, sequences: Sequence[SequenceState]) -> None:
        """Take back the pages of sequences that have ended, and wake those who wait for pages."""
        for s in sequences:
            self.cache.release(s.pages)
        with self.turn:
            self.turn.notify_all()

    def room(self, run: Run) -> int:
        """Pages that no token of another run is in."""
        return self.cache.pages - sum(other.held - other.spare for other in self._others(run))

    def take(self, run: Run, tokens: Sequence[tuple[SequenceState, int]]) -> None:
        """Give each sequence the pages for that many tokens in all; where they are short, others lose theirs.

        If those are not to be had, the run gives up its own and waits until ``run.most`` pages are: then its sequences
        are to be computed again. Raises ClosedError if the model is closed, by now or meanwhile.
        """
        self.check_open()
        self.free_left()
        need = self._missing(tokens)
        while not self._make_room(run, need):
            self._suspend(run)
            need = max(run.most, self._missing(tokens))
            self._wait(run)
        for s, count in tokens:
            self.cache.extend(s.pages, count)

    def take_ahead(self, run: Run, tokens: Sequence[tuple[SequenceState, int]]) -> None:
        """Give sequences pages for up to that many tokens, of those that are free: all to a run that is alone."""
        alone = not self._others(run)
        ends = [count if alone else min(count, len(s.tokens) + _MARGIN) for s, count in tokens]
        wanted = [max(0, pages_for(end) - len(s.pages)) for (s, _), end in zip(tokens, ends, strict=True)]
        most = self.cache.free if sum(wanted) <= self.cache.free else self.cache.free // len(tokens)  # for each
        for (s, _), pages in zip(tokens, wanted, strict=True):
            self.cache.extend(s.pages, (len(s.pages) + min(pages, most)) * PAGE)

    def close(self) -> None:
        """Take the pages of all runs; those that wait for some learn that they get none."""
        self.closed = partial(ClosedError, "the model is closed")
        for run in self._runs:
            self._suspend(run)
        self.release(())

    def check_open(self) -> None:
        """Raise what ``closed`` makes if no run gets pages any more."""
        if self.closed is not None:
            raise self.closed()

    def start_again(self) -> None:
        """In a child that was forked: of the parent's runs only those of the forking thread go on, if it asks for them.

        Others may have been in the middle of anything, so what they held is free.
        """
        self.turn = threading.Condition(threading.RLock())
        own = threading.get_ident()
        for run in self._runs:
            if run.thread != own:
                run.end_loop = None
                for s in run.sequences:
                    s.pages.clear()
                    s.cached = 0
                run.suspensions += 1
        self.cache.free_all_but([s.pages for run in self._runs for s in run.sequences])

    def _missing(self, tokens: Sequence[tuple[SequenceState, int]]) -> int:
        return sum(max(0, pages_for(count) - len(s.pages)) for s, count in tokens)

    def _others(self, run: Run) -> list[Run]:
        """The other runs that hold pages."""
        return [other for other in self._runs if other is not run and other.held]

    def _make_room(self, run: Run, need: int) -> bool:
        """Whether ``need`` pages are free; if not, and others can give so many, they lose them."""
        if need <= self.cache.free:
            return True
        others = self._others(run)
        losers = self._losers(run, others)
        if need > self.cache.free + sum(r.spare for r in others) + sum(r.held - r.spare for r in losers):
            return False
        for other in others:
            if need > self.cache.free:
                self._trim(other)
        for other in losers:
            if need > self.cache.free:
                if self._is_idle(other, run):
                    other.place = next(self._places)
                self._suspend(other)
        return True

    def _losers(self, run: Run, others: list[Run]) -> list[Run]:
        """Who may be suspended for this run, in order: idle ones, longest idle first, then the last in the queue."""
        idle = sorted((r for r in others if self._is_idle(r, run)), key=lambda r: r.moved)
        later = sorted((r for r in others if r not in idle and r.place > run.place), key=lambda r: -r.place)
        return [*idle, *later]

    def _is_idle(self, other: Run, run: Run) -> bool:
        """A thread that is busy with one run asks for no step of another."""
        return other.thread == run.thread or (not other.asked and time.monotonic() - other.moved >= IDLE)

    def _trim(self, run: Run) -> None:
        """Take the pages that no token of the run is in."""
        if run.spare:
            run.leave_loop()
            for s in run.sequences:
                self.cache.shrink(s.pages, len(s.tokens))

    def _suspend(self, run: Run) -> None:
        """Take all pages of a run, which is between two passes."""
        run.leave_loop()
        if run.held:
            self.release(run.sequences)
        for s in run.sequences:
            s.cached = 0
        run.suspensions += 1

    def _wait(self, run: Run) -> None:
        """Until something may have changed: pages came back, or a run has become idle."""
        now = time.monotonic()
        idle_in = [seconds for r in self._others(run) if not r.asked and (seconds := r.moved + IDLE - now) > 0]
        with self.turn:
            self.turn.wait(max(0.01, min([IDLE, *idle_in])))
        self.check_open()
