"""Threads that compute the pieces of a large result together: how references use more than one core.

BLAS has threads of its own, but they wait for each other in a loop that keeps a core busy. Where another process wants
that core a product takes 10 to 100 times as long as on one thread. Here nobody waits so: the thread that asks and its
helpers take pieces as they come, and a piece whose helper was interrupted is computed again by the one who waits for
it. So beside busy processes a team is about as fast as a single thread, and twice as fast on two idle cores.

A process that forks waits until no thread is inside a product, because BLAS takes locks there: a child would find them
locked for good.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from ..dtypes import Array

__all__ = ["LEAST_WORK", "fill", "multiplying", "team_of"]

# Multiply-adds, with 3 for each element that is read, below which a team gains less than its helpers take to wake up:
# about 0.7 ms of one core.
LEAST_WORK = 1 << 25
_LONGEST_WAIT = 5.0  # seconds that a fork waits for products at most

_local = threading.local()  # .threads: of the team of this thread; .depth: how often it is inside the gate


class _Job:
    """Pieces and where their results go; each is handed out once, and the first result of it counts."""

    def __init__(self, outs: Sequence[Array], pieces: Sequence[Callable[[], Array]]) -> None:
        self._outs, self._pieces = outs, pieces
        self._next = iter(range(len(pieces)))
        self._claims: dict[int, object] = {}
        self._finished: list[int] = []
        self.failure: BaseException | None = None

    def work(self) -> None:
        """Compute pieces until all are handed out."""
        for i in self._next:
            self._piece(i)

    def _piece(self, i: int) -> None:
        result, claim = self._pieces[i](), object()
        if self._claims.setdefault(i, claim) is claim:  # atomic: one of two that computed it writes it
            self._outs[i][...] = result
            self._finished.append(i)

    def finish(self, patience: float) -> None:
        """Wait so many seconds for the pieces that helpers are at; then compute them here."""
        end = time.perf_counter() + patience
        while len(self._finished) < len(self._pieces) and time.perf_counter() < end:
            time.sleep(0)
        for i in range(len(self._pieces)):
            if i not in self._claims:
                self._piece(i)
        while len(self._finished) < len(self._pieces):  # a helper copies a result
            if self.failure is not None:
                raise self.failure
            time.sleep(0)


class _Team:
    """Helpers of the process, made when they are first needed. idle: those that have nothing to do."""

    def __init__(self) -> None:
        self._idle: deque[_Helper] = deque()
        self._made = 0
        self._lock = threading.Lock()

    def ask(self, job: _Job, helpers: int) -> None:
        """Give the job to as many helpers; those that are busy, or are not running just now, are not counted on."""
        with self._lock:
            for _ in range(helpers - self._made):
                self._idle.append(_Helper(self._idle))
                self._made += 1
        for _ in range(helpers):
            try:
                self._idle.pop().jobs.put(job)
            except IndexError:
                return

    def dismiss(self) -> None:
        """End the helpers that have nothing to do: a fork should find few threads. They are made again when needed."""
        with self._lock:
            leaving = []
            with suppress(IndexError):
                while True:
                    leaving.append(self._idle.pop())
            self._made -= len(leaving)
        for helper in leaving:
            helper.jobs.put(None)
            helper.thread.join(_LONGEST_WAIT)


class _Helper:
    """A thread that works on the jobs it is given, and then is one of ``idle``."""

    def __init__(self, idle: deque[_Helper]) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._idle = idle
        self.thread = threading.Thread(target=self._work, name="cuplama helper", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                with multiplying:
                    job.work()
            except BaseException as e:  # the one who asked meets it too, since nobody claimed the piece
                job.failure = e
            del job  # and with it the arrays
            self._idle.append(self)


class _Gate:
    """Which threads are inside a product. A fork closes it, and waits until they have left."""

    def __init__(self) -> None:
        self.inside: set[int] = set()
        self.closed = False

    def enter(self, thread: int) -> None:
        """Wait while it is closed."""
        while True:
            self.inside.add(thread)
            if not self.closed:
                return
            self.inside.discard(thread)
            time.sleep(1e-4)

    def __enter__(self) -> None:
        """Inside, this thread may call BLAS, and no fork happens."""
        depth = _local.__dict__.get("depth", 0)
        if not depth:
            self.enter(threading.get_ident())
        _local.depth = depth + 1

    def __exit__(self, *exc: object) -> None:
        _local.depth -= 1
        if not _local.depth:
            self.inside.discard(threading.get_ident())

    def close(self) -> None:
        """Wait until no other thread is inside."""
        self.closed, own, end = True, threading.get_ident(), time.monotonic() + _LONGEST_WAIT
        while self.inside - {own} and time.monotonic() < end:
            time.sleep(1e-4)

    def open(self) -> None:
        """Let the threads in again."""
        self.closed = False


multiplying = _Gate()
"""Around calls of BLAS: ``with multiplying: y = x @ w.T``. ``fill`` has it around its pieces."""
_team = _Team()


def _prepare() -> None:
    """Before a fork."""
    multiplying.close()
    _team.dismiss()


def _start_again() -> None:
    """In a child that was forked: the threads of the parent are not here."""
    global _team
    _team = _Team()
    multiplying.inside &= {threading.get_ident()}
    multiplying.open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_prepare, after_in_parent=multiplying.open, after_in_child=_start_again)


@contextmanager
def team_of(threads: int) -> Iterator[None]:
    """Inside, ``fill`` uses up to that many threads, the calling one included."""
    before = getattr(_local, "threads", 1)
    _local.threads = threads
    try:
        yield
    finally:
        _local.threads = before


def fill(outs: Sequence[Array], pieces: Sequence[Callable[[], Array]], work: float) -> None:
    """``outs[i][...] = pieces[i]()`` for every i; see ``LEAST_WORK`` for the unit of ``work``.

    Pieces depend on nothing that changes meanwhile. What they are does not depend on the number of threads, so results
    do not either.
    """
    threads = _local.__dict__.get("threads", 1)
    with multiplying:
        if threads < 2 or len(pieces) < 2 or work < LEAST_WORK:
            for out, piece in zip(outs, pieces, strict=True):
                out[...] = piece()
            return
        job, began = _Job(outs, pieces), time.perf_counter()
        _team.ask(job, min(threads, len(pieces)) - 1)
        job.work()
        job.finish(1.5 * threads * (time.perf_counter() - began) / len(pieces))  # somewhat longer than a piece takes
