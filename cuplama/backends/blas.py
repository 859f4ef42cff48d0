"""How many threads BLAS has while passes run: one, and as many as before when none runs any more.

Passes use threads of their own, see ``cuplama/ops/team.py``. The setting belongs to the process, so it is made and
restored here alone, whichever thread comes first or leaves last.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["one_blas_thread"]


class _OneThread:
    """One thread as long as any thread of the process is inside; see ``one_blas_thread``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: list[int] = []  # threads, as often as each is inside
        self._libraries: list[Any] | None = None
        self._before: list[tuple[Any, int]] = []  # libraries that had more than one thread, and how many
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_again)

    @contextmanager
    def __call__(self) -> Iterator[int]:
        thread = threading.get_ident()
        with self._lock:
            if not self._inside:
                self._limit()
            self._inside.append(thread)
            threads = max([1, *(n for _, n in self._before)])
        try:
            yield threads
        finally:
            with self._lock:
                self._inside.remove(thread)
                if not self._inside:
                    self._restore()

    def _limit(self) -> None:
        if self._libraries is None:
            self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        found = [(library, library.get_num_threads()) for library in self._libraries]
        self._before = [(library, n) for library, n in found if n is not None and n > 1]
        for library, _ in self._before:
            _set_threads(library, 1)

    def _restore(self) -> None:
        """As before, unless somebody else has set another number meanwhile."""
        for library, n in self._before:
            if library.get_num_threads() == 1:
                _set_threads(library, n)
        self._before = []

    def _start_again(self) -> None:
        """In a child that was forked, where only the forking thread lives on."""
        self._lock = threading.Lock()
        self._inside = [thread for thread in self._inside if thread == threading.get_ident()]
        if not self._inside:
            self._restore()


def _set_threads(library: Any, threads: int) -> None:
    """From whichever thread. threadpoolctl 3.8 obeys only the thread that set the number of OpenBLAS first, and nobody
    has to have been that one afterwards either: a user may set it as well."""
    forget = getattr(library, "clear_controlling_thread", None)
    if forget is not None:
        forget(force=True)
    library.set_num_threads(threads)
    if forget is not None:
        forget(force=True)


one_blas_thread = _OneThread()
"""A context manager inside which BLAS has one thread, for the whole process; it gives the number that it had before."""
