"""Threads that compute the pieces of a large result together: how references use more than one core.

BLAS has threads of its own, but they wait for each other in a loop that keeps a core busy. Where another process wants
that core they lose far more than its share: on two cores, beside one busy process, 8 sequences of the bundled model
were drawn at 370 tokens/s with BLAS's threads, and are at 1,170 with these. Here nobody waits so: the thread that asks
and its helpers take pieces as they come, so one that is interrupted computes fewer.

A process that forks waits until no thread is inside a product, because BLAS takes locks there: a child would find them
locked for good.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial

from ..dtypes import Array

__all__ = ["LEAST_WORK", "fill", "fill_rows", "multiplying", "team_of"]

# Multiply-adds, with 3 for each element that is read, below which a team gains less than its helpers take to wake up:
# about 0.7 ms of one core.
LEAST_WORK = 1 << 25
_CACHED = 1 << 16  # elements that a thread computes at a time in ``fill_rows``: 256 KB, and a few times as much beside
_LONGEST_WAIT = 5.0  # seconds that a fork waits for products at most

_local = threading.local()  # .threads: of the team of this thread; .depth: how often it is inside the gate


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
_pool: ThreadPoolExecutor | None = None  # the helpers of the process, made when they are first needed


def _ask(work: Callable[[], None], helpers: int) -> list[Future[None]]:
    """Have as many helpers do the work, as soon as they are free."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "cuplama helper")
    try:
        return [_pool.submit(work) for _ in range(helpers)]
    except RuntimeError:  # Python ends, and starts no threads any more
        return []


def _prepare() -> None:
    """Before a fork, which should find few threads: helpers are ended, and made again when they are needed."""
    global _pool
    multiplying.close()
    pool, _pool = _pool, None
    if pool is not None:
        pool.shutdown(wait=multiplying.inside <= {threading.get_ident()})


def _start_again() -> None:
    """In a child that was forked: the threads of the parent are not here."""
    global _pool
    _pool = None
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
        numbers = iter(range(len(pieces)))  # each is handed out once, whoever asks

        def compute() -> None:
            for i in numbers:
                outs[i][...] = pieces[i]()

        helpers = _ask(compute, min(threads, len(pieces)) - 1)
        try:
            compute()
        finally:
            for _ in numbers:  # behind an error nobody begins another piece
                pass
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()  # raises what was raised there


def fill_rows(out: Array, piece: Callable[[slice], Array], cost: float) -> Array:
    """``out[rows] = piece(rows)`` for a few rows at a time; the array itself.

    What is made on the way to a few rows stays in a core's cache, where that of all of them would be new memory each
    time: of the bundled model's batch of 2,048 tokens the gradient of silu_mul took 13 ms so, and takes 8. cost: of an
    element, in the unit of ``LEAST_WORK``.
    """
    count = max(1, _CACHED // max(1, out[:1].size))
    if len(out) <= count:
        out[...] = piece(slice(len(out)))
        return out
    cuts = [slice(i, i + count) for i in range(0, len(out), count)]
    fill([out[rows] for rows in cuts], [partial(piece, rows) for rows in cuts], out.size * cost)
    return out
